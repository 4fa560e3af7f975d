/** Short notes that come and go, and the list in which they stay. */

import { make, prose } from "./dom.js";

const SHOWN_MS = 7000;
const KEPT = 60;

export class Toasts {
  /** `corner` shows them for some seconds, `list` keeps them, `count` says how many are unread. */
  constructor(corner, list, count) {
    Object.assign(this, { corner, list, count, unread: 0 });
  }

  /** `kind`: "note", "good" or "bad". `link`: {href, file}, a download. */
  say(text, { hint = "", kind = "note", link = null } = {}) {
    const toast = make("div", { className: `toast ${kind}` });
    toast.append(...this.#content(text, hint, link));
    const close = make("button", { type: "button", className: "close", textContent: "×" });
    close.setAttribute("aria-label", "close this note");
    close.addEventListener("click", () => toast.remove());
    toast.append(close);
    this.corner.append(toast);
    while (this.corner.children.length > 4) this.corner.firstChild.remove();
    if (!link) setTimeout(() => toast.remove(), SHOWN_MS + 40 * (text.length + hint.length));
    this.#keep(text, hint, kind, link);
  }

  read() {
    this.unread = 0;
    this.count.hidden = true;
  }

  #keep(text, hint, kind, link) {
    const item = make("li", { className: kind });
    item.append(make("time", { textContent: new Date().toLocaleTimeString() }), ...this.#content(text, hint, link));
    this.list.prepend(item);
    while (this.list.children.length > KEPT) this.list.lastChild.remove();
    this.unread += 1;
    this.count.textContent = this.unread;
    this.count.hidden = false;
  }

  #content(text, hint, link) {
    const parts = [prose(make("p"), text)];
    if (hint) parts.push(prose(make("p", { className: "hint" }), hint));
    if (link) parts.push(make("a", { href: link.href, download: link.file, textContent: `Download ${link.file}` }));
    return parts;
  }
}
