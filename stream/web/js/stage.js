/** The picture: what is on the stage before and after the handle, and the words upon it. */

import { Split } from "./split.js";
import { withToken } from "./api.js";
import { prose } from "./dom.js";

const $ = (id) => document.getElementById(id);
const [WIDTH, HEIGHT] = [16, 9];

export class Stage {
  constructor() {
    this.root = $("stage");
    this.split = new Split(this.root, $("handle"));
    this.comparing = true;
    this.mirrored = this.slated = false;
    this.#layout();
    for (const id of ["before", "after"]) $(id).addEventListener("playing", () => this.#layout());
  }

  /** Before a camera is on: an example in the style that is chosen. */
  example(picture) {
    this.idle = true;
    const image = $("after-example");
    if (picture && !image.src.endsWith(picture)) image.src = picture;
    this.aspect(WIDTH, HEIGHT);
    this.#layout();
  }

  /** A stream is shown; `camera`: this page's own MediaStream, or null when its source is elsewhere. */
  stream(name, camera) {
    this.idle = false;
    this.camera = camera;
    $("before").srcObject = camera;
    if (camera) $("before").play().catch(() => {});
    this.name = name;
    this.#layout();
  }

  aspect(width, height) {
    this.root.style.setProperty("--aspect", `${width} / ${height}`);
    this.root.style.setProperty("--ratio", `${width / height}`);
  }

  compare(on) {
    this.comparing = on;
    this.#layout();
  }

  mirror(on) {
    this.mirrored = on;
    this.root.classList.toggle("mirrored", on);
  }

  /** Whether the source's own pictures can be had; without any there is nothing to compare with. */
  originals(available) {
    this.available = available;
    this.#layout();
  }

  #layout() {
    const still = $("before-still");
    const wanted = !this.idle && !this.camera && this.comparing && this.available;
    const source = wanted ? withToken(`/stream/${encodeURIComponent(this.name)}.mjpg?original=1`) : "";
    if (still.getAttribute("src") !== (source || null)) {
      if (source) still.src = source;
      else still.removeAttribute("src"); // ends the request
    }
    still.hidden = !wanted;
    $("before").hidden = this.idle || !this.camera;
    $("after").hidden = Boolean(this.idle);
    for (const id of ["before-example", "after-example"]) $(id).hidden = !this.idle;
    const two = this.idle || (!this.slated && Boolean(this.camera || this.available));
    this.split.show(this.comparing && two);
  }

  /** The pill: `phase` colours its dot. `progress` 0–1, or null. */
  words(phase, words, progress = null) {
    $("pill").dataset.phase = phase;
    const shown = $("after").readyState >= 2 || !$("after-still").hidden;
    const slated = shown && !["idle", "live", "slow"].includes(phase); // the server shows words, neither mirrored nor cut
    if (slated !== this.slated) {
      this.slated = slated;
      this.root.classList.toggle("slated", slated);
      this.#layout();
    }
    if ($("words").textContent !== words) $("words").textContent = words;
    $("progress").hidden = progress === null;
    if (progress !== null) $("progress").value = progress;
  }

  /** Why there is no picture and what helps; no words: nothing is wrong. */
  trouble(words = "", hint = "") {
    $("trouble").hidden = !words;
    prose($("trouble-words"), words);
    prose($("trouble-hint"), hint);
  }

  /** For those who listen: said once for each new phase, not every second. */
  announce(text) {
    if ($("announcer").textContent !== text) $("announcer").textContent = text;
  }
}
