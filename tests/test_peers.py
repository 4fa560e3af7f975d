"""StreamDiffusion 0.1.1 and ours on the same folder, steps and noise: equal pictures, and the benchmark of both."""

from __future__ import annotations

import json
import os
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.errors import UserError
from bench import peer_process, peers, record
from bench.peer_lanes import Work
from bench.peer_streamdiffusion import clocks_without_cuda, opened
from models.batch import StreamBatch
from models.denoise import Conditioning, Rows, Trajectory, run, start
from models.folder import Folder
from models.load import load
from models.params import Params, Style
from models.schedule import consistency_schedule
from stream.cli import main
from tests.folders import random_folder, random_xl_folder

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE, SEED = "oil painting of a rainy city", "ink", 5
PICTURES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(random_folder(tmp_path_factory.mktemp("sd") / "sd", "sd"))


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks_without_cuda(monkeypatch.setattr)


def pictures() -> list[Tensor]:
    """(1, 3, H, W) each, in [0, 1]."""
    chance = torch.Generator().manual_seed(7)
    return [torch.rand(1, 3, SIZE[1], SIZE[0], generator=chance) for _ in range(PICTURES)]


def theirs(folder: Folder, times: list[int], **options: Any) -> list[Tensor]:
    """What StreamDiffusion makes of the pictures, those it is late by left out."""
    stream = opened(folder, SIZE, times, PROMPT, SEED, **options)
    found = [(stream(picture) / 2 + 0.5).clamp(0, 1) for picture in pictures()]
    return found[len(times) - 1 :]


