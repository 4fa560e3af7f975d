/** Snapshots and recordings of the stylized picture. */

import { Refusal, call, streamPath, withToken } from "./api.js";

const TYPES = ["video/mp4;codecs=avc1", "video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"];

/** Hand a file to the user's downloads. */
export function download(href, name) {
  const link = Object.assign(document.createElement("a"), { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

const stamp = () => new Date().toISOString().slice(0, 19).replaceAll(":", ".").replace("T", " ");

/** Save what a <video> or <img> shows as a PNG. Raises `Refusal` while it shows nothing. */
export async function snapshot(picture, name) {
  const width = picture.videoWidth ?? picture.naturalWidth;
  const height = picture.videoHeight ?? picture.naturalHeight;
  if (!width) throw new Refusal(0, "There is no picture to save yet.");
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").drawImage(picture, 0, 0);
  const png = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const url = URL.createObjectURL(png);
  download(url, `${name} ${stamp()}.png`);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Records at the server; or, where that is refused, in this browser what it receives. */
export class Recording {
  /** `note` says why the browser records, or "". Raises `Refusal` when neither can. */
  static async start(name, video) {
    try {
      const { id } = await call("POST", streamPath(name, "/recordings"));
      return new Recording(name, { id }, "");
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      const type = TYPES.find((one) => globalThis.MediaRecorder?.isTypeSupported(one));
      if (!type || !video.srcObject || error.status === 401) throw error;
      const recorder = new MediaRecorder(video.srcObject, { mimeType: type, videoBitsPerSecond: 6_000_000 });
      const chunks = [];
      recorder.addEventListener("dataavailable", ({ data }) => chunks.push(data));
      recorder.start(1000);
      return new Recording(name, { recorder, chunks, type }, `${error.message}: this browser records instead.`);
    }
  }

  constructor(name, how, note) {
    Object.assign(this, { name, how, note, began: performance.now() });
  }

  get seconds() {
    return (performance.now() - this.began) / 1000;
  }

  /** End it; returns {href, file, words}: a link to the finished file. Raises `Refusal`. */
  async stop() {
    const { id, recorder, chunks, type } = this.how;
    if (id) {
      const { url, file, seconds, frames, error } = await call("DELETE", streamPath(this.name, `/recordings/${id}`));
      if (error) throw new Refusal(500, error, `What was written until then is kept as ${file}.`);
      const words = `Recorded ${seconds.toFixed(1)} s, ${frames} pictures.`;
      return { href: withToken(url), file: file.split(/[\\/]/).pop(), words };
    }
    await new Promise((resolve) => {
      recorder.addEventListener("stop", resolve, { once: true });
      if (recorder.state === "inactive") resolve();
      else recorder.stop();
    });
    const file = `${this.name} ${stamp()}.${type.includes("mp4") ? "mp4" : "webm"}`;
    return { href: URL.createObjectURL(new Blob(chunks, { type })), file, words: `Recorded ${this.seconds.toFixed(1)} s.` };
  }
}
