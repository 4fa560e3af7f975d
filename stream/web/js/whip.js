/** Publish a MediaStream to any WHIP server.
 *
 *     const peer = publish(await navigator.mediaDevices.getUserMedia({ video: true }), "https://host/whip/cam");
 *     peer.addEventListener("state", ({ detail }) => console.log(detail.state));
 *     peer.close();
 */

import { Peer } from "./peer.js";

const MOST_PIXELS = 1280 * 720; // more would only cost bandwidth: the model's pictures are smaller
const BITRATE = 2_500_000;

/** `onchannel(channel)`, where given, gets the data channel named "timing" of every new session. */
export function publish(media, url, { onchannel, ...options } = {}) {
  const arrange = (pc) => {
    for (const track of media.getTracks()) {
      const encodings = track.kind === "video" ? [encoding(track)] : undefined;
      if (track.kind === "video") track.contentHint = "motion";
      const { sender } = pc.addTransceiver(track, { direction: "sendonly", streams: [media], sendEncodings: encodings });
      if (track.kind === "video") pc.addEventListener("connectionstatechange", () => keepPace(pc, sender));
    }
    if (onchannel) onchannel(pc.createDataChannel("timing", { ordered: false, maxRetransmits: 0 }));
  };
  return new Peer(url, { arrange, ...options }).start();
}

/** The camera of a running session changes without a new one. */
export async function replaceVideo(peer, track) {
  const sender = peer.pc?.getSenders().find(({ track: old }) => old?.kind === "video");
  track.contentHint = "motion";
  await sender?.replaceTrack(track);
}

function encoding(track) {
  const { width = 640, height = 360 } = track.getSettings();
  const scale = Math.sqrt((width * height) / MOST_PIXELS);
  return { maxBitrate: BITRATE, maxFramerate: 30, scaleResolutionDownBy: Math.max(1, scale) };
}

/** When the network or the processor is short of time: a smaller picture, not a later one. */
async function keepPace(pc, sender) {
  if (pc.connectionState !== "connected") return;
  const parameters = sender.getParameters();
  parameters.degradationPreference = "maintain-framerate";
  await sender.setParameters(parameters).catch(() => {}); // Firefox and Safari do without it
}
