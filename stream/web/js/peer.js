/** One WHIP (RFC 9725) or WHEP session kept alive: offer, answer, trickle, and a new one with back-off when it is lost. */

const NEVER_MIND = new Set([400, 401, 403, 405, 406, 413, 415, 422]); // asking again would not change the answer
const BACKOFF_S = [0.5, 1, 2, 4, 8, 10];
const GATHER_MS = 400; // host candidates are there in a few ms; whatever comes later is sent by PATCH
const CONNECT_MS = 8000; // from the answer to "connected"; then there is no way through
const GRACE_MS = 3000; // "disconnected" often heals by itself
const DELETE_MS = 2000; // for the server to take leave
const HEALTHY_MS = 10_000; // connected for so long: the back-off starts again

/**
 * Fires "state" with detail {state, error, retry_s}:
 * "connecting" | "connected" | "waiting" (for the next attempt, in retry_s) | "refused" (for good) | "closed".
 * `error` has message, hint, status; its status is "no-path" when signalling works and media does not (UDP is blocked).
 */
export class Peer extends EventTarget {
  #generation = 0;
  #timer = 0;
  #failures = 0;
  #resource = null;

  /** `arrange(pc)` adds tracks, transceivers and channels before each offer; `token()` is asked each time. */
  constructor(url, { arrange, token = () => "", iceServers = [] }) {
    super();
    Object.assign(this, { url: new URL(url, location.href), arrange, token, iceServers, pc: null, state: "closed" });
    this.again = () => this.state === "waiting" && this.#connect();
  }

  start() {
    addEventListener("online", this.again);
    this.#connect();
    return this;
  }

  /** Give this connection up and make another at once: what the caller saw was not healthy. */
  renew(message) {
    if (this.state === "connected") this.#lost(this.#generation, { message, hint: "" });
  }

  /** Resolves when the server has taken leave. */
  async close() {
    removeEventListener("online", this.again);
    const gone = this.#drop();
    this.#say("closed");
    await gone;
  }

