/** The form of every setting, made from the one schema; a change is sent at once and a refusal stands at its field. */

import { Refusal } from "./api.js";
import { make, prose } from "./dom.js";
import { fieldsOf } from "./schema.js";

const FIRST = ["style.prompt", "style.strength", "style.steps", "style.seed"];
const WAIT_MS = { range: 80, number: 350, text: 450 };
const SLIDER_SPAN = 60; // a number with a wider range is typed, not dragged

/** Calls `send(changes)` for what the user changes; it may raise `Refusal`, whose words are then shown at the field. */
export class Settings {
  #fields = new Map(); // key → {field, box, inputs, refusal, value}
  #pending = new Map();
  #timer = 0;

  constructor({ main, more, advanced }, send, onchange = () => {}) {
    Object.assign(this, { main, more, advanced, send, onchange });
  }

  build(described) {
    const sections = fieldsOf(described);
    for (const holder of [this.main, this.more, this.advanced]) holder.replaceChildren();
    this.#fields.clear();
    const all = new Map(sections.flatMap(({ fields }) => fields.map((f) => [f.key, f])));
    for (const key of FIRST) if (all.has(key)) this.main.append(this.#control(all.get(key)));
    for (const { section, about, fields } of sections) {
      const rest = fields.filter(({ key }) => !FIRST.includes(key));
      if (section === "style") this.more.append(...rest.map((f) => this.#control(f)));
      else this.advanced.append(this.#group(section, about, rest));
    }
  }

  get values() {
    return Object.fromEntries([...this.#fields].map(([key, { value }]) => [key, value]));
  }

  /** What the server has; a field in which the user is at work is left alone. */
  show(params) {
    for (const [key, value] of Object.entries(params)) {
      const entry = this.#fields.get(key);
      if (!entry || this.#pending.has(key) || entry.sending || entry.box.contains(document.activeElement) && entry.touched) continue;
      this.#put(entry, value);
    }
  }

  /** Change one setting from elsewhere: a style card, the dice. */
  set(key, value) {
    const entry = this.#fields.get(key);
    if (entry) this.#put(entry, value);
    this.#queue(key, value, 0);
  }

  focus(key) {
    this.#fields.get(key)?.inputs[0].focus();
  }

  #put(entry, value) {
    if (entry.value !== value) this.#refuse(entry, "");
    entry.value = value;
    for (const input of entry.inputs) if (input.value !== String(value)) input.value = value;
    entry.reset.hidden = value === entry.field.value;
    this.onchange(entry.field.key, value);
  }

  #group(section, about, fields) {
    const group = make("fieldset", { className: "group" });
    group.append(make("legend", { textContent: section[0].toUpperCase() + section.slice(1) }));
    if (about) group.append(make("p", { className: "about", textContent: about }));
    group.append(...fields.map((f) => this.#control(f)));
    return group;
  }

  #control(f) {
    const id = `set-${f.key.replace(".", "-")}`;
    const box = make("div", { className: `field ${f.type}` });
    box.dataset.key = f.key;
    const label = make("label", { htmlFor: id, textContent: f.label });
    const reset = make("button", { type: "button", className: "reset", textContent: "reset", hidden: true });
    reset.setAttribute("aria-label", `reset ${f.label} to ${f.value || "nothing"}`);
    const refusal = make("p", { className: "refusal", id: `${id}-refusal`, hidden: true });
    refusal.setAttribute("role", "alert");
    const inputs = inputsOf(f, id);
    const about = make("p", { className: "about", id: `${id}-about`, textContent: f.about });
    const head = make("div", { className: "head" });
    head.append(label, reset);
    const row = make("div", { className: "inputs" });
    row.append(...inputs);
    box.append(head, row, about, refusal);
    const entry = { field: f, box, inputs, refusal, reset, value: f.value, touched: false };
    this.#fields.set(f.key, entry);
    for (const input of inputs) {
      input.setAttribute("aria-describedby", `${id}-about ${id}-refusal`);
      input.addEventListener("input", () => this.#typed(entry, input));
      input.addEventListener("change", () => this.#flush());
      input.addEventListener("blur", () => (entry.touched = false));
    }
    reset.addEventListener("click", () => {
      this.set(f.key, f.value);
      inputs[0].focus();
    });
    if (f.key === "style.seed") row.append(dice(() => this.set(f.key, Math.floor(Math.random() * 10_000))));
    this.#put(entry, f.value);
    return box;
  }

  #typed(entry, input) {
    const { type, key, label } = entry.field;
    entry.touched = true;
    const number = type === "number" || type === "integer";
    const value = number ? input.valueAsNumber : input.value;
    for (const other of entry.inputs) if (other !== input) other.value = input.value;
    if (number && Number.isNaN(value)) {
      this.#pending.delete(key);
      this.#refuse(entry, `${label} wants a number.`);
      return;
    }
    entry.value = value;
    entry.reset.hidden = value === entry.field.value;
    this.onchange(key, value);
    this.#queue(key, value, WAIT_MS[input.type] ?? (type === "enum" ? 0 : WAIT_MS.text));
  }

  #queue(key, value, wait) {
    this.#pending.set(key, value);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#flush(), wait);
  }

  async #flush() {
    clearTimeout(this.#timer);
    if (!this.#pending.size) return;
    const changes = Object.fromEntries(this.#pending);
    this.#pending.clear();
    const keys = Object.keys(changes);
    if (keys.length === 1 || (await this.#attempt(changes, false))) {
      if (keys.length === 1) await this.#attempt(changes, true);
      return;
    }
    for (const key of keys) await this.#attempt({ [key]: changes[key] }, true); // one of them is bad: which?
  }

  async #attempt(changes, tell) {
    const entries = Object.keys(changes).map((key) => this.#fields.get(key)).filter(Boolean);
    for (const entry of entries) entry.sending = true;
    try {
      await this.send(changes);
      for (const entry of entries) this.#refuse(entry, "");
      return true;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      if (error.status === 429) { // dragged faster than the server takes: the last position is sent later
        for (const [key, value] of Object.entries(changes)) if (!this.#pending.has(key)) this.#queue(key, value, 1000 * (error.retryAfter || 1));
        return true;
      }
      if (tell) for (const entry of entries) this.#refuse(entry, [error.message, error.hint].filter(Boolean).join(" — "));
      return false;
    } finally {
      for (const entry of entries) entry.sending = false;
    }
  }

  #refuse(entry, words) {
    prose(entry.refusal, words);
    entry.refusal.hidden = !words;
    for (const input of entry.inputs) input.setAttribute("aria-invalid", String(Boolean(words)));
  }
}

function inputsOf(f, id) {
  if (f.type === "enum") {
    const select = make("select", { id });
    select.append(...f.options.map((value) => make("option", { value, textContent: value })));
    return [select];
  }
  if (f.type === "string") {
    const area = make("textarea", { id, rows: 2, spellcheck: false });
    if (f.length) area.maxLength = f.length;
    return [area];
  }
  const number = make("input", { id, type: "number", inputMode: f.type === "integer" ? "numeric" : "decimal" });
  const limits = { min: f.least, max: f.most, step: f.type === "integer" ? 1 : "any" };
  for (const [name, value] of Object.entries(limits)) if (value !== undefined) number.setAttribute(name, value);
  if (!(f.most - f.least <= SLIDER_SPAN)) return [number];
  const range = make("input", { type: "range" });
  Object.assign(range, { min: f.least, max: f.most, step: f.step });
  range.setAttribute("aria-label", f.label);
  return [number, range];
}

function dice(roll) {
  const button = make("button", { type: "button", className: "quiet", textContent: "Roll" });
  button.setAttribute("aria-label", "another seed");
  button.addEventListener("click", roll);
  return button;
}
