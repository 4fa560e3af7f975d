"""The command line: `livestyle`. The one place where everything is put together."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accel.errors import UserError
from accel.machine import limit_arenas

if TYPE_CHECKING:
    from stream.run import Job, Outcome

INTERRUPTED = 130
DEMO_FILE = "livestyle-demo.mp4"
DEMO_FRAMES = 420
DEMO_PROMPTS = ("oil painting", "watercolour", "ukiyo-e", "pencil drawing", "neon", "stained glass", "comic book")

CommandError: Any = typer.BadParameter.__mro__[2]  # ClickException: newer typers carry their own click

# Two lines for the user's errors, a plain traceback for ours: no boxes around either.
_plain: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(help="Live video stylization.", **_plain)
engines_app = typer.Typer(help="Compiled engines kept on this machine.", **_plain)
bench_app = typer.Typer(help="Measure what this machine does.", **_plain)
app.add_typer(engines_app, name="engines")
app.add_typer(bench_app, name="bench")

To = Annotated[
    list[str] | None,
    typer.Option(
        "--to", metavar="SINK", help="a file, window, virtualcam, rtmp://…, rtsp://…, srt://…, whip+https://… or null"
    ),
]
Model = Annotated[str, typer.Option(help="see `livestyle models`")]
Engine = Annotated[str, typer.Option(help="auto, openvino, torch, torch-cuda, tensorrt or null")]
Size = Annotated[str, typer.Option(metavar="WxH", help="box the picture is fitted into, pixels")]
Decode = Annotated[str | None, typer.Option(metavar="D", help="decode on: auto, software, or a device such as cuda")]
Encoder = Annotated[str | None, typer.Option(metavar="E", help="encode H.264 by: auto, x264 or nvenc")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="F", help="write the report as JSON")]
HtmlFile = Annotated[Path | None, typer.Option("--html", metavar="F", help="write the report as a page")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no status, no notes")]


def _version(asked: bool) -> None:
    if asked:
        print(f"livestyle {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Live video stylization: any source to any sink."""


@app.command()
def demo(
    to: To = None,
    frames: Annotated[int, typer.Option(min=1, help="how many")] = DEMO_FRAMES,
    engine: Engine = "auto",
    quiet: Quiet = False,
) -> None:
    """A built-in moving picture through several styles; needs no camera, weights or network."""
    from stream.run import Job, is_file

    sinks = tuple(to or [DEMO_FILE])
    watched = not any(is_file(sink) or sink == "null" for sink in sinks)
    job = Job("demo", sinks, engine=engine, frames=frames, realtime=watched, quiet=quiet, tour=DEMO_PROMPTS)
    outcome = _run(job)
    print(f"{', '.join(sinks)}: {outcome.stats['frames_out']} frames, {outcome.stats['fps']:.1f} fps")


