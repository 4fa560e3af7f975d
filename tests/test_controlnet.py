"""ControlNets equal diffusers' own pipelines (≤ 1e-3 in float32), weigh nothing at weight 0, and must fit the model.

With random weights no picture looks like its edges, so that edges follow the source more as the weight rises cannot be
shown here. That residuals are those of diffusers at every weight is, and that more of a unit is more of a difference.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from accel.engine import Backend, Engine, EngineSpec, TensorSpec
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.control import Picture, control_picture
from models.controlnet import control_folder, control_graph
from models.denoise import Conditioning, Prompt, denoise, start
from models.depth import DISTANCES
from models.folder import Folder
from models.networks import graphs
from models.residuals import GUIDE, Controls, Residuals, residual_specs, row_of
from models.schedule import consistency_schedule
from models.text_xl import DoubleTextEncoder, size_ids
from models.unet import Call, Seen
from models.units import Unit, controls_of, units_of
from tests.addons import random_controlnet
from tests.folders import random_folder, random_xl_folder

SIZE = (96, 72)  # width, height: nine rows of latents, so that halves are not whole
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Ours:
    """A model and its ControlNets on engines, driven as the stylizer does."""

    folder: Folder
    nets: dict[str, Path]
    backend: Backend = field(default_factory=TorchBackend)
    steered: bool = True  # whether the UNet takes residuals
    calls: list[str] = field(default_factory=list)  # of the ControlNets' engines

    def __post_init__(self) -> None:
        latent = (1, 4, SIZE[1] // 8, SIZE[0] // 8)
        found = {f"{kind}={path}": control_folder(f"{kind}={path}", self.folder) for kind, path in self.nets.items()}
        hints = max((control.hints for control in found.values()), default=0)
        self.residuals = Residuals(self.folder.config("unet"), latent[2:], hints=hints)
        made = graphs(self.folder, SIZE, as_bytes=False, features=[self.residuals] if self.steered else [])
        self.unet = self.backend.load(made["unet"].build, made["unet"].spec)
        self.encode = TorchBackend().load(made["encode"].build, made["encode"].spec)
        loaded = {}
        for name, control in found.items():
            graph = control_graph(control, self.folder, latent)
            loaded[name] = counted(self.backend.load(graph.build, graph.spec), self.calls)
        self.time_ids = size_ids(SIZE) if self.folder.pooled_width() else None
        self.controls = Controls(loaded, self.residuals, self.time_ids)
        self.text = self.folder.text()

    def prompts(self, prompt: str, negative: str) -> tuple[Prompt, Prompt]:
        if isinstance(self.text, DoubleTextEncoder):
            wanted, unwanted = self.text.read(prompt), self.text.read_negative(negative)
            return (wanted.words, wanted.pooled), (unwanted.words, unwanted.pooled)
        return (self.text.embed(prompt),), (self.text.embed(negative),)

    def latents(
        self, control: str, steps: int = 1, guidance: float = 1.0, strength: float = 1.0, *, pure: bool = False
    ) -> Tensor:
        """(1, C, h, w) of what `picture()` becomes; "canny:0.5" means the canny ControlNet of `nets`."""
        schedule = consistency_schedule(self.folder.scheduler(), steps, strength)
        generator = torch.Generator().manual_seed(5)
        shape = self.residuals.inputs[0].shape[2:]
        noises = [torch.randn(1, 4, *shape, generator=generator) for _ in range(steps)]
        seen = Seen(picture(), {GUIDE: units_of(named(control, self.nets))})
        words, negative = self.prompts(PROMPT, NEGATIVE)
        cond = Conditioning(words, negative, guidance=guidance)
        calls = count()

        def network(z: Tensor, t: float, prompt: Prompt) -> Tensor:
            step, later = divmod(next(calls), cond.passes)
            pooled = prompt[1] if len(prompt) > 1 else None
            now = torch.tensor([t])
            row = step + later * steps  # of memory: the passes come one after the other
            call = Call(z.contiguous(), now, prompt[0], range(row, row + 1), (step,), steps, (seen,), pooled=pooled)
            given = {"z": call.z, "t": call.t, "words": call.words, "pooled": call.pooled, "time_ids": self.time_ids}
            given |= self.controls.inputs(call) if self.steered else {}
            return self.unet(*(given[spec.name] for spec in self.unet.spec.inputs))[0].clone()

        with torch.inference_mode():
            (raw,) = self.encode(floats(picture()))
            z = start(raw, noises[0], schedule.steps[0], pure=pure)
            return denoise(network, z, schedule, cond, noises[1:])


def counted(engine: Engine, calls: list[str]) -> Engine:
    """The engine, its calls written down."""

    class Counted:
        spec, launch = engine.spec, engine.launch

        def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            calls.append(engine.spec.name)
            return engine(*tensors)

    return Counted()


def named(control: str, nets: dict[str, Path]) -> str:
    """The setting with the folders of `nets` written into it."""
    for kind, path in nets.items():
        control = control.replace(kind, f"{kind}={path}")
    return control


def picture() -> Picture:
    return np.random.default_rng(7).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def floats(image: Picture) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def theirs(folder: Path, nets: dict[str, Path], steps: int, strength: float = 1.0, **arguments: Any) -> Tensor:
    """diffusers' latents, its ControlNets in the order of `nets`; their steps count the whole way, ours those made."""
    xl = (folder / "text_encoder_2").is_dir()
    parts: dict[str, Any] = {
        "vae": AutoencoderTiny.from_pretrained(folder / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": LCMScheduler.from_pretrained(folder / "scheduler"),
        "controlnet": [ControlNetModel.from_pretrained(path) for path in nets.values()],
    }
    if xl:
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts |= {"text_encoder_2": second, "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2")}
        parts |= {"add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kinds: Any = StableDiffusionXLControlNetImg2ImgPipeline if xl else StableDiffusionControlNetImg2ImgPipeline
    pipeline: Any = kinds(**parts)
    pipeline.set_progress_bar_config(disable=True)
    images = [floats(control_picture(kind, picture())) for kind in nets]
    found: Tensor = pipeline(
        PROMPT,
        image=floats(picture()),
        control_image=images,
        negative_prompt=NEGATIVE,
        num_inference_steps=round(steps / strength),
        strength=strength,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **arguments,
    ).images
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nets")
    return {kind: random_controlnet(root / kind, folder, seed) for seed, kind in enumerate(("canny", "tile"))}


@pytest.fixture(scope="module")
def ours(folder: Path, nets: dict[str, Path]) -> Ours:
    return Ours(Folder(folder), nets)


def one(nets: dict[str, Path], *kinds: str) -> dict[str, Path]:
    return {kind: nets[kind] for kind in kinds}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_equals_diffusers(folder: Path, nets: dict[str, Path], ours: Ours, steps: int, guidance: float) -> None:
    expected = theirs(folder, one(nets, "tile"), steps, guidance_scale=guidance, controlnet_conditioning_scale=[0.8])
    assert (ours.latents("tile:0.8", steps, guidance) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (4, 1.0), (2, 0.5)])
