/** The four live numbers and their minute: latency, rate, drops, stage times. */

import { make } from "./dom.js";
import { Plot } from "./plots.js";

const KINDS = { latency: ["line", 50], fps: ["line", 30], drops: ["bars", 5], stages: ["stack", 20] };
const SHOWN_STAGES = 5;

const ms = (value) => (value >= 99.5 ? `${Math.round(value)}` : value.toFixed(value < 9.95 ? 1 : 0));

export class Numbers {
  #dropped = null;
  #lost = null;

  constructor(root) {
    this.tiles = {};
    this.plots = {};
    for (const [name, [kind, least]] of Object.entries(KINDS)) {
      const [value, note, canvas] = [".value", ".note", "canvas"].map((part) => root.querySelector(`[data-number=${name}] ${part}`));
      this.tiles[name] = { value, note, canvas };
      this.plots[name] = new Plot(canvas, kind, least);
    }
  }

  clear() {
    this.#dropped = this.#lost = null;
    for (const [name, { value, note }] of Object.entries(this.tiles)) {
      value.textContent = "–";
      note.textContent = "";
      this.plots[name].clear();
    }
  }

  /** Once a second. `seen`: {server, down} or null; `up`: ms or null; `inbound`: the video receiver's statistics. */
  tick({ status, seen, up, inbound }) {
    this.#latency(status, seen, up);
    this.#rate(status, inbound);
    this.#drops(status, inbound);
    this.#stages(status);
  }

  #set(name, value, unit, note, plotted) {
    const { value: number, note: small, canvas } = this.tiles[name];
    number.replaceChildren(value, ...(unit ? [make("small", { textContent: ` ${unit}` })] : []));
    if (typeof note === "string") small.textContent = note;
    else small.replaceChildren(...note);
    canvas.setAttribute("aria-label", `the last minute; now ${value} ${unit}`);
    this.plots[name].push(plotted);
  }

  #latency(status, seen, up) {
    const p50 = status?.latency_ms?.p50;
    if (seen) {
      const total = seen.server + seen.down + (up ?? 0);
      const way = [up === null ? "" : `to server ${ms(up)}`, `server ${ms(seen.server)}`, `to screen ${ms(seen.down)}`];
      this.#set("latency", ms(total), "ms", way.filter(Boolean).join(" · "), total);
    } else if (p50 && status.phase === "live") this.#set("latency", ms(p50), "ms", "inside the server only", p50);
    else this.#set("latency", "–", "", "", null);
  }

  #rate(status, inbound) {
    const fps = inbound?.framesPerSecond ?? status?.fps;
    if (fps === undefined || fps === null) this.#set("fps", "–", "", "", null);
    else {
      const styled = status?.style_fps ? ` · ${status.style_fps.toFixed(1)} diffused` : "";
      this.#set("fps", fps.toFixed(fps < 9.95 ? 1 : 0), "fps", `server ${(status?.fps ?? 0).toFixed(1)}${styled}`, fps);
    }
  }

  #drops(status, inbound) {
    const dropped = status?.dropped ?? 0;
    const lost = (inbound?.framesDropped ?? 0) + Math.max(0, inbound?.packetsLost ?? 0);
    const since = (before, now) => (before === null || now < before ? 0 : now - before);
    const fresh = since(this.#dropped, dropped) + since(this.#lost, lost);
    [this.#dropped, this.#lost] = [dropped, lost];
    this.#set("drops", String(fresh), "/s", `${dropped} at the server, ${lost} on the way`, fresh);
  }

  #stages(status) {
    const stages = Object.entries(status?.stages_ms ?? {}).map(([name, { p50 }]) => [name, p50]);
    const largest = stages.filter(([, p50]) => p50 >= 0.05).sort((a, b) => b[1] - a[1]).slice(0, SHOWN_STAGES);
    if (!largest.length) {
      this.#set("stages", "–", "", "", null);
      return;
    }
    const shown = stages.filter(([name]) => largest.some(([kept]) => kept === name)); // in their own order
    const key = ([name, p50], n) => make("span", { className: `key key-${n + 1}`, textContent: `${name} ${ms(p50)}` });
    const legend = shown.flatMap((stage, n) => [key(stage, n), " "]);
    const total = shown.reduce((sum, [, p50]) => sum + p50, 0);
    this.#set("stages", ms(total), "ms", legend, shown.map(([, p50]) => p50));
  }
}
