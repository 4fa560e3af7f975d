/** The model of the stream on the stage: a choice, where there is more than one that can run. */

import { make } from "./dom.js";

export class Models {
  #ready = [];

  /** Calls `choose(name)` for what the user picks. */
  constructor(field, select, choose) {
    Object.assign(this, { field, select });
    select.addEventListener("change", () => choose(select.value));
  }

  /** What /api/v1/models lists. */
  build(rows) {
    this.#ready = rows.filter(({ ready }) => ready);
  }

  /** The model that a stream has now; "" without a stream. */
  show(model) {
    const names = [...new Set([...this.#ready.map(({ name }) => name), model])]; // a server may have one of its own
    this.field.hidden = !model || names.length < 2;
    if (this.field.hidden) return;
    if (names.join("\n") !== this.select.dataset.names) {
      this.select.dataset.names = names.join("\n");
      this.select.replaceChildren(...names.map((value) => make("option", { value, textContent: value })));
    }
    if (this.select.value !== model) this.select.value = model;
  }
}