def test_two_equal_diffusers_with_weights_starts_and_ends(
    folder: Path, nets: dict[str, Path], ours: Ours, steps: int, strength: float, guidance: float
) -> None:
    expected = theirs(
        folder,
        nets,
        steps,
        strength,
        guidance_scale=guidance,
        controlnet_conditioning_scale=[0.7, 1.5],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0],
    )
    found = ours.latents("canny:0.7@0-0.5, tile:1.5@0.25-1", steps, guidance, strength)
    assert (found - expected).abs().max() <= TOLERANCE


def test_the_comparison_would_notice(ours: Ours) -> None:
    base = ours.latents("canny:1, tile:1", steps=4)
    for other in ("canny:1", "tile:1", "canny:1, tile:0.9", "canny:1, tile@0-0.75", "canny:1, tile:1!prompt"):
        assert (ours.latents(other, steps=4) - base).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(("guidance", "differs"), [(1.0, False), (3.0, True)])
def test_mode_control_leaves_the_unwanted_pass_alone(ours: Ours, guidance: float, differs: bool) -> None:
    balanced, control = (ours.latents(f"tile:1!{mode}", 2, guidance) for mode in ("balanced", "control"))
    assert ((balanced - control).abs().max() > 10 * TOLERANCE) == differs


def test_mode_control_tells_passes_apart_within_one_call() -> None:
    """As where a stream batch has room for the first step's second pass: rows 0 to n - 1 are the wanted one's."""
    seen, z = Seen(picture(), {GUIDE: units_of("tile:1!control")}), torch.zeros(3, 4, 9, 12)
    call = Call(z, torch.zeros(3), torch.zeros(3, 77, 8), range(3), (0, 1, 0), 2, (seen,) * 3)
    rows = [row_of("tile", 2, call, row, {"tile": torch.zeros(1)}) for row in range(3)]
    assert [scales for scales, _ in rows] == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_weight_0_is_bit_for_bit_no_controlnet_and_calls_none(
    folder: Path, nets: dict[str, Path], ours: Ours, guidance: float
) -> None:
    bare = Ours(Folder(folder), {}, steered=False).latents("", 2, guidance)
    ours.latents("canny:1, tile:1")  # leaves its residuals behind
    ours.calls.clear()
    for control in ("canny:0, tile:0", "", "tile@0-0.1"):
        assert torch.equal(ours.latents(control, 2, guidance), bare)
    assert not ours.calls


