/** How old a picture is when it is shown: the server's clock by ping-pong, its times by RTP timestamp. */

const PING_MS = 1000;
const SAMPLES = 30;
const KEPT = 120; // pictures, shown or told of, that still look for their other half
const TICKS_MS = 90; // RTP video ticks in a ms

/** The server's clock against `performance.now()`: the offset of the quickest of the last ping-pongs. */
export class Clock {
  #samples = [];

  add(asked, answered, remote) {
    this.#samples.push({ trip: answered - asked, offset: remote - (asked + answered) / 2 });
    if (this.#samples.length > SAMPLES) this.#samples.shift();
  }

  /** A time of the server's clock, ms, as this page's. NaN before the first pong. */
  local(remote) {
    const best = this.#samples.reduce((a, b) => (b.trip < a.trip ? b : a), { trip: Infinity, offset: NaN });
    return remote - best.offset;
  }
}

/**
 * A session's "timing" channel. We ask {ping: t}, the server answers {ping: t, now} and tells of some pictures when
 * they were captured and, to viewers, sent: {rtp, captured, sent}; ms of its clock. Fires "told" for each.
 */
export class Timing extends EventTarget {
  clock = new Clock();

  constructor(channel) {
    super();
    const ask = () => channel.readyState === "open" && channel.send(JSON.stringify({ ping: performance.now() }));
    channel.addEventListener("open", () => {
      for (let n = 0; n < 5; n += 1) setTimeout(ask, 60 * n);
      const timer = setInterval(ask, PING_MS);
      channel.addEventListener("close", () => clearInterval(timer));
    });
    channel.addEventListener("message", ({ data }) => this.#take(data));
  }

  #take(data) {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      return; // not ours
    }
    if ("ping" in message) this.clock.add(message.ping, performance.now(), message.now);
    else if ("rtp" in message) this.dispatchEvent(new CustomEvent("told", { detail: message }));
  }
}

/** A Map that forgets its oldest. */
function remember(map, key, value) {
  map.set(key, value);
  if (map.size > KEPT) map.delete(map.keys().next().value);
}

/**
 * From the server's capture of a picture to its being shown in a <video>, averaged over a second.
 * server: pixels in → packets out, both by the server's clock. down: packets out → on this screen.
 */
export class Downlink {
  #shown = new Map(); // rtp → this page's time
  #told = new Map(); // rtp → {captured, sent}
  #parts = [];
  #timing = null;

  constructor(video) {
    if (!("requestVideoFrameCallback" in video)) return;
    const shown = (_, { rtpTimestamp, expectedDisplayTime }) => {
      video.requestVideoFrameCallback(shown);
      if (rtpTimestamp === undefined) return;
      remember(this.#shown, rtpTimestamp, expectedDisplayTime);
      this.#match(rtpTimestamp);
    };
    video.requestVideoFrameCallback(shown);
  }

  set timing(timing) {
    this.#timing = timing;
    this.#shown.clear();
    this.#told.clear();
    timing.addEventListener("told", ({ detail }) => {
      remember(this.#told, detail.rtp >>> 0, detail);
      this.#match(detail.rtp >>> 0);
    });
  }

  #match(rtp) {
    const [shown, told] = [this.#shown.get(rtp), this.#told.get(rtp)];
    if (shown === undefined || told?.sent === undefined) return;
    this.#told.delete(rtp);
    const down = shown - this.#timing.clock.local(told.sent);
    if (Number.isFinite(down)) this.#parts.push({ server: told.sent - told.captured, down: Math.max(0, down) });
  }

  /** The time since the last call: {server, down} in ms, or null while nothing matched. */
  take() {
    const parts = this.#parts.splice(0);
    if (!parts.length) return null;
    const mean = (name) => parts.reduce((sum, part) => sum + part[name], 0) / parts.length;
    return { server: mean("server"), down: mean("down") };
  }
}

/**
 * From this page's camera to the server, ms: encoding and sending as the browser counts them, half a round trip, and what
 * pictures are later than the quickest of the last minute (RTP timestamps are the camera's clock). The camera itself is
 * not in it.
 */
export class Uplink {
  #before = null;
  #late = [];

  set timing(timing) {
    this.#before = null;
    this.#late = [];
    timing.addEventListener("told", ({ detail }) => {
      const late = timing.clock.local(detail.captured) - detail.rtp / TICKS_MS;
      if (Number.isFinite(late)) this.#late.push(late);
      if (this.#late.length > 300) this.#late.shift();
    });
  }

  async take(pc) {
    const reports = [...((await pc?.getStats().catch(() => null))?.values() ?? [])];
    const sent = reports.find(({ type, kind }) => type === "outbound-rtp" && kind === "video");
    const pair = reports.find(({ type, nominated }) => type === "candidate-pair" && nominated);
    const before = this.#before;
    this.#before = sent;
    if (!sent || !before || sent.framesEncoded <= before.framesEncoded) return null;
    const encode = (sent.totalEncodeTime - before.totalEncodeTime) / (sent.framesEncoded - before.framesEncoded);
    const packets = sent.packetsSent - before.packetsSent;
    const queue = packets > 0 ? ((sent.totalPacketSendDelay ?? 0) - (before.totalPacketSendDelay ?? 0)) / packets : 0;
    const recent = this.#late.slice(-5);
    const least = Math.min(...this.#late);
    const excess = recent.length ? recent.reduce((sum, late) => sum + late - least, 0) / recent.length : 0;
    const wrapped = excess > 60_000; // RTP timestamps begin anew after 13 hours
    if (wrapped) this.#late = recent;
    return 1000 * (encode + queue + (pair?.currentRoundTripTime ?? 0) / 2) + (wrapped ? 0 : excess);
  }
}
