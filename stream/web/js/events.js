/** Every stream's state as it changes: over a WebSocket, or by asking every two seconds while there is none. */

import { call, token, withToken } from "./api.js";

const BACKOFF_S = [0.5, 1, 2, 5, 10];
const POLL_MS = 2000;

/** Fires "status" (detail: a stream's status), "event" (detail: {stream, kind, text, …}) and "link" (detail: up or not). */
export class Events extends EventTarget {
  #failures = 0;
  #polling = 0;

  start() {
    const url = new URL(withToken("/api/v1/events"), location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    this.socket = socket;
    const used = token();
    socket.addEventListener("open", () => {
      this.#failures = 0;
      clearInterval(this.#polling);
      this.#polling = 0;
      this.#fire("link", true);
      this.#poll(); // the streams that are silent
    });
    socket.addEventListener("message", ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "status") this.#fire("status", message.status);
      else if (message.type === "event") this.#fire("event", message);
    });
    socket.addEventListener("close", () => {
      this.#fire("link", false);
      this.#polling ||= setInterval(() => this.#poll(), POLL_MS);
      const wait = used === token() ? BACKOFF_S[Math.min(this.#failures, BACKOFF_S.length - 1)] : 0;
      this.#failures += 1;
      setTimeout(() => this.start(), wait * 1000 * (0.8 + 0.4 * Math.random()));
    });
    return this;
  }

  /** Connect anew, with another token. */
  renew() {
    this.#failures = 0;
    this.socket?.close();
  }

  async #poll() {
    const streams = await call("GET", "/streams").catch(() => null);
    if (!streams) return;
    this.#fire("list", streams.map(({ name }) => name));
    for (const status of streams) this.#fire("status", status);
  }

  #fire(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
