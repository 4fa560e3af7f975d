/** This page's own camera: opened, published by WHIP, changed while it runs. */

import { Refusal, call, streamPath, token } from "./api.js";
import { openCamera } from "./camera.js";
import { Timing, Uplink } from "./timing.js";
import { publish, replaceVideo } from "./whip.js";

const NAMES = 20;

/** Fires "state" with the WHIP peer's detail, and "ended" when the camera went away. */
export class Publisher extends EventTarget {
  media = null;
  peer = null;
  name = "";
  uplink = new Uplink();

  get running() {
    return this.media !== null;
  }

  /** Open the camera; raises `NoCamera`. */
  async open(choice) {
    this.media = await openCamera(choice);
    this.#guard();
  }

  /**
   * Publish under `wanted`, or a free name like it, the stream made with `params`. Raises `Refusal`.
   * `streams`: name → status of those that are there.
   */
  async start(wanted, streams, { params, box, iceServers }) {
    const name = freeName(wanted, streams);
    const { width = 16, height = 9 } = this.media.getVideoTracks()[0].getSettings();
    const size = height > width ? `${box[1]}x${box[0]}` : `${box[0]}x${box[1]}`; // a phone held upright
    try {
      if (streams.has(name)) await call("PATCH", streamPath(name, "/params"), params);
      else await call("POST", "/streams", { name, params, size });
    } catch (error) {
      // A token for publishing only may not make streams or change them, but WHIP makes one as it comes.
      if (!(error instanceof Refusal) || ![403, 404, 409].includes(error.status)) throw error;
    }
    this.name = name;
    const onchannel = (channel) => (this.uplink.timing = new Timing(channel));
    this.peer = publish(this.media, `/whip/${encodeURIComponent(name)}`, { onchannel, token, iceServers });
    this.peer.addEventListener("state", ({ detail }) => this.dispatchEvent(new CustomEvent("state", { detail })));
    return name;
  }

  /** Another camera, or the microphone on or off, while it runs. Raises `NoCamera`. */
  async change(choice) {
    const media = await openCamera(choice);
    const before = this.media;
    const sameTracks = before.getAudioTracks().length === media.getAudioTracks().length;
    this.media = media;
    this.#guard();
    if (sameTracks) await replaceVideo(this.peer, media.getVideoTracks()[0]);
    for (const track of before.getTracks()) track.stop();
    return sameTracks;
  }

  stop() {
    this.peer?.close();
    for (const track of this.media?.getTracks() ?? []) track.stop();
    this.media = this.peer = null;
    this.name = "";
  }

  #guard() {
    const [track] = this.media.getVideoTracks();
    const media = this.media;
    track.addEventListener("ended", () => {
      if (this.media === media) this.dispatchEvent(new CustomEvent("ended"));
    });
  }
}

/** A name under which nobody publishes: `wanted`, `wanted-2`, … */
function freeName(wanted, streams) {
  for (let n = 1; n <= NAMES; n += 1) {
    const name = n === 1 ? wanted : `${wanted}-${n}`;
    if (!streams.get(name)?.source) return name;
  }
  return wanted;
}
