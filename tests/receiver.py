"""A media server of one connection, in a process of its own: `python -m tests.receiver URL`.

Prints what it takes in, a line of JSON each: {"listening"}, {"picture", "key", "colour", "sound"}, {"ended"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import av
import numpy as np

av.logging.set_level(None)

WAIT_S = "20"


def listen(url: str) -> Any:
    """Open `url` as a server and wait for a publisher."""
    if url.startswith("rtmp"):
        return av.open(url, options={"listen": "1", "analyzeduration": "500000"}, timeout=(20, 20))
    if url.startswith("rtsp"):
        return av.open(url, options={"rtsp_flags": "listen", "listen_timeout": WAIT_S}, timeout=(20, 20))
    command = ["ffmpeg", "-loglevel", "quiet", "-f", "data", "-i", f"{url}?mode=listener"]
    relay = subprocess.Popen([*command, "-map", "0", "-c", "copy", "-f", "data", "pipe:1"], stdout=subprocess.PIPE)
    assert relay.stdout
    return av.open(relay.stdout, format="mpegts", options={"probesize": "65536"})


def main(url: str) -> None:
    tell(listening=url)
    sound = 0
    with listen(url) as container:
        count = 0
        try:
            for packet in container.demux():
                if packet.stream.type == "audio":
                    sound += sum(float(np.abs(frame.to_ndarray()).max()) > 0.05 for frame in packet.decode())
                    continue
                for frame in packet.decode():
                    colour = frame.to_ndarray(format="rgb24")[::8, ::8].reshape(-1, 3).mean(axis=0)
                    tell(picture=count, key=frame.key_frame, colour=[round(float(c)) for c in colour], sound=sound,
                         size=[frame.width, frame.height], tracks=[s.type for s in container.streams])  # fmt: skip
                    count += 1
        except av.FFmpegError as error:
            tell(broken=str(error))
    tell(ended=count)


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
