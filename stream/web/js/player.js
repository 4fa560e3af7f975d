/** Shows a stream: over WebRTC, and as MJPEG over plain HTTP while WebRTC cannot get through. */

import { token, withToken } from "./api.js";
import { play } from "./whep.js";
import { Downlink, Timing } from "./timing.js";

const SLOW = "Pictures come over plain HTTP instead, with more delay. WebRTC needs UDP to the server, or a TURN server.";
const FALLBACK_MS = 5000; // without a picture by WebRTC for so long, MJPEG is shown meanwhile

/**
 * Fires "state" with detail {kind, message, hint}:
 * "off" | "connecting" | "live" | "mjpeg" | "reconnecting" | "refused".
 */
export class Player extends EventTarget {
  #timer = 0;
  #shown = false;

  /** A <video> and, for MJPEG, an <img> in the same place. */
  constructor(video, still) {
    super();
    Object.assign(this, { video, still, peer: null, name: "", downlink: new Downlink(video), kind: "off" });
    video.addEventListener("playing", () => this.#live());
    video.addEventListener("resize", () => this.#sized(video.videoWidth, video.videoHeight));
    still.addEventListener("load", () => this.#sized(still.naturalWidth, still.naturalHeight));
  }

  start(name, { iceServers = [] } = {}) {
    this.stop();
    this.name = name;
    const onstream = (stream) => {
      this.video.srcObject = stream;
      this.video.play().catch(() => {}); // muted video may always play; a hidden page resumes by itself
    };
    const onchannel = (channel) => (this.downlink.timing = new Timing(channel));
    this.peer = play(`/whep/${encodeURIComponent(name)}`, { onstream, onchannel, token, iceServers });
    this.peer.addEventListener("state", ({ detail }) => this.#follow(detail));
    this.#follow({ state: "connecting" });
    this.#timer = setTimeout(() => this.#fallBack("No picture came through WebRTC yet."), FALLBACK_MS);
  }

  stop() {
    clearTimeout(this.#timer);
    this.peer?.close();
    this.peer = null;
    this.#shown = false;
    this.video.srcObject = null;
    this.#hideStill();
    this.#say("off");
  }

  /** The element whose picture is on the screen. */
  get picture() {
    return this.still.hidden ? this.video : this.still;
  }

  #live() {
    if (!this.peer) return;
    clearTimeout(this.#timer);
    this.#shown = true;
    this.#hideStill();
    this.#say("live");
  }

  #follow({ state, error }) {
    if (state === "connected") {
      if (this.video.readyState >= 3 && !this.video.paused) this.#live(); // "playing" may have come before
    } else if (state === "refused") {
      clearTimeout(this.#timer);
      this.#say("refused", error.message, error.hint);
    } else if (state === "waiting") {
      if (error.status === "no-path") this.#fallBack(error.message);
      else if (this.kind !== "mjpeg") this.#say("reconnecting", error.message, error.hint);
    } else if (state === "connecting" && this.kind !== "mjpeg" && this.kind !== "reconnecting") {
      this.#say(this.#shown ? "reconnecting" : "connecting");
    }
  }

  #fallBack(reason) {
    if (!this.peer || this.kind === "mjpeg" || this.kind === "live") return;
    this.still.src = withToken(`/stream/${encodeURIComponent(this.name)}.mjpg`);
    this.still.hidden = false;
    this.#say("mjpeg", reason, SLOW);
  }

  #hideStill() {
    this.still.hidden = true;
    this.still.removeAttribute("src"); // ends the request
  }

  #sized(width, height) {
    if (width && height) this.dispatchEvent(new CustomEvent("size", { detail: { width, height } }));
  }

  #say(kind, message = "", hint = "") {
    this.kind = kind;
    this.dispatchEvent(new CustomEvent("state", { detail: { kind, message, hint } }));
  }
}
