"""A lane of `bench.peers` in a process of its own: its own memory, its own threads, and its own `torch.cuda`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from accel.errors import UserError
from bench.peer_lanes import Image, Runner, Work

PATIENCE = 1800.0  # s for one answer: building full-size networks, or one block of frames


class Lane:
    """A child process that holds one runner; asked one thing at a time, it sleeps in between.

    >>> with Lane("livestyle", "openvino", work, images) as lane:
    ...     lane.ask("build")
    ...     times = lane.ask("run", 10)
    """

    def __init__(
        self, kind: str, form: str, work: Work, images: Sequence[Image], environment: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, kind, form, work, list(images), environment or {})
        self.process = context.Process(target=serve, args=arguments, daemon=True, name=f"{kind} {form}")
        self.process.start()
        theirs.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends the child, unless it is at work
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def ask(self, what: str, *arguments: Any) -> Any:
        """The answer of a method of `Child`; its UserError is raised here, anything else with its traceback."""
        try:
            self._connection.send((what, arguments))
            if not self._connection.poll(PATIENCE):
                raise UserError(f"{self.process.name}: no answer for {PATIENCE:.0f} s", hint="a smaller --size")
            answer, error = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as broken:
            self.process.join(5.0)
            raise UserError(
                f"{self.process.name}: its process died (exit status {self.process.exitcode})",
                hint="status -9 is most often too little memory: a smaller --size, or fewer engines and forms",
            ) from broken
        if isinstance(error, UserError):
            raise error
        if error:
            raise RuntimeError(f"{self.process.name}:\n{error}")
        return answer


class Child:
    """What a lane can be asked."""

    def __init__(self, kind: str, form: str, work: Work, images: list[Image]) -> None:
        self._kind, self._work, self._form, self._images = kind, work, form, images
        self._next = cycle(images)
        self._runner: Runner | None = None

    def build(self) -> dict[str, Any]:
        """Make the runner and let it run once."""
        started = time.perf_counter()
        lanes = import_module("bench.peer_lanes")
        self._runner = getattr(lanes, self._kind)(self._work, self._form)
        self._runner.step(self._images[0])
        found = self._runner
        load_s = time.perf_counter() - started
        return {"late": found.late, "versions": found.versions, "device": found.device, "load_s": load_s}

    def pictures(self, count: int) -> list[Image]:
        """What becomes of the first frames, in their order."""
        assert self._runner
        given = [self._images[i % len(self._images)] for i in range(count + self._runner.late)]
        found = [self._runner.step(image) for image in given][self._runner.late :]
        return [image for image in found if image is not None]

    def run(self, count: int) -> tuple[list[float], float, float]:
        """The times of so many more frames, one after the other, ms; the processors' time for all; memory held, MB."""
        assert self._runner
        self._runner.step(next(self._next))  # not counted: the caches are the last lane's
        times, computed = [], time.process_time()
        for _ in range(count):
            image = next(self._next)
            started = time.perf_counter()
            self._runner.step(image)
            times.append((time.perf_counter() - started) * 1e3)
        return times, (time.process_time() - computed) * 1e3, resident_mb()

    def peak(self) -> float:
        """The most memory that was ever held, building included, MB."""
        return peak_mb()

    def difference(self, count: int) -> dict[str, float]:
        """See `peer_lanes.difference`; another set of networks: ask when nothing is measured any more."""
        difference: dict[str, float] = import_module("bench.peer_lanes").difference(self._work, self._images[:count])
        return difference


def serve(
    connection: Connection, kind: str, form: str, work: Work, images: list[Image], environment: dict[str, str]
) -> None:
    """The child's whole life: libraries, then answers until the parent is gone."""
    os.environ.update(environment)
    warnings.simplefilter("ignore")  # of the peer's libraries, which are not the user's to mend
    from models.load import quiet_libraries

    quiet_libraries()
    if kind == "streamdiffusion":
        import_module("bench.peer_streamdiffusion").clocks_without_cuda()
        import_module("streamdiffusion")
    child = Child(kind, form, work, images)
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        except KeyboardInterrupt:
            return
        try:
            connection.send((getattr(child, what)(*arguments), None))
        except UserError as error:
            connection.send((None, error))
        except KeyboardInterrupt:
            return
        except Exception:  # noqa: BLE001 - whatever it is, the parent shows it
            connection.send((None, traceback.format_exc()))


def resident_mb() -> float:
    """Memory that this process holds in RAM, MB."""
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


def peak_mb() -> float:
    """The most this process has held in RAM, MB.

    Linux's getrusage would count the parent's pages up to exec, so its own counter is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 1024)