@app.command()
def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a file, camera[:N], screen[:N], rtsp://…, demo or test")
    ],
    to: To = None,
    model: Model = "mini",
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="what it should look like")] = None,
    engine: Engine = "auto",
    size: Size = "512x288",
    preset: Annotated[str | None, typer.Option(help="fast or quality")] = None,
    config: Annotated[Path | None, typer.Option(metavar="F.toml", help="settings file")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="stop after so many")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="play a file at its own rate, as if live")] = False,
    stats: Annotated[Path | None, typer.Option(metavar="F.json", help="write measurements")] = None,
    fit: Annotated[str | None, typer.Option(help="fit, crop or stretch")] = None,
    decode: Decode = None,
    encoder: Encoder = None,
    quiet: Quiet = False,
) -> None:
    """Stylize SOURCE into every SINK."""
    from models.recipe import remark
    from stream.config import load_params, parse_size
    from stream.run import Job, default_sink

    flags = {key: value for key, value in (("style.prompt", prompt), ("frame.fit", fit)) if value is not None}
    params = load_params(preset, config, set_ or (), flags, model)
    box, note = parse_size(size)
    notes = [line for line in (note, remark(model)) if line]
    if not to:
        to = [default_sink(source, params.sink.codec)]
        notes.append(f"no --to given: writing to {to[0]}")
    job = Job(
        *(source, tuple(to), params, model, engine, box, frames, realtime, stats, quiet),
        notes=tuple(notes),
        decode=decode or "auto",
        encoder=encoder or "auto",
    )
    outcome = _run(job)
    if not quiet:
        done = "interrupted after" if outcome.interrupted else "done:"
        counts = f"{outcome.stats['frames_out']} frames, {outcome.stats['fps']:.1f} fps"
        print(f"{done} {counts}, {outcome.stats['dropped']} dropped → {', '.join(job.sinks)}", file=sys.stderr)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on; 0.0.0.0 is the whole network")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8787 unless given")] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LIVESTYLE_TOKEN", metavar="[SCOPE=]TOKEN", help="for all, or for publish, view or control"
        ),
    ] = None,
    stream: Annotated[list[str] | None, typer.Option(metavar="NAME=SOURCE", help="a stream to begin with")] = None,
    model: Annotated[str | None, typer.Option(help="see `livestyle models`")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="what it should look like")] = None,
    engine: Annotated[str | None, typer.Option(help="as for `livestyle run`")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=16, help="streams whose frames share a launch; 4 on a GPU, else 1")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="box the pictures are fitted into, pixels")] = None,
    preset: Annotated[str | None, typer.Option(help="fast or quality")] = None,
    config: Annotated[Path | None, typer.Option(metavar="F.toml", help="settings file, with a table [server]")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    allow_source: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="that clients may name; also camera, screen")
    ] = None,
    allow_output: Annotated[list[str] | None, typer.Option(metavar="HOST", help="that clients may send to")] = None,
    recordings: Annotated[Path | None, typer.Option(metavar="FOLDER", help="where recordings go")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="F.pem", help="certificate, for HTTPS")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="F.pem", help="its key")] = None,
    public_ip: Annotated[str | None, typer.Option(metavar="IP", help="address that others see, for WebRTC")] = None,
    udp_ports: Annotated[str | None, typer.Option(metavar="A-B", help="UDP ports for WebRTC")] = None,
    ice_server: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT")
    ] = None,
    decode: Decode = None,
    encoder: Encoder = None,
    osc: Annotated[int | None, typer.Option(metavar="PORT", min=0, max=65535, help="listen for OSC")] = None,
    open_: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """The page, WHIP in, WHEP out, a control API and metrics, until Ctrl-C."""
    from stream.config import load_params, parse_size
    from stream.server import config as server
    from stream.server.serve import serve as run_server

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "live.model": model,
        "live.engine": engine,
        "live.batch": batch,
        "live.decode": decode,
        "live.encoder": encoder,
        "live.box": parse_size(size)[0] if size else None,
        "recordings": recordings,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "public_ip": public_ip,
        "udp_ports": server.ports_of(udp_ports),
        "ice_servers": [server.ice_server_of(text) for text in ice_server] if ice_server else None,
        "osc_port": osc,
        **server.tokens_of(token or ()),
        **{f"streams.{name}": source for name, source in server.pairs_of(stream or (), "--stream").items()},
    }
    settings = server.allowed(server.load_server_settings(config, flags), allow_source or (), allow_output or ())
    prompted = {} if prompt is None else {"style.prompt": prompt}
    params = load_params(preset, config, set_ or (), prompted, settings.live.model)
    raise typer.Exit(run_server(settings, params, browser=open_))


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="see `livestyle models`")],
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="your own SD 1.5 checkpoint under it: a folder or .safetensors")
    ] = None,
) -> None:
    """Bring a model's files from the hub and check them; goes on where it stopped."""
    from models.weights import fetch_shown

    print(fetch_shown(model, base))


@app.command()
def models(as_json: Json = False) -> None:
    """What can run here."""
    from models.addons import addons
    from models.spec import available

    rows, more = available(), addons()
    if as_json:
        _print_json([*rows, *more])
        return
    for row in rows:
        state = "ready" if row["ready"] else "not here"
        print(f"{row['name']:16} {state:9} {row['megabytes']:>7} MB  {row['licence']}  {row['about']}")
        if row["styles"]:
            print(f"{'':16} styles: {', '.join(row['styles'])}")
    for row in more:
        state = "ready" if row["ready"] else "not here"
        print(f"{row['name']:24} {state:9} {row['megabytes']:>7} MB  {row['licence']}  {row['about']}")


