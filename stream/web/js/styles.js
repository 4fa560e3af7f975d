/** The style cards: one click, or the arrow keys, and the prompt is that style. */

import { make } from "./dom.js";

/** The same picture, larger; for the stage before a camera is on. */
export const large = (picture) => picture.replace("/styles/", "/styles/large/");

export class StyleCards {
  #inputs = new Map();

  constructor(holder, onpick) {
    Object.assign(this, { holder, onpick, styles: [] });
  }

  build(styles) {
    this.styles = styles;
    this.#inputs.clear();
    this.holder.replaceChildren(...styles.map((style) => this.#card(style)));
  }

  #card({ name, picture }) {
    const card = make("label", { className: "card" });
    const input = make("input", { type: "radio", name: "style", value: name });
    input.addEventListener("change", () => this.onpick(name));
    const image = make("img", { src: picture, alt: "", width: 216, height: 144, loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => card.classList.add("plain"));
    card.append(input, image, make("span", { textContent: name }));
    this.#inputs.set(name, input);
    return card;
  }

  /** Mark the card of this prompt, or none. */
  show(prompt) {
    for (const [name, input] of this.#inputs) {
      const chosen = name === prompt.trim();
      if (chosen && !input.checked) this.#reveal(input.parentElement);
      input.checked = chosen;
    }
  }

  /** On a phone the cards are a strip: bring the chosen one into it, without moving the page. */
  #reveal(card) {
    const { holder } = this;
    holder.scrollLeft = card.offsetLeft - holder.offsetLeft - (holder.clientWidth - card.clientWidth) / 2;
  }

  pictureOf(prompt) {
    return this.styles.find(({ name }) => name === prompt.trim())?.picture ?? "";
  }
}
