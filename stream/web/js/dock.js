/** The buttons under the picture. */

import { Refusal } from "./api.js";
import { Recording, snapshot } from "./takes.js";

const $ = (id) => document.getElementById(id);

export const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";

/** A button that is on or off. */
export function toggle(id, changed) {
  $(id).addEventListener("click", () => {
    const on = !pressed(id);
    $(id).setAttribute("aria-pressed", on);
    changed(on);
  });
}

/** The whole screen for `element`; iPhones have that for a video only. */
export function wireFullscreen(element, video) {
  $("fullscreen").addEventListener("click", () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (element.requestFullscreen) element.requestFullscreen();
    else video.webkitEnterFullscreen?.();
  });
}

/** Snapshot and record. `name()`: the stream, `picture()`: what shows it; refusals go to `complain`, words to `toasts`. */
export function wireTakes({ name, picture, video, toasts, complain }) {
  let recording = null;
  const clock = () => {
    if (!recording) return;
    const seconds = Math.floor(recording.seconds);
    $("record-words").textContent = `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  };
  const start = async () => {
    if (!name()) throw new Refusal(0, "There is nothing to record yet.", "Press Start first.");
    recording = await Recording.start(name(), video);
    if (recording.note) toasts.say(recording.note);
  };
  const stop = async () => {
    const { words, ...link } = await recording.stop().finally(() => (recording = null));
    toasts.say(words, { kind: "good", link });
  };
  $("snapshot").addEventListener("click", () => snapshot(picture(), name() || "livestyle").catch(complain));
  $("record").addEventListener("click", async () => {
    $("record").disabled = true;
    await (recording ? stop() : start()).catch(complain);
    $("record").disabled = false;
    $("record").setAttribute("aria-pressed", Boolean(recording));
    $("record-words").textContent = "Record";
    clock();
  });
  setInterval(clock, 500);
}
