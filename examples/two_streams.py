"""Two clips through one model at once, in two styles: weights are shared, memory is not.

python examples/two_streams.py first.mp4 second.mp4
"""

import sys

from models.load import load
from models.params import Params, Style
from stream.pump import start_pump
from stream.sink import open_sink
from stream.source import open_source
from stream.worker import Worker

SIZE = (384, 216)

with Worker(load("mini", SIZE, log=print)) as worker:
    sessions = []
    for path, prompt in zip(sys.argv[1:3], ("ink", "stained glass"), strict=True):
        source = open_source(path, size=SIZE, fit="crop")
        session = worker.open(Params(style=Style(prompt=prompt)), live=False)
        session.attach(open_sink(f"{prompt.replace(' ', '-')}.mp4", source.spec), lossless=True)
        start_pump(lambda path=path: open_source(path, size=SIZE, fit="crop"), session, first=source)
        sessions.append(session)
    for session in sessions:
        session.join()
        print(session.meter.frames_out, "frames", session.error or "")