def ours(folder: Folder, steps: int, strength: float) -> list[Tensor]:
    """What `livestyle run` makes of them, frame by frame."""
    stylizer = load(str(folder.path), SIZE, "torch", as_bytes=False)
    params = Params(style=Style(prompt=PROMPT, steps=steps, strength=strength, seed=SEED))
    state = stylizer.open(params)
    with torch.inference_mode():
        return [stylizer.stylize(state, picture, params).clone() for picture in pictures()]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference; there may be more wanted ones, of the frames still on their way."""
    assert found
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=False))


def test_one_step_equals_streamdiffusion_at_its_documented_step(folder: Folder) -> None:
    stream = opened(folder, SIZE, [359], PROMPT, SEED, schedule=50)
    assert stream.t_list == [32]
    wanted = ours(folder, steps=1, strength=0.36)
    assert apart(theirs(folder, [359], schedule=50), wanted) <= TOLERANCE
    assert apart(theirs(folder, [379], schedule=50), wanted) > 3 * TOLERANCE  # the comparison would notice


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.5), (2, 0.36), (4, 1.0)])
def test_its_stream_batch_is_our_loop_some_frames_later(folder: Folder, steps: int, strength: float) -> None:
    times = [step.t for step in consistency_schedule(folder.scheduler(), steps, strength).steps]
    found = theirs(folder, times)
    assert len(found) == PICTURES - (steps - 1)
    assert apart(found, ours(folder, steps, strength)) <= TOLERANCE


CASES = [  # its kind of guidance, ours, steps, scale, δ
    ("none", "full", 2, 1.0, 1.0),
    ("full", "full", 1, 2.0, 1.0),
    ("full", "full", 4, 2.0, 1.0),
    ("self", "self", 2, 1.4, 1.0),
    ("self", "self", 4, 2.0, 0.7),
    ("initialize", "onetime-negative", 1, 2.0, 0.7),
    ("initialize", "onetime-negative", 2, 1.4, 1.0),
    ("initialize", "onetime-negative", 4, 2.0, 0.7),
]


@pytest.mark.parametrize(("theirs_is", "mode", "steps", "guidance", "delta"), CASES)
def test_guidance_of_each_kind_is_the_same_in_the_loop_and_in_the_stream_batch(
    folder: Folder, theirs_is: str, mode: Any, steps: int, guidance: float, delta: float
) -> None:
    schedule = consistency_schedule(folder.scheduler(), steps, 0.7)
    times = [step.t for step in schedule.steps]
    options = {"negative_prompt": NEGATIVE, "guidance_scale": guidance, "delta": delta}
    found = theirs(folder, times, cfg_type=theirs_is, **options)
    unet: Any = folder.unet()
    vae: Any = folder.vae()
    text: Any = folder.text()

    def network(rows: Rows) -> Tensor:
        output: Tensor = unet(rows.z, rows.t, rows.prompt[0], return_dict=False)[0]
        return output

    chance = torch.Generator().manual_seed(SEED)
    noises = [torch.randn(1, 4, SIZE[1] // 8, SIZE[0] // 8, generator=chance) for _ in range(steps)]
    cond = Conditioning((text.embed(PROMPT),), (text.embed(NEGATIVE),), guidance=guidance, mode=mode, delta=delta)
    batch = StreamBatch(steps)
    looped: list[Tensor] = []
    batched: list[Tensor] = []
    with torch.inference_mode():
        for picture in pictures():
            source = vae.encode(picture * 2 - 1).latents
            z = start(source, noises[0], schedule.steps[0], pure=False)
            frame = Trajectory(z, schedule, cond, tuple(noises[1:]), anchor=source)
            looped.append(painted(vae, run(network, frame).z))
            if (done := batch.push(network, frame)) is not None:
                batched.append(painted(vae, done.z))
    assert apart(found, looped) <= TOLERANCE
    assert apart(found, batched) <= TOLERANCE


def painted(vae: Any, latents: Tensor) -> Tensor:
    picture: Tensor = (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    return picture


def test_a_schedule_without_the_timestep_is_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="358"):
        opened(folder, SIZE, [358], PROMPT, SEED, schedule=50)


def test_the_command_shows_ours_and_theirs_and_writes_what_was_done(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "physical_cores", lambda: 1)  # more would wait busily for one another on a busy machine
    written = tmp_path / "peers.json"
    command = ["bench", "peers", "--model", str(folder.path), "--source", "test", "--size", "64x64", "--frames", "3"]
    only = ["--engine", "torch", "--form", "float32", "--steps", "2", "--batch", "--json", str(written)]
    assert main([*command, *only]) == 0
    shown = capsys.readouterr().out
    report = json.loads(written.read_text())
    assert list(report["results"]) == ["livestyle torch", "streamdiffusion float32"]
    assert report["equal_in_float32"]["max"] <= TOLERANCE
    assert not record.fault(report)
    assert {"streamdiffusion", "load average"} <= set(report["machine"])
    done = report["work"]
    assert done["frames"] == peers.BLOCKS
    assert (done["steps"], done["size"], done["threads"]) == (2, "64x64", 1)
    assert {"rate", "frame", "memory"} == set(report["lanes"]["livestyle torch"])
    for name, lane in report["results"].items():
        assert name in shown
        assert lane["fps"] > 0
        assert lane["frame_ms"]["p99"] >= lane["frame_ms"]["p50"] > 0
        assert lane["memory_mb"]["peak"] > 50
        assert len(lane["ratio_blocks"]) == peers.BLOCKS
        assert lane["difference"]["max"] <= 1  # of 255
        assert lane["versions"]["torch"]
    assert report["results"]["streamdiffusion float32"]["ratio"] == 1
    assert [lane["late_frames"] for lane in report["results"].values()] == [1, 1]


def test_a_lane_that_fails_or_dies_is_said_and_does_not_hang(tmp_path: Path) -> None:
    work = Work(tmp_path / "nowhere", SIZE, PROMPT, 1, 0.5, SEED, 1, "cpu")
    with peer_process.Lane("livestyle", "torch", work, []) as lane:
        with pytest.raises(UserError, match="nowhere"):
            lane.ask("build")
        with pytest.raises(RuntimeError, match="Traceback"):
            lane.ask("run", "three")
        os.kill(lane.process.pid or 0, signal.SIGKILL)
        with pytest.raises(UserError, match="-9") as died:
            lane.ask("peak")
        assert "memory" in died.value.hint


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The first of the two lines that a command ends with."""
    assert main(["bench", "peers", *arguments]) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return f"{error} {hint}"


def test_a_peer_that_is_not_installed_or_another_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr("bench.peer_streamdiffusion.version", none)
    assert "pip install --no-deps streamdiffusion==0.1.1" in refused(capsys)
    monkeypatch.setattr("bench.peer_streamdiffusion.version", lambda _: "0.2.0")
    assert "0.2.0 is not the 0.1.1" in refused(capsys)


def test_what_streamdiffusion_cannot_run_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"ip2p": "more than the latent", "lcm": "guidance as an input"}
    for kind, reason in kinds.items():
        assert reason in refused(capsys, "--model", str(random_folder(tmp_path / kind, kind)))
    assert "SDXL" in refused(capsys, "--model", str(random_xl_folder(tmp_path / "xl")))
    plain = random_folder(tmp_path / "v", "sd", "v_prediction")
    assert "does not predict noise" in refused(capsys, "--model", str(plain))
    index = json.loads((plain / "model_index.json").read_text())
    (plain / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    assert "AutoencoderKL" in refused(capsys, "--model", str(plain))
    assert "model" in refused(capsys, "--model", str(tmp_path / "nowhere"))


def test_unknown_engines_and_forms_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown engine: onnx" in refused(capsys, "--engine", "onnx")
    assert "unknown form: int8" in refused(capsys, "--form", "int8")
    assert "no CUDA" in refused(capsys, "--engine", "tensorrt") or torch.cuda.is_available()