MORE = {
    "weight": ["tile:0", "tile:0.05", "tile:0.1", "tile:0.2", "tile:0.4", "tile:0.7", "tile:1", "tile:1.5", "tile:2"],
    "end": ["tile@0-0.1", "tile@0-0.25", "tile@0-0.5", "tile@0-0.75", "tile@0-1"],
    "start": ["tile@0.9-1", "tile@0.75-1", "tile@0.5-1", "tile@0.25-1", "tile@0-1"],
    "mode": ["tile:0!prompt", "tile:1!prompt", "tile:1"],
    "units": ["", "tile:0.4", "tile:0.4, canny:0.4"],
}


@pytest.mark.parametrize("name", MORE)
def test_more_of_a_unit_is_farther_from_the_picture_without_it(ours: Ours, name: str) -> None:
    """From exactly none on, and each time by more than would be an error."""
    bare = ours.latents("", steps=4)
    far = [float((ours.latents(control, steps=4) - bare).norm() / bare.norm()) for control in MORE[name]]
    assert far[0] == 0
    assert all(after > before + 5 * TOLERANCE for before, after in itertools.pairwise(far)), far


def test_only_those_that_speak_are_computed(ours: Ours) -> None:
    ours.calls.clear()
    ours.latents("canny@0-0.5, canny:0.3@0.5-1, tile:0.5@0-0.25", steps=4)
    assert ours.calls.count("control-canny") == 4
    assert ours.calls.count("control-tile") == 1


