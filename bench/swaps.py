"""What a change of settings costs a stream that is running: frames lost, the longest gap, engines built."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from accel.errors import UserError
from bench import record
from stream.config import load_params
from stream.frame import Frame
from stream.hub import Hub, LiveSettings
from stream.live import Stream
from stream.mailbox import Mailbox
from stream.source import Size, Source, open_source

READY_S = 600.0  # for engines to be compiled
ROOM = 10_000  # frames kept for looking at
BUILT = "engines built"


def measure(
    source: str,
    model: str,
    engine: str,
    size: Size,
    changes: Sequence[str],
    seconds: float = 3.0,
    settings: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Play `source` as a camera through a server's stream, make each KEY=VALUE change, and return a record.

    Of the `seconds` before and after each change: frames that came in and did not come out, and the longest time
    between two that did. Raises UserError, for a change that is refused as well.
    """
    if not changes:
        raise UserError("nothing to change", hint='--change style.prompt=ink --change "style.lora=ink.safetensors:0.5"')
    started, built = record.start(), []

    def load(*arguments: Any, **more: Any) -> Any:
        from models.load import load

        built.append(time.monotonic())
        return load(*arguments, **more)

    params = load_params(sets=settings, model=model)
    hub = Hub(LiveSettings(model=model, engine=engine, box=size, params=params), load=load)
    try:
        stream = hub.open("swaps")
        stream.feed(partial(_opened, source), source, retry=True)
        frames = stream.outlets.subscribe(ROOM)
        _wait(stream)
        rows = []
        for change in changes:
            rows.append(_changed(stream, frames, change, seconds, built))
            log(f"{change}: {rows[-1]['lost']:.0f} lost, {rows[-1]['gap_after_ms']:.0f} ms at most between two")
    finally:
        hub.close()
    return record.record("swaps", started, _work(source, model, engine, size, changes, settings), {}, _report(rows))


def _opened(source: str, size: Size | None, fit: str) -> Source:
    return open_source(source, size=size, fit=fit, realtime=True)


def _wait(stream: Stream) -> None:
    """Until pictures have come out for a second; UserError where they never do."""
    began = time.monotonic()
    while stream.phase != "live" or stream.meter.frames_out < 2 * stream.fps:
        if stream.error or time.monotonic() - began > READY_S:
            raise UserError(f"no picture: {stream.error or stream.words()}", hint="does `livestyle run` show one?")
        time.sleep(0.05)


def _changed(stream: Stream, frames: Mailbox[Frame], change: str, seconds: float, built: list[float]) -> dict[str, Any]:
    """One change of settings in a running stream."""
    key, _, value = change.partition("=")
    builds = len(built)

    def patch() -> float:
        began = time.monotonic()
        stream.patch({key.strip(): value.strip()})
        return 1000 * (time.monotonic() - began)

    before = _watched(stream, frames, seconds)
    with ThreadPoolExecutor(1) as server:  # as a request to the server would
        patching = server.submit(patch)
        after = _watched(stream, frames, seconds)
        took = patching.result()
    return {
        "change": bare(change),
        "patch_ms": took,
        "lost_before": before[0],
        "lost": after[0],
        "gap_before_ms": before[1],
        "gap_after_ms": after[1],
        BUILT: len(built) - builds,
    }


def _watched(stream: Stream, frames: Mailbox[Frame], seconds: float) -> tuple[int, float]:
    """Frames dropped in so many seconds, and the longest time from now to one that came out, or between two, ms."""
    dropped, end, gaps = stream.meter.dropped, time.monotonic() + seconds, [0.0]
    last = time.monotonic()
    while (now := time.monotonic()) < end:
        try:
            frames.get(end - now)
        except TimeoutError:
            break
        last, gap = time.monotonic(), time.monotonic() - last
        gaps.append(1000 * gap)
    return stream.meter.dropped - dropped, max(gaps)


def bare(setting: str) -> str:
    """A setting with the files that it names, but not where they are."""
    return re.sub(r"[^\s,=:]*/", "", setting)


def _work(
    source: str, model: str, engine: str, size: Size, changes: Sequence[str], settings: Sequence[str]
) -> dict[str, Any]:
    return {
        **record.source_of(source),
        **record.model_of(model),
        "engine": engine,
        "size": list(size),
        "changes": [bare(change) for change in changes],
        "settings": [bare(setting) for setting in settings],
    }


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ["change", "taken in, ms", "lost before", "lost after", "longest gap before, ms", "after", BUILT]
    table = [[round(value, 1) if isinstance(value, float) else value for value in row.values()] for row in rows]
    return {
        "title": "Changes of settings while frames run",
        "summary": "A recording as a camera through a server's stream; the same time before and after each change.",
        "rows": rows,
        "sections": [{"title": "Changes", "kind": "table", "columns": columns, "rows": table}],
    }
