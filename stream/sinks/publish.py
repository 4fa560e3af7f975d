"""RTMP, RTSP and SRT out: a process of its own encodes and sends, as the library stops a process while it connects."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from accel.errors import UserError
from stream import hardware
from stream.frame import Frame, VideoSpec
from stream.mailbox import Mailbox, MailboxClosed
from stream.sinks.first import FIRST_S, FirstConnection
from stream.sinks.publish_child import Target
from stream.sinks.wire import send
from stream.sound import Sound
from stream.source import HEALTHY_S, retry_delays
from stream.sources.network import public

CHILD = (sys.executable, "-m", "stream.sinks.publish_child")
HINT = "is the server running, and are host, port, path and key right?"
PATIENCE_S = 10.0  # for connecting; a process that takes no picture for a little longer is ended and replaced
LEAVE_S = 2.0  # how long a child may take to hang up
POLL_S = 0.25
SOUNDS = 100  # pieces, 2 s, that wait for the next picture


def check(url: str, codec: str, origin: str | None) -> None:
    """Raise UserError where the protocol's program is missing; connects nowhere."""
    if url.lower().startswith("srt://"):
        relay()


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> PublishSink:
    """Connect to `rtmp(s)://`, `rtsp(s)://` or `srt://`; raises UserError when the first connection fails."""
    sink = PublishSink(url, spec)
    sink.opened()
    return sink


def relay() -> str:
    """The system's ffmpeg with SRT, which the library's own build has not; raises UserError."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError("srt:// needs the program ffmpeg", hint="install ffmpeg, or publish to rtmp:// or rtsp://")
    listed = subprocess.run([program, "-hide_banner", "-protocols"], capture_output=True, text=True, check=False)
    if "srt" not in listed.stdout.split():
        raise UserError("this ffmpeg was built without SRT", hint="install one with libsrt, or publish to rtmp://")
    return program


class PublishSink:
    """Hands the newest picture to the publishing process, and replaces that process whenever it fails or dies.

    `write` never waits for the network: what does not fit is dropped and counted. `state` is for people: connecting,
    live, "retrying in 5 s: connection refused", closed. The size is constant; pictures of another get bars.
    """

    def __init__(
        self,
        url: str,
        spec: VideoSpec,
        *,
        delays: Callable[[], Iterator[float]] = retry_delays,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.written = 0
        self.warnings: list[str] = []
        self.state = "connecting"
        self.name = public(url)
        self.process: subprocess.Popen[bytes] | None = None
        program = relay() if url.lower().startswith("srt://") else None
        width, height = spec.width & ~1, spec.height & ~1
        self._target = Target(url, width, height, spec.fps, program, patience_s, hardware.chosen_encoder())
        self._delays, self._patience_s = delays, patience_s
        self._box = Mailbox[Frame](1)
        self._sounds = Mailbox[Sound](SOUNDS)
        self._closing = threading.Event()
        self._first = FirstConnection()
        self._was_live = False
        self._failure = ""
        self._sending: float | None = None  # since when the pipe has been taking one item
        self._thread = threading.Thread(target=self._run, name=f"publish-{self.name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Pictures that were replaced by newer ones."""
        return self._box.dropped

    def opened(self, timeout: float = FIRST_S) -> None:
        """Wait for the first connection; closes and raises UserError when it failed or takes longer."""
        try:
            self._first.check(self.name, HINT, timeout)
        except UserError:
            self.close()
            raise

    def write(self, frame: Frame) -> None:
        """Leave a picture for the publishing process; the newest wins."""
        since = self._sending
        if since is not None and time.monotonic() - since > self._patience_s + LEAVE_S:
            self._kill("no answer in time")
        self._box.put(frame)
        self.written += 1

    def hear(self, sound: Sound) -> None:
        """Take 20 ms of live sound, from any thread; without any the track is silent."""
        self._sounds.put(sound)

    def close(self) -> None:
        """Hang up; takes `LEAVE_S` and a little at most."""
        self._closing.set()
        self._box.close(discard=True)
        self._sounds.close(discard=True)
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():  # in a pipe that nobody empties
            self._kill("")
            self._thread.join(LEAVE_S)
        self.state = "closed"

    def _run(self) -> None:
        patience = self._delays()
        while not self._closing.is_set():
            self.state = "connecting"
            self._was_live, self._failure = False, ""
            began = time.monotonic()
            self._connection()
            why = self._failure or ("the publishing process died" if self._was_live else "no answer in time")
            self._first.failed(why)
            if self._was_live and time.monotonic() - began >= HEALTHY_S:
                patience = self._delays()
            delay = next(patience)
            self.state = f"retrying in {delay:.0f} s: {why}"
            self._closing.wait(delay)

    def _connection(self) -> None:
        """One child's life."""
        home = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        with subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        ) as child:
            self.process = child
            listener = threading.Thread(target=self._listen, args=(child,), daemon=True)
            listener.start()
            with suppress(OSError):  # it is gone; it has said why
                self._feed(child)
            self._sending = None
            assert child.stdin
            with suppress(OSError):
                child.stdin.close()
            try:
                child.wait(LEAVE_S / 2)
            except subprocess.TimeoutExpired:
                child.kill()
            listener.join()

    def _feed(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin
        child.stdin.write(self._target.line())
        child.stdin.flush()
        self._box.poll()  # from before the connection: too old
        while child.poll() is None:
            try:
                frame = self._box.get(POLL_S)
            except TimeoutError:
                continue
            except MailboxClosed:
                return
            self._sending = time.monotonic()
            while (sound := self._sounds.poll()) is not None:
                send(child.stdin, sound)
            send(child.stdin, frame)
            child.stdin.flush()
            self._sending = None

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        """What the child says, until it ends."""
        assert child.stdout
        for line in child.stdout:
            said = json.loads(line)
            if said["state"] == "failed":
                self._failure = said["why"]
            elif said["state"] == "live":
                self.state = "live"
                self._was_live = True
                self._first.made()

    def _kill(self, why: str) -> None:
        child = self.process
        if child and child.poll() is None:
            self._failure = self._failure or why
            child.kill()