def test_a_frames_pictures_are_drawn_once_and_only_what_is_needed(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def noted(kind: str, image: Picture, **settings: Any) -> Picture:
        drawn.append(kind)
        return control_picture(kind, image, **settings)

    monkeypatch.setattr("models.residuals.control_picture", noted)
    ours.latents("canny@0-0.5, canny:0.3@0.5-1, tile:0, lineart:1", steps=4, guidance=3.0)
    assert drawn == ["canny"]


def test_a_streams_depth_pictures_share_their_range_until_a_cut(folder: Path) -> None:
    model, latent = Folder(folder), (1, 4, SIZE[1] // 8, SIZE[0] // 8)
    shown: list[Picture] = []
    residuals = Residuals(model.config("unet"), latent[2:])

    class Watching:
        spec = EngineSpec("control-depth", (TensorSpec("z", latent), TensorSpec("picture", (1, 72, 96, 3), "uint8")),
                          residuals.inputs, "")  # fmt: skip

        def __call__(self, z: Tensor, pictures: Tensor) -> tuple[Tensor, ...]:
            shown.append(pictures[0].numpy())
            return tuple(torch.zeros(spec.shape) for spec in residuals.inputs)

    class Reading:
        spec = EngineSpec(
            "depth", (TensorSpec("picture", (1, 72, 96, 3), "uint8"),), (TensorSpec("near", (1, 72, 96)),), ""
        )

        def __call__(self, picture: Tensor) -> tuple[Tensor, ...]:
            return (picture[..., 0].float(),)

    engines = {"depth": cast(Engine, Watching()), DISTANCES: cast(Engine, Reading())}
    one, other = (Controls(engines, residuals) for _ in range(2))
    far = np.linspace(10, 60, SIZE[0])[None, :, None].repeat(SIZE[1], 0).repeat(3, 2).astype(np.uint8)
    near = far.copy()
    near[:, 80:] = 250  # somebody comes

    def show(controls: Controls, image: Picture, steps: int = 1) -> Picture:
        seen = Seen(image, {GUIDE: units_of("depth")})
        for step in range(steps):
            words = torch.zeros(1, 77, 32)
            call = Call(torch.zeros(latent), torch.zeros(1), words, range(step, step + 1), (step,), steps, (seen,))
            controls.inputs(call)
        assert all((picture == shown[-1]).all() for picture in shown[-steps:])
        return shown[-1]

    alone, jumped = show(one, far).astype(int), show(other, near).astype(int)
    assert (alone.min(), alone.max(), jumped.max()) == (0, 255, 255)
    assert np.abs(jumped - alone)[:, :80].max() > 150
    assert np.abs(show(one, near, steps=4) - alone)[:, :80].max() < 80  # one frame's, however many steps it has
    one.reset(1)  # the cut comes to a later row: it was here before
    assert (show(one, far) != alone).any()
    one.reset(0)
    assert (show(one, far) == alone).all()
    one.reset()
    assert (show(one, near) == jumped).all()


def test_units_of_one_net_add_up(ours: Ours) -> None:
    assert torch.allclose(ours.latents("tile:0.25, tile:0.5"), ours.latents("tile:0.75"), atol=1e-6)


def test_rows_keep_their_own_frames_units_and_steps(folder: Path, nets: dict[str, Path]) -> None:
    """A stream batch: three rows at three steps, of frames with other pictures and weights, and one without any."""
    model = Folder(folder)
    latent = (1, 4, SIZE[1] // 8, SIZE[0] // 8)
    settings = ["canny:0.5@0-0.4, tile", "canny:1!prompt, tile:0.2", ""]
    frames = tuple(
        Seen(image, {GUIDE: units_of(named(text, nets))} if text else {})
        for text, image in zip(settings, (picture(), picture()[::-1], picture()), strict=True)
    )
    generator = torch.Generator().manual_seed(2)
    z, t = torch.randn(3, 4, *latent[2:], generator=generator), torch.tensor([999.0, 500.0, 259.0])
    words = torch.randn(3, 77, 32, generator=generator)

    def controls(rows: int) -> Controls:
        loaded = {}
        for kind, path in nets.items():
            graph = control_graph(control_folder(f"{kind}={path}", model), model, latent, rows)
            loaded[f"{kind}={path}"] = TorchBackend().load(graph.build, graph.spec)
        return Controls(loaded, Residuals(model.config("unet"), latent[2:], rows))

    single, batch = controls(1), controls(3)
    together = batch.inputs(Call(z, t, words, range(3), (0, 1, 2), 3, frames))
    for row in range(3):
        part = slice(row, row + 1)
        alone = single.inputs(Call(z[part], t[part], words[part], range(1), (row,), 3, frames[part]))
        for name, tensor in alone.items():
            assert torch.allclose(together[name][part], tensor, atol=1e-5)
    assert not any(tensor[2].any() for tensor in together.values())
    assert all(tensor[0].any() and tensor[1].any() for tensor in together.values())
    part = batch.inputs(Call(z, t, words, range(3), (0, 1, 2), 3, frames, live=(False, True, False)))
    assert all(tensor[1].any() and not tensor[::2].any() for tensor in part.values())


def test_xl_equals_diffusers(tmp_path: Path) -> None:
    folder = random_xl_folder(tmp_path / "xl")
    nets = {kind: random_controlnet(tmp_path / kind, folder, seed) for seed, kind in enumerate(("canny", "tile"))}
    ours = Ours(Folder(folder), nets)
    for steps, guidance in ((1, 1.0), (4, 3.0)):
        expected = theirs(
            folder,
            nets,
            steps,
            guidance_scale=guidance,
            controlnet_conditioning_scale=[0.7, 1.2],
            control_guidance_end=[1.0, 0.5],
        )
        found = ours.latents("canny:0.7, tile:1.2@0-0.5", steps, guidance)
        assert (found - expected).abs().max() <= TOLERANCE
    assert (ours.latents("") - ours.latents("tile")).abs().max() > 10 * TOLERANCE


def test_openvino_computes_the_same(folder: Path, nets: dict[str, Path], ours: Ours) -> None:
    quick = Ours(Folder(folder), one(nets, "tile"), OpenVINOBackend(threads=1))
    near = 0.05 if "BF16" in quick.backend.fingerprint else TOLERANCE
    expected = ours.latents("tile:0.8", 2)
    assert (quick.latents("tile:0.8", 2) - expected).abs().max() <= near * expected.abs().max()
    assert torch.equal(quick.latents("tile:0"), quick.latents(""))


def test_each_residual_is_the_networks_times_its_scale(folder: Path, nets: dict[str, Path]) -> None:
    model, latent = Folder(folder), (1, 4, SIZE[1] // 8, SIZE[0] // 8)
    graph = control_graph(control_folder(f"tile={nets['tile']}", model), model, latent)
    generator = torch.Generator().manual_seed(2)
    z, words = torch.randn(latent, generator=generator), torch.randn(1, 77, 32, generator=generator)
    scales = Unit("tile", weight=0.8, mode="prompt").scales(5)
    t, shown = torch.tensor([499.0]), torch.from_numpy(picture())[None]
    found = TorchBackend().load(graph.build, graph.spec)(z, t, words, shown, torch.tensor([scales]))
    network = ControlNetModel.from_pretrained(nets["tile"])
    with torch.inference_mode():
        down, middle = network(z, t, words, floats(picture()), return_dict=False)
    for residual, whole, scale in zip(found, (*down, middle), scales, strict=True):
        assert torch.allclose(residual, whole * scale, atol=1e-5)


def test_the_frames_of_a_block_share_their_rows_residuals(folder: Path) -> None:
    residuals = Residuals({"block_out_channels": [8], "layers_per_block": 1}, (4, 6), rows=2)
    given = {spec.name: torch.rand(spec.shape) for spec in residuals.inputs} | {"z": torch.zeros(6, 4, 4, 6)}
    with residuals.during(None, given, {}) as arguments:
        middle = arguments["mid_block_additional_residual"]
    assert torch.equal(middle[:3], given["residual2"][:1].expand(3, -1, -1, -1))
    assert torch.equal(middle[3:], given["residual2"][1:].expand(3, -1, -1, -1))


def test_sums_are_kept_where_the_engines_compute() -> None:
    residuals = Residuals({"block_out_channels": [8], "layers_per_block": 1}, (4, 6))

    class Elsewhere:
        spec = EngineSpec("control-tile", (TensorSpec("z", (1, 4, 4, 6)),), residuals.inputs, "")

        def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(spec.shape, device="meta") for spec in residuals.inputs)

    controls = Controls({"tile": cast(Engine, Elsewhere())}, residuals)
    seen = Seen(picture(), {GUIDE: units_of("tile")})
    call = Call(
        torch.zeros(1, 4, 4, 6, device="meta"), torch.zeros(1), torch.zeros(1, 77, 8), range(1), (0,), 1, (seen,)
    )
    assert {tensor.device.type for tensor in controls.inputs(call).values()} == {"meta"}


@pytest.mark.parametrize(
    "config",
    [
        {"cross_attention_dim": 768},  # Stable Diffusion 1.5
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D",) * 3,
            "mid_block_type": "UNetMidBlock2D",
        },  # the small ones for SDXL
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (36, 64), (35, 61)])
def test_shapes_are_those_that_full_size_networks_give(config: dict[str, Any], size: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32, 96, 256))
        z, words = torch.zeros(1, 4, *size), torch.zeros(1, 77, config["cross_attention_dim"])
        shown = torch.zeros(1, 3, 8 * size[0], 8 * size[1])
        down, middle = network(z, torch.zeros(1), words, shown, return_dict=False)
    expected = [spec.shape for spec in residual_specs(network.config, size, 1)]
    assert [tuple(tensor.shape) for tensor in (*down, middle)] == expected


def test_there_are_as_many_as_published() -> None:
    sd = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
    assert len(residual_specs(sd, (64, 64), rows=2)) == 13
    xl = {"block_out_channels": [320, 640, 1280], "layers_per_block": 2}
    assert len(residual_specs(xl, (64, 64), rows=2)) == 10


def changed(path: Path, net: Path, **values: Any) -> Path:
    """A copy of a ControlNet with other configuration."""
    shutil.copytree(net, path)
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "cross_attention_dim is 2048, here 32"),
        ({"block_out_channels": [32, 96]}, r"block_out_channels is \[32, 96\]"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is text_time"),
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel"),
        ({"conditioning_channels": 6}, "conditioning_channels = 6"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"down_block_types": ["DownBlock2D"]}, "makes no network"),
        ({"norm_num_groups": "many"}, "makes no network"),
    ],
)
def test_what_does_not_fit_is_refused_before_its_weights_are_read(
    tmp_path: Path, folder: Path, nets: dict[str, Path], values: dict[str, Any], message: str
) -> None:
    path = changed(tmp_path / "net", nets["tile"], **values)
    (path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=message) as caught:
        control_folder(f"tile={path}", Folder(folder))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (768, 2048, "is a ControlNet for Stable Diffusion XL, the model is Stable Diffusion 1.5"),
        (2048, 768, "is a ControlNet for Stable Diffusion 1.5, the model is Stable Diffusion XL"),
        (1024, 768, "the model is Stable Diffusion 2.1"),
    ],
)
def test_another_family_is_named(
    tmp_path: Path, folder: Path, nets: dict[str, Path], ours: int, theirs: int, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "unet" / "config.json").read_text()) | {"cross_attention_dim": ours}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    path = changed(tmp_path / "net", nets["tile"], cross_attention_dim=theirs)
    with pytest.raises(UserError, match=message) as caught:
        control_folder(f"tile={path}", Folder(model))
    assert "take one made for" in caught.value.hint


