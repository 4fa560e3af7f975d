/** Play from any WHEP server.
 *
 *     const peer = play("https://host/whep/cam", { onstream: (stream) => { video.srcObject = stream; } });
 *     peer.close();
 */

import { Peer } from "./peer.js";

const WATCH_MS = 1000;
const STALL_MS = 6000; // a live stream sends at least its slate; nothing for so long is a dead connection

/** `onstream(stream)` and `onchannel(channel)` are called for every new session. */
export function play(url, { onstream, onchannel, ...options }) {
  const arrange = (pc) => {
    const stream = new MediaStream();
    const video = pc.addTransceiver("video", { direction: "recvonly" });
    pc.addTransceiver("audio", { direction: "recvonly" });
    // Show each picture when it is there. Audio keeps its buffer: without one it crackles.
    if ("jitterBufferTarget" in video.receiver) video.receiver.jitterBufferTarget = 0;
    else if ("playoutDelayHint" in video.receiver) video.receiver.playoutDelayHint = 0;
    pc.addEventListener("track", ({ track }) => {
      stream.addTrack(track);
      onstream(stream);
    });
    if (onchannel) onchannel(pc.createDataChannel("timing", { ordered: false, maxRetransmits: 0 }));
  };
  const peer = new Peer(url, { arrange, ...options });
  watch(peer);
  return peer.start();
}

/** Renew a connection over which nothing arrives although it says that it is connected. */
function watch(peer) {
  let timer = 0;
  peer.addEventListener("state", ({ detail }) => {
    clearInterval(timer);
    if (detail.state !== "connected") return;
    let [packets, since] = [-1, performance.now()];
    timer = setInterval(async () => {
      const now = (await video(peer))?.packetsReceived ?? packets;
      if (now !== packets) [packets, since] = [now, performance.now()];
      else if (performance.now() - since > STALL_MS) peer.renew("The connection stands, but no picture comes.");
    }, WATCH_MS);
  });
}

/** The video receiver's `inbound-rtp` statistics, or undefined. */
export async function video(peer) {
  const reports = await peer.pc?.getStats().catch(() => null);
  return [...(reports?.values() ?? [])].find(({ type, kind }) => type === "inbound-rtp" && kind === "video");
}
