"""An RTSP camera by GStreamer with a clock in its picture: `/usr/bin/python3 tests/gst_rtsp.py [--port N] [--audio] …`.

Runs with the system's Python, whose GStreamer it uses; prints its URL once it serves. Ends with its input.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bench"))
from clockcode import luma, now_ms  # noqa: E402

# one slice per picture: rtph264pay would repeat the parameter sets between two
PICTURE = (
    "appsrc name=camera is-live=true do-timestamp=true format=time "
    "caps=video/x-raw,format=I420,width={width},height={height},framerate={fps}/1 ! "
    "x264enc tune=zerolatency speed-preset=ultrafast bitrate=2000 key-int-max={gop} threads=1 sliced-threads=false ! "
    "rtph264pay name=pay{number} pt=96 config-interval=-1"
)
RATE = 44_100
TONE = (
    "appsrc name=microphone is-live=true do-timestamp=true format=time "
    "caps=audio/x-raw,format=S16LE,layout=interleaved,rate=44100,channels=1 ! "
    "audioconvert ! avenc_aac ! rtpmp4gpay name=pay{number} pt=97"
)
BEEP = (b"\x00\x20" * 50 + b"\x00\xe0" * 50) * 20  # 441 Hz


class Camera:
    """Pushes pictures with the time in them, and a beep in every even second, to each client."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def configure(self, factory: GstRtspServer.RTSPMediaFactory, media: GstRtspServer.RTSPMedia) -> None:
        element = media.get_element()
        sources = element.get_by_name("camera"), element.get_by_name("microphone")
        threading.Thread(target=self.shoot, args=sources, daemon=True).start()

    def shoot(self, camera: Gst.Element | None, microphone: Gst.Element | None) -> None:
        width, height, fps = self.options.width, self.options.height, self.options.fps
        chroma = b"\x80" * (width * height // 2)
        due = time.monotonic()
        count = 0
        while self.options.mute_after < 0 or count < self.options.mute_after or microphone:
            now = now_ms()
            muted = 0 <= self.options.mute_after <= count
            if camera and not muted and not push(camera, luma(width, height, now) + chroma):
                return
            if microphone:
                size = 2 * RATE // fps
                if not push(microphone, (BEEP if now // 1000 % 2 == 0 else bytes(len(BEEP)))[:size]):
                    return
            count += 1
            due += 1 / fps
            time.sleep(max(0.0, due - time.monotonic()))


def push(source: Gst.Element, data: bytes) -> bool:
    """Whether the client is still there."""
    buffer = Gst.Buffer.new_allocate(None, len(data), None)
    buffer.fill(0, data)
    return source.emit("push-buffer", buffer) == Gst.FlowReturn.OK


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--audio", action="store_true")
    parser.add_argument("--no-video", action="store_true")
    parser.add_argument("--gop", type=int, default=30)
    parser.add_argument("--mute-after", type=int, default=-1, help="pictures after which nothing more comes")
    parser.add_argument("--udp", action="store_true", help="refuse TCP")
    options = parser.parse_args()
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=str(options.port))
    factory = GstRtspServer.RTSPMediaFactory()
    parts = [] if options.no_video else [PICTURE]
    parts += [TONE] if options.audio else []
    launch = " ".join(part.replace("{number}", str(number)) for number, part in enumerate(parts))
    factory.set_launch(f"( {launch.format(**vars(options))} )")
    if options.udp:
        factory.set_protocols(GstRtsp.RTSPLowerTrans.UDP)
    camera = Camera(options)
    factory.connect("media-configure", camera.configure)
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)
    loop = GLib.MainLoop()
    print(f"rtsp://127.0.0.1:{server.get_bound_port()}/camera", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main()