  #say(state, error = null, retry_s = 0) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, error, retry_s } }));
  }

  /** End the present session; the server is told even while the page goes away. */
  #drop() {
    this.#generation += 1;
    clearTimeout(this.#timer);
    const [pc, resource] = [this.pc, this.#resource];
    this.pc = this.#resource = null;
    if (!resource) {
      pc?.close();
      return Promise.resolve();
    }
    const signal = AbortSignal.timeout(DELETE_MS);
    const gone = fetch(resource.url, { method: "DELETE", headers: this.#headers(), keepalive: true, signal });
    return gone.catch(() => {}).finally(() => pc.close()); // closed before, the server would not know the session any more
  }

  #headers(more = {}) {
    return this.token() ? { Authorization: `Bearer ${this.token()}`, ...more } : more;
  }

  async #connect() {
    const gone = this.#drop(); // a publisher's old session would stand in the way of its new one
    const mine = this.#generation;
    this.#say("connecting");
    await gone;
    if (mine !== this.#generation) return;
    const pc = new RTCPeerConnection({ iceServers: this.iceServers, bundlePolicy: "max-bundle" });
    this.pc = pc;
    pc.addEventListener("connectionstatechange", () => this.#follow(mine, pc.connectionState));
    try {
      this.arrange(pc);
      await this.#negotiate(mine, pc);
    } catch (error) {
      this.#lost(mine, error);
    }
  }

  async #negotiate(mine, pc) {
    const late = []; // candidates that were not in the offer
    await pc.setLocalDescription();
    await gathered(pc, GATHER_MS);
    const offered = pc.localDescription.sdp;
    pc.addEventListener("icecandidate", ({ candidate }) => {
      if (candidate?.candidate && !offered.includes(candidate.candidate)) {
        late.push(candidate);
        queueMicrotask(() => this.#trickle(late));
      }
    });
    const headers = this.#headers({ "Content-Type": "application/sdp" });
    const signal = AbortSignal.timeout(15_000);
    const response = await fetch(this.url, { method: "POST", headers, body: offered, signal }).catch(() => {
      throw refused(0, "the server does not answer", "It is tried again by itself.");
    });
    if (response.status !== 201) throw await fromResponse(response);
    const url = new URL(response.headers.get("Location") ?? "", response.url);
    const fragment = { ufrag: /a=ice-ufrag:(\S+)/.exec(offered)?.[1], pwd: /a=ice-pwd:(\S+)/.exec(offered)?.[1] };
    const resource = { url, etag: response.headers.get("ETag"), ...fragment };
    const servers = iceServersOf(response.headers.get("Link"));
    if (servers.length) this.iceServers = servers; // too late for this gathering; the next session has them
    const answer = await response.text();
    if (mine !== this.#generation) {
      fetch(url, { method: "DELETE", headers: this.#headers(), keepalive: true }).catch(() => {});
      return;
    }
    this.#resource = resource;
    await pc.setRemoteDescription({ type: "answer", sdp: answer });
    const transport = pc.getTransceivers()[0]?.receiver.transport;
    transport?.addEventListener("statechange", () => transport.state === "closed" && this.#follow(mine, "failed")); // they left
    this.#trickle(late);
    this.#timer = setTimeout(() => {
      const message = "The connection was answered, but no video gets through.";
      const hint = "A firewall seems to block UDP. A TURN server over TCP helps: `livestyle serve --help`, ice servers.";
      if (pc.connectionState !== "connected") this.#lost(mine, refused("no-path", message, hint));
    }, CONNECT_MS);
  }

  /** RFC 9725 §4.3.1; servers without trickle refuse it, and do not need it. */
  #trickle(late) {
    if (!this.#resource || !this.pc || !late.length) return;
    const { url, etag, ufrag, pwd } = this.#resource;
    const lines = late.splice(0).map(({ sdpMid, candidate }) => {
      const kind = this.pc.getTransceivers().find(({ mid }) => mid === sdpMid)?.receiver.track.kind ?? "application";
      return `m=${kind} 9 UDP/TLS/RTP/SAVPF 0\r\na=mid:${sdpMid}\r\na=${candidate}\r\n`;
    });
    const body = `a=ice-ufrag:${ufrag}\r\na=ice-pwd:${pwd}\r\n${lines.join("")}`;
    const headers = this.#headers({ "Content-Type": "application/trickle-ice-sdpfrag" });
    if (etag) headers["If-Match"] = etag;
    fetch(url, { method: "PATCH", headers, body }).catch(() => {});
  }

  #follow(mine, state) {
    if (mine !== this.#generation) return;
    const lost = () => this.#lost(mine, { message: "The connection was lost.", hint: "" });
    if (state === "connected") {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => (this.#failures = 0), HEALTHY_MS);
      if (this.state !== "connected") this.#say("connected");
    } else if (state === "disconnected") {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(lost, GRACE_MS);
    } else if (state === "failed") lost();
  }

  #lost(mine, error) {
    if (mine !== this.#generation) return;
    this.#drop();
    if (NEVER_MIND.has(error.status)) {
      this.#say("refused", error);
      return;
    }
    const planned = BACKOFF_S[Math.min(this.#failures, BACKOFF_S.length - 1)] * (0.8 + 0.4 * Math.random());
    const retry_s = Math.max(planned, error.retryAfter ?? 0);
    this.#failures += 1;
    this.#timer = setTimeout(this.again, retry_s * 1000);
    this.#say("waiting", error, retry_s);
  }
}

function refused(status, message, hint, retryAfter = 0) {
  return Object.assign(new Error(message), { status, hint, retryAfter });
}

async function fromResponse(response) {
  const text = await response.text();
  let body = {};
  try {
    body = JSON.parse(text);
  } catch {
    body = { error: text.slice(0, 200) };
  }
  const words = body.error || `the server answered ${response.status}`;
  return refused(response.status, words, body.hint ?? "", Number(response.headers.get("Retry-After")) || 0);
}

/** Resolves when gathering is complete, or after `most_ms`. */
function gathered(pc, most_ms) {
  return new Promise((resolve) => {
    const done = () => pc.iceGatheringState === "complete" && resolve();
    pc.addEventListener("icegatheringstatechange", done);
    setTimeout(resolve, most_ms);
    done();
  });
}

/** `Link: <turn:host>; rel="ice-server"; username="u"; credential="c"` → RTCIceServer[]. */
export function iceServersOf(link) {
  const servers = [];
  for (const [, urls, rest] of (link ?? "").matchAll(/<([^>]+)>((?:[^,"]|"[^"]*")*)/g)) {
    const pairs = [...rest.matchAll(/([\w-]+)=(?:"([^"]*)"|([^;\s]*))/g)];
    const parameters = Object.fromEntries(pairs.map(([, name, quoted, bare]) => [name, quoted ?? bare]));
    if (parameters.rel !== "ice-server") continue;
    const { username, credential } = parameters;
    servers.push(username ? { urls, username, credential } : { urls });
  }
  return servers;
}