def halved(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[: (path / WEIGHTS).stat().st_size // 2])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["conv_in.bias"]
    save_file(tensors, path / WEIGHTS)


def misshapen(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file(tensors | {"conv_in.bias": torch.zeros(7)}, path / WEIGHTS)


def pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "is no ControlNet"),
        (lambda path: (path / "config.json").write_text("{"), "is no ControlNet"),
        (lambda path: (path / "config.json").write_text("[1]"), "is no ControlNet"),
        (halved, "half-downloaded"),
        (without_a_tensor, "there is no conv_in.bias"),
        (misshapen, r"conv_in.bias is \(7,\)"),
        (pickled, "has no diffusion_pytorch_model.safetensors"),
    ],
)
def test_broken_folders_are_refused_with_a_hint(
    tmp_path: Path, folder: Path, nets: dict[str, Path], harm: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "net"
    shutil.copytree(nets["tile"], path)
    harm(path)
    with pytest.raises(UserError, match=message) as caught:
        control_folder(f"tile={path}", Folder(folder))
    assert caught.value.hint


def test_weights_in_half_precision_will_do(tmp_path: Path, folder: Path, nets: dict[str, Path]) -> None:
    path = tmp_path / "net"
    shutil.copytree(nets["tile"], path)
    tensors = {name: tensor.half() for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / "diffusion_pytorch_model.fp16.safetensors")
    (path / WEIGHTS).unlink()
    network = control_folder(f"tile={path}", Folder(folder)).network()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in network.parameters())


def test_a_net_that_is_not_fetched_says_how_to(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "unet" / "config.json").read_text()) | {"cross_attention_dim": 768}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not here") as caught:
        control_folder("canny", Folder(model))
    assert "livestyle fetch controlnet-sd15-canny" in caught.value.hint
    with pytest.raises(UserError, match="no ControlNet for"):
        control_folder("canny", Folder(folder))


def test_names_are_those_of_the_setting(nets: dict[str, Path]) -> None:
    assert controls_of(named("tile:0.5, canny", nets)) == tuple(f"{kind}={path}" for kind, path in nets.items())
