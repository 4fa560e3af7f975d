// Publishes numbered pictures to a WHIP endpoint with whip-whep (medooze) on libwebrtc, then ends the session.
//     node send.mjs URL PICTURES [TOKEN]
import wrtc from "@roamhq/wrtc";
import { WHIPClient } from "whip-whep/whip.js";

const [url, wanted, token] = process.argv.slice(2);
const BITS = 12, WIDTH = 320, HEIGHT = 240, FPS = 15;

const source = new wrtc.nonstandard.RTCVideoSource();
const track = source.createTrack();
const pc = new wrtc.RTCPeerConnection();
pc.addTransceiver(track, { direction: "sendonly", streams: [new wrtc.MediaStream([track])] });
const client = new WHIPClient();

function picture(number) {
  const data = new Uint8ClampedArray((WIDTH * HEIGHT * 3) / 2).fill(128);
  for (let y = 0; y < HEIGHT / 2; y++)
    for (let x = 0; x < WIDTH; x++)
      data[y * WIDTH + x] = (number >> Math.floor((x * BITS) / WIDTH)) & 1 ? 235 : 16;
  return { width: WIDTH, height: HEIGHT, data };
}

await client.publish(pc, url, token);
let number = 0;
const timer = setInterval(async () => {
  source.onFrame(picture(number));
  if (pc.connectionState !== "connected" || ++number < Number(wanted)) return;
  clearInterval(timer);
  await client.stop();
  process.exit(0);
}, 1000 / FPS);
