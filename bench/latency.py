"""What one session costs on each engine: rate, capture-to-sink latency, stages, and the share outside the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from accel.errors import UserError
from bench import load, record
from bench.latency_report import BLOCKS, Block, Lane, metrics, report
from models.params import Params
from stream.pump import start_pump
from stream.session import Session
from stream.sink import open_sink
from stream.source import open_source
from stream.worker import Worker

LOADED = (False, True, True, False)  # of two blocks, and the same again: the kinds lie alike in time
WARM_UP = 8  # frames of each engine that are not counted
PATIENCE = 600.0  # s for one block


def measure(
    source: str = "demo",
    model: str = "mini",
    engines: tuple[str, ...] = ("openvino", "torch"),
    size: tuple[int, int] = (512, 288),
    frames: int = 240,
    log: Callable[[str], None] = lambda line: None,
    *,
    settings: Sequence[str] = (),
    beside_load: bool = False,
) -> dict[str, Any]:
    """Run the same `frames` on every engine in one process, in interleaved blocks, and return a record.

    Rate and stages come from reading as fast as possible; latency from the same frames at the source's own rate, as
    from a camera, where a busy engine drops frames. The last engine is what `ratio` refers to. `beside_load`: as many
    blocks again with a busy process per core beside them. Raises UserError.
    """
    from models.load import load as load_model
    from models.structure import structure_of
    from stream.config import load_params

    if not engines or len(set(engines)) < len(engines):
        raise UserError(f"engines to compare: {', '.join(engines) or 'none'}", hint="name each engine once")
    params = load_params(sets=settings, model=model)
    started = record.start()
    opened = open_source(source, size=size)
    shape = (opened.spec.width, opened.spec.height)
    opened.close()
    lanes: dict[str, Lane] = {}
    per_block = max(2, -(-frames // BLOCKS))
    with ExitStack() as workers:
        for engine in engines:
            stylizer = load_model(model, shape, engine, log, structure=structure_of(params))
            worker = workers.enter_context(Worker(stylizer))
            lanes[engine] = Lane(worker, stylizer, dict(stylizer.info))
            _play(lanes[engine], source, size, WARM_UP, params, realtime=False)
        plan = [LOADED[i % len(LOADED)] for i in range(2 * BLOCKS)] if beside_load else [False] * BLOCKS
        for turn, loaded in enumerate(plan):
            log(f"block {turn + 1} of {len(plan)}{', beside a busy process per core' if loaded else ''}")
            for engine in engines if turn % 2 == 0 else engines[::-1]:
                lane = lanes[engine]
                with load.beside(load.cores()) if loaded else nullcontext():
                    block = _block(lane, source, size, per_block, params)
                (lane.beside_load if loaded else lane.blocks).append(block)
    work: dict[str, Any] = {**record.model_of(model), **record.source_of(source), "size": f"{shape[0]}x{shape[1]}"}
    work |= {"frames": per_block * BLOCKS, "settings": record.changed(params)}
    return record.record("latency", started, work, metrics(lanes), report(lanes, work))


def text(report: dict[str, Any]) -> str:
    """The tables of a report for a terminal, those of `bench.engines` too."""
    return "\n\n".join(_table(section) for section in report["sections"] if section["kind"] == "table")


def _table(section: dict[str, Any]) -> str:
    rows = [list(map(str, section["columns"]))]
    rows += [["–" if cell is None else str(cell) for cell in row] for row in section["rows"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([section["title"], *lines])


def _block(lane: Lane, source: str, size: tuple[int, int], frames: int, params: Params) -> Block:
    meter = _play(lane, source, size, frames, params, realtime=False).meter
    live = _play(lane, source, size, frames, params, realtime=True).meter
    return Block(meter.fps(), meter.samples()[1], live.samples()[0], live.frames_in, live.dropped)


def _play(lane: Lane, url: str, size: tuple[int, int], frames: int, params: Params, *, realtime: bool) -> Session:
    source = open_source(url, size=size, realtime=realtime)
    live = source.spec.live
    session = lane.worker.open(params, live)
    session.attach(open_sink("null", source.spec), lossless=not live)
    reader = start_pump(lambda: open_source(url, size=size), session, first=source, frames=frames)
    if not session.join(PATIENCE):
        session.stop()
        raise UserError(f"{lane.info.get('engine')}: {frames} frames took over {PATIENCE:.0f} s", hint="use --frames")
    reader.join()
    if session.error:
        raise session.error
    return session