@app.command()
def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="see `livestyle models`")] = "mini",
    engine: Engine = "auto",
    size: Size = "512x288",
    target: Annotated[
        str | None, typer.Option(metavar="SM", help="TensorRT for another machine's card: sm_75, sm_86, sm_89, sm_120")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="fast or quality")] = None,
    config: Annotated[Path | None, typer.Option(metavar="F.toml", help="settings file")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    batch: Annotated[int, typer.Option(min=1, max=16, help="also for so many streams' frames in a launch")] = 1,
) -> None:
    """Make a model's engines ahead of its first run, with what the settings need."""
    from models.build import build as build_engines
    from models.structure import structure_of
    from stream.config import load_params, parse_size

    box, note = parse_size(size)
    if note:
        _say(note)
    params = load_params(preset, config, set_ or (), model=model)
    build_engines(model, box, engine, target, _say, structure_of(params), batch)
    print(f"{model} at {box[0]}x{box[1]}: engines are ready{f' for {target}' if target else ''}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Devices, engines, codecs, cameras; a hint for each thing missing."""
    from stream.doctor import examine

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
        return
    for finding in findings:
        hint = "" if finding.ok or not finding.hint else f"  → {finding.hint}"
        print(f"{'✓' if finding.ok else '·'} {finding.topic:24} {finding.found}{hint}")


@engines_app.command("list")
def engines_list(as_json: Json = False) -> None:
    """Every stored engine, most recently used first."""
    from accel import cache

    _print_engines(cache.entries(cache.default_root()), as_json)


@engines_app.command("verify")
def engines_verify(as_json: Json = False) -> None:
    """Check every stored engine's checksum; exit status 1 when one is damaged."""
    from accel import cache

    entries = cache.verify(cache.default_root())
    _print_engines(entries, as_json)
    if any(entry.problem for entry in entries):
        raise typer.Exit(1)


@engines_app.command("prune")
def engines_prune(
    max_mb: Annotated[int, typer.Option(min=0, help="what the rest may take, MB")] = 2048, as_json: Json = False
) -> None:
    """Drop the least recently used engines until the rest fit."""
    from accel import cache

    _print_engines(cache.prune(cache.default_root(), max_mb << 20), as_json, "dropped ")


@bench_app.command("latency")
def bench_latency(
    source: Annotated[str, typer.Option(help="a file, demo or test")] = "demo",
    model: Model = "mini",
    engine: Annotated[list[str] | None, typer.Option(help="which to compare")] = None,
    size: Size = "512x288",
    frames: Annotated[int, typer.Option(min=1, help="per engine")] = 240,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    beside_load: Annotated[bool, typer.Option("--beside-load", help="again, with every core kept busy")] = False,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """One session on several engines in turn: fps, latency, stages."""
    from bench import latency
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    engines, box = tuple(engine or ("openvino", "torch")), parse_size(size)[0]
    report = latency.measure(source, model, engines, box, frames, _say, settings=set_ or (), beside_load=beside_load)
    _publish(report, json_file, html_file)


@bench_app.command("engines")
def bench_engines(
    model: Model = "mini",
    engine: Annotated[list[str] | None, typer.Option(help="which to compare; all that run here")] = None,
    size: Size = "512x288",
    launches: Annotated[int, typer.Option(min=1, help="of every network")] = 30,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Every network of a model on every engine of this machine: time, and difference from the reference."""
    from bench.networks import measure_model
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    report = measure_model(model, parse_size(size)[0], tuple(engine or ()), launches, _say)
    _publish(report, json_file, html_file)


@bench_app.command("scale")
def bench_scale(
    source: Annotated[str, typer.Option(help="what the cameras see")] = "demo",
    model: Model = "mini",
    engine: Engine = "auto",
    size: Size = "512x288",
    sessions: Annotated[str, typer.Option(metavar="N,N…", help="how many at once")] = "1,2,4",
    seconds: Annotated[float, typer.Option(min=0.2, help="of each number")] = 10.0,
    fps: Annotated[float, typer.Option(min=1, max=1000, help="of each camera; more than can be painted")] = 240.0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    batch: Annotated[int, typer.Option(min=1, max=16, help="frames in a shared launch; 1 = none is shared")] = 4,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Live streams side by side through one worker, also sharing launches: fps of each and of all, latency, memory."""
    from bench import scale
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    counts, box = scale.counts_of(sessions), parse_size(size)[0]
    report = scale.measure(source, model, engine, box, counts, seconds, fps, set_ or (), _say, batch)
    _publish(report, json_file, html_file)


@bench_app.command("compare")
def bench_compare(
    files: Annotated[list[Path], typer.Argument(metavar="A.json B.json…", help="what --json wrote")],
    lane: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="of A, then of B, where they are named differently")
    ] = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Two results of the same work: every ratio with its spread; A B A B where runs took turns."""
    from bench.compare import compare

    _check_reports(json_file, html_file)
    report = compare(files, lane or ())
    for note in report["notes"]:
        _say(note)
    _publish(report, json_file, html_file)


@bench_app.command("tables")
def bench_tables(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit status 1 where they differ")] = False,
) -> None:
    """Of a checkout: write the tables of README.md and docs from bench/results."""
    from bench import tables

    for path in (changed := tables.renew(write=not check)):
        print(f"{'differs' if check else 'written'}: {path}")
    if check and changed:
        raise typer.Exit(1)


@bench_app.command("transport")
def bench_transport(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="what the camera sees")] = "demo",
    model: Model = "mini",
    engine: Engine = "auto",
    size: Size = "640x360",
    fps: Annotated[float, typer.Option(min=1, max=120, help="of the camera")] = 30.0,
    seconds: Annotated[float, typer.Option(min=1, help="to measure")] = 20.0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Glass to glass: publish by WHIP, watch by WHEP, and read the time out of the pictures."""
    from bench import transport
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    box = parse_size(size)[0]
    report = transport.measure(source, model, engine, box, fps, seconds, tuple(set_ or ()), _say)
    _publish(report, json_file, html_file)


@bench_app.command("swaps")
def bench_swaps(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="what the camera sees")] = "demo",
    model: Model = "mini",
    engine: Engine = "auto",
    size: Size = "512x288",
    change: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="made one after the other")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="before and after each")] = 3.0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting")] = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Change settings while frames run: frames lost, the longest gap, engines built."""
    from bench import swaps
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    report = swaps.measure(source, model, engine, parse_size(size)[0], change or (), seconds, set_ or (), _say)
    _publish(report, json_file, html_file)


