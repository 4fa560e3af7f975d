"""FFmpeg's own WHIP muxer, in a process of its own: PyAV holds the GIL while it connects.

python -m tests.whip_ffmpeg URL CERT KEY SECONDS
"""

from __future__ import annotations

import sys
import time
from typing import Any

import av

from tests.whip_client import numbered

FPS = 15


def main(url: str, cert: str, key: str, seconds: float) -> None:
    """Publish numbered pictures as H.264, then hang up in order."""
    options = {"whip_flags": "dtls_active", "cert_file": cert, "key_file": key}
    output: Any = av.open(url, "w", format="whip", options=options)
    stream = output.add_stream("libx264", rate=FPS)
    stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
    stream.codec_context.gop_size = FPS
    stream.options = {"preset": "ultrafast", "tune": "zerolatency", "profile": "baseline", "bf": "0"}
    started = time.monotonic()
    for number in range(round(seconds * FPS)):
        time.sleep(max(0.0, started + number / FPS - time.monotonic()))
        frame = av.VideoFrame.from_ndarray(numbered(number), "rgb24")
        frame.pts = number
        output.mux(stream.encode(frame))
        if number == 0:
            print("connected", flush=True)
    output.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
