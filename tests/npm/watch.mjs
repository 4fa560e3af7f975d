// Watches a WHEP endpoint with whip-whep (medooze) on libwebrtc and tells of each picture: its size and the number in it.
//     node watch.mjs URL PICTURES [TOKEN]
import wrtc from "@roamhq/wrtc";
import { WHEPClient } from "whip-whep/whep.js";

const [url, wanted, token] = process.argv.slice(2);
const BITS = 12;

const pc = new wrtc.RTCPeerConnection();
pc.addTransceiver("audio", { direction: "recvonly" });
pc.addTransceiver("video", { direction: "recvonly" });
const client = new WHEPClient();
let seen = 0;

pc.ontrack = ({ track }) => {
  if (track.kind !== "video") return;
  const sink = new wrtc.nonstandard.RTCVideoSink(track);
  sink.onframe = async ({ frame }) => {
    let number = 0;
    for (let bit = 0; bit < BITS; bit++) {
      const x = Math.floor((frame.width * (bit + 0.5)) / BITS);
      number |= (frame.data[Math.floor(frame.height / 4) * frame.width + x] > 127) << bit;
    }
    console.log(JSON.stringify({ width: frame.width, height: frame.height, number }));
    if (++seen < Number(wanted)) return;
    sink.onframe = null;
    const session = client.resourceURL;
    sink.stop();
    await client.stop();
    const again = await fetch(session, { method: "DELETE" });
    console.log(JSON.stringify({ again: again.status }));
    process.exit(0);
  };
};

await client.view(pc, url, token);