@bench_app.command("peers")
def bench_peers(
    source: Annotated[str, typer.Option(help="a file, demo or test")] = "demo",
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Stable Diffusion 1 or 2 with TAESD; small and random unless given")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="ours; the best one here and torch unless given")] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="of the peer, beside float32: bfloat16, float16, tuned or compiled")
    ] = None,
    size: Size = "256x256",
    steps: Annotated[int, typer.Option(min=1, max=8, help="denoising steps")] = 1,
    strength: Annotated[float, typer.Option(min=0.02, max=1, help="how far from the source's picture")] = 0.5,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="what it should look like")] = "oil painting",
    frames: Annotated[int, typer.Option(min=1, help="of each")] = 40,
    batch: Annotated[bool, typer.Option("--batch", help="ours in a stream batch too")] = False,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Beside StreamDiffusion: the same networks, pictures, steps and noise; rate, times, memory, difference."""
    from bench import peers
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    chosen, box = (tuple(engine or ()), tuple(form or ())), parse_size(size)[0]
    report = peers.measure(source, model, *chosen, box, steps, strength, prompt, frames, batch, _say)
    _publish(report, json_file, html_file)


@bench_app.command("temporal")
def bench_temporal(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE…", help="clips; demo where none is given")
    ] = None,
    model: Model = "mini",
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="what it should look like")] = "oil painting",
    engine: Engine = "auto",
    size: Size = "512x288",
    frames: Annotated[int, typer.Option(min=2, help="of each clip")] = 96,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> None:
    """How steady the picture is: the refiner against flicker, late keys against diffusing every frame."""
    from bench import temporal
    from stream.config import parse_size

    _check_reports(json_file, html_file)
    box = parse_size(size)[0]
    report = temporal.measure(tuple(sources or ["demo"]), model, engine, box, frames, prompt, _say)
    _publish(report, json_file, html_file)


def version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return metadata.version("livestyle")
    except metadata.PackageNotFoundError:
        return "0.0.0 (source tree)"


def main(argv: Sequence[str] | None = None) -> int:
    """The `livestyle` command; returns the exit status. A bug leaves as a traceback, exit status 1."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    limit_arenas()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = app(args=arguments or ["--help"], prog_name="livestyle", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except UserError as error:
        return _complain(error.message, error.hint or "see `livestyle doctor`")
    except CommandError as error:
        return _complain(error.format_message(), "see `livestyle --help`")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _complain(message: str, hint: str) -> int:
    for kind, text in (("error", message), ("hint", hint)):
        print(f"{kind}: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _run(job: Job) -> Outcome:
    from stream import run as runner

    outcome: Outcome = runner.run(job, (lambda text: None) if job.quiet else _say)
    return outcome


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _print_engines(entries: Sequence[Any], as_json: bool, prefix: str = "") -> None:
    if as_json:
        _print_json([asdict(entry) for entry in entries])
        return
    for e in entries:
        backend = e.backend.partition(" ")[0]  # its fingerprint begins with its name
        print(f"{prefix}{e.digest}  {backend:12} {e.name:14} {e.size / 2**20:8.1f} MB  {e.problem or 'sound'}")
    if not entries:
        print("none")


def _check_reports(*paths: Path | None) -> None:
    from stream.run import check_report

    for path in paths:
        if path:
            check_report(path)


def _publish(report: dict[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    from bench.latency import text

    print(text(report))
    if json_file:
        from bench.record import write

        write(json_file, report)
    if html_file:
        from bench.report import html

        html_file.write_text(html(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
