"""The rolling buffer: equal to diffusers' motion UNet under a causal mask, and never a word about the future."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from models.loras import merge_lora
from models.motion import MotionUNet, cache_shapes, motion_specs
from models.rolling import Rolling, Window, whole_clip

FRAMES = 11
SIZE = (8, 12)  # latents, height and width
WINDOW = Window(sinks=2, ring=3)  # full after five frames, and rolls twice around in eleven


def unet(kind: str = "sd") -> UNet2DConditionModel:
    """Kind "sd" as Stable Diffusion 1.5 is laid out, "lcm" with a guidance embedding, "mini" as our own model is."""
    torch.manual_seed(0)
    mini = kind == "mini"
    more = {"resnet_time_scale_shift": "scale_shift", "use_linear_projection": True} if mini else {}
    if mini:
        more |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    return UNet2DConditionModel(
        in_channels=8 if mini else 4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if mini else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if mini else ("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=32 if kind == "lcm" else None,
        **more,
    ).eval()


def adapter(mid: bool = True, **more: Any) -> MotionAdapter:
    """With the mid block of v2, AnimateLCM and Lightning, or without, as v3 is."""
    torch.manual_seed(1)
    options = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "motion_max_seq_length": 12, **more}
    return MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, use_motion_mid_block=mid, **options
    ).eval()


def network(kind: str = "sd", **more: Any) -> MotionUNet:
    return MotionUNet(unet(kind), adapter(), **more).eval()


def memory(window: Window = WINDOW, motion: MotionAdapter | None = None, rows: int = 1) -> Rolling:
    return Rolling(window, cache_shapes(motion or adapter(), SIZE), rows)


def clip(frames: int = FRAMES, channels: int = 4, seed: int = 2) -> Tensor:
    return torch.randn(frames, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


WORDS = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
TIME = torch.tensor([499.0])


@torch.inference_mode()
def streamed(net: MotionUNet, past: Rolling, frames: Tensor, scale: float = 1.0, t: Tensor = TIME) -> Tensor:
    """A clip through a memory of one row, `chunk` frames at a time."""
    outputs = []
    for z in frames.split(past.window.chunk):
        output, *new = net(past.join(z), t, WORDS, *past.inputs(scale))
        past.commit(new)
        outputs.append(past.newest(output).clone())  # an engine may reuse its outputs
    return torch.cat(outputs)


def visible_frames(window: Window, frame: int) -> tuple[list[int], list[int]]:
    """What a frame attends to, by number, and the positions of these: the rule said without slots."""
    start = frame - frame % window.chunk
    past = [f for f in range(start) if f < window.sinks or f >= start - window.ring]
    base = min(start, window.sinks + window.ring)
    places = [f if f < window.sinks else f - start + base for f in past]
    return past + list(range(start, start + window.chunk)), places + list(range(base, base + window.chunk))


@pytest.fixture
def recompute(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """diffusers' `UNetMotionModel` over a whole clip, its temporal attention masked and normalised frame by frame."""

    def run(net: UNetMotionModel, frames: Tensor, visible: Callable[[int], tuple[list[int], list[int]]]) -> Tensor:
        def forward(self: Any, x: Tensor, *rest: Any, num_frames: int = 1) -> Tensor:
            h = self.proj_in(self.norm(x).flatten(2).permute(2, 0, 1))  # (hw, F, C)
            for block in self.transformer_blocks:
                for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
                    y, rows = norm(h), []
                    for frame in range(len(frames)):
                        seen, positions = visible(frame)
                        rows.append(attention(y[:, seen] + block.pos_embed.pe[:, positions])[:, seen.index(frame)])
                    h = h + torch.stack(rows, 1)
                h = h + block.ff(block.norm3(h))
            return x + self.proj_out(h).permute(1, 2, 0).reshape(x.shape)

        monkeypatch.setattr(AnimateDiffTransformer3D, "forward", forward)
        with torch.inference_mode():
            words = WORDS.expand(len(frames), -1, -1)
            return net(frames.movedim(0, 1)[None], TIME, words, return_dict=False)[0][0].movedim(1, 0)

    return run


# The index logic alone ---------------------------------------------------------------------------------------------

WINDOWS = [Window(s, r, c, f) for s, r, c, f in product((0, 1, 4), (1, 3, 7), (1, 2, 3), (0, 1, 4)) if r >= c]


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_slots_hold_the_frames_that_the_rule_names(window: Window) -> None:
    slots: dict[int, int] = {}  # slot → frame, as commits leave it
    for seen in range(0, 60, window.chunk):
        stored = max(seen - window.refresh, 0)
        base = min(stored, window.slots)
        wanted = {f: f for f in range(min(window.sinks, stored))}
        wanted |= {f: base - (stored - f) for f in range(max(window.sinks, stored - window.ring), stored)}
        wanted |= {f: base + f - stored for f in range(stored, seen + window.chunk)}
        held = [slots.get(i, -1) for i in range(window.slots)]
        held += [seen - window.refresh + i for i in range(window.block)]
        visible, positions = window.visible(seen), window.positions(seen)
        assert visible == [frame >= 0 for frame in held]
        found = {frame: p for frame, p, shown in zip(held, positions, visible, strict=True) if shown}
        assert found == wanted
        slots |= {slot: seen - window.refresh + i for i, slot in window.writes(seen)}


@pytest.mark.parametrize("window", [Window.of(4), Window.of(16), Window.of(16, chunk=4), Window.of(16, refresh=3)])
def test_positions_stay_in_range_over_a_hundred_thousand_frames(window: Window) -> None:
    steady = None
    for seen in range(0, 100_000, window.chunk):
        positions, slots = window.positions(seen), [slot for _, slot in window.writes(seen)]
        assert min(positions) >= 0
        assert max(positions) < window.length
        assert all(0 <= slot < window.slots for slot in slots)
        if seen >= window.length + window.refresh:
            ordered = sorted(positions)
            assert ordered == list(range(window.length))
            assert min(slots) >= window.sinks  # the first frames stay
            steady = steady or positions[-window.block :]
            assert positions[-window.block :] == steady
    assert steady


def test_of_keeps_to_the_length_that_was_asked_for() -> None:
    for length in range(4, 17):
        window = Window.of(length)
        assert (window.length, window.slots) == (length, length - 1)
    with pytest.raises(ValueError, match="ring"):
        Window.of(4, chunk=4)


# Against diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "lcm"])
@pytest.mark.parametrize("mid", [True, False])
def test_first_frame_equals_diffusers_with_one_frame(kind: str, mid: bool) -> None:
    image, motion = unet(kind), adapter(mid)
    theirs = UNetMotionModel.from_unet2d(image, motion).eval()
    guidance = torch.randn(1, 32) if kind == "lcm" else None
    extra = () if guidance is None else (guidance,)
    z = clip(1)
    with torch.inference_mode():
        wanted = theirs(z.movedim(0, 1)[None], TIME, WORDS, timestep_cond=guidance, return_dict=False)[0][0, :, 0]
        found, *_ = MotionUNet(image, motion).eval()(z, TIME, WORDS, *extra, *memory(motion=motion).inputs(1.0))
        still = image(z, TIME, WORDS, timestep_cond=guidance, return_dict=False)[0]
    assert (found[0] - wanted).abs().max() <= 1e-4
    assert (found - still).abs().max() > 0.02  # or the comparison would show nothing


@pytest.mark.parametrize("window", [WINDOW, Window(0, 4), Window(2, 4, chunk=3)], ids=repr)
@pytest.mark.parametrize("mid", [True, False])
def test_ring_equals_a_full_recompute_under_the_causal_mask(
    recompute: Callable[..., Tensor], window: Window, mid: bool
) -> None:
    image, motion, frames = unet(), adapter(mid), clip(12)
    found = streamed(MotionUNet(image, motion).eval(), memory(window, motion), frames)
    theirs = UNetMotionModel.from_unet2d(image, motion).eval()
    wanted = recompute(theirs, frames, lambda frame: visible_frames(window, frame))
    assert (found - wanted).abs().max() <= 1e-3
    forgetful = recompute(theirs, frames, lambda frame: visible_frames(Window(0, window.chunk, window.chunk), frame))
    assert (forgetful - wanted).abs().max() > 0.02


def test_refreshed_frames_see_all_that_came_since(recompute: Callable[..., Tensor]) -> None:
    """Until a frame is stored for good, recomputing is diffusers' own attention: every frame sees every other."""
    image, motion, frames = unet(), adapter(), clip(4)
    found = streamed(MotionUNet(image, motion).eval(), memory(Window(1, 4, refresh=3), motion), frames)
    theirs = UNetMotionModel.from_unet2d(image, motion).eval()
    for count in range(1, 5):
        wanted = recompute(theirs, frames[:count], lambda frame, n=count: (list(range(n)), list(range(n))))
        assert (found[count - 1] - wanted[-1]).abs().max() <= 1e-3


def test_rows_of_a_stream_batch_at_different_fill_equal_rows_of_their_own() -> None:
    """At tick t row r holds frame t - r, noisier rows first, as in StreamDiffusion's batch."""
    rows, net = 3, network()
    levels = [clip(seed=10 + row) for row in range(rows)]
    times = torch.tensor([899.0, 499.0, 99.0])
    past, found = memory(rows=rows), [[] for _ in range(rows)]
    with torch.inference_mode():
        for tick in range(FRAMES):
            z = torch.stack([levels[row][tick - row] for row in range(rows)])  # what row 2 starts with is not a frame
            output, *new = net(z, times, WORDS.expand(rows, -1, -1), *past.inputs(1.0))
            live = range(min(tick + 1, rows))
            past.commit(new, live)
            for row in live:
                found[row].append(output[row])
    for row in range(rows):
        count = FRAMES - row
        wanted = streamed(net, memory(), levels[row][:count], t=times[row : row + 1])
        assert (torch.stack(found[row]) - wanted).abs().max() <= 1e-5
    assert past.seen == [11, 10, 9]


# Promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "mini"])
def test_scale_zero_is_the_image_model_bit_for_bit(kind: str) -> None:
    image, frames = unet(kind), clip(4, 8 if kind == "mini" else 4)
    found = streamed(MotionUNet(image, adapter()).eval(), memory(), frames, scale=0.0)
    with torch.inference_mode():  # the UNet itself, as it is after its use with motion
        wanted = torch.cat([image(z[None], TIME, WORDS, return_dict=False)[0] for z in frames])
    assert torch.equal(found, wanted)


def test_past_is_bit_equal_whatever_comes_after() -> None:
    net, frames, other = network(), clip(), clip()
    other[7:] = clip(seed=9)[7:]
    memories = memory(), memory()
    one, two = (streamed(net, m, f[:7]) for m, f in zip(memories, (frames, other), strict=True))
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(memories[0].caches, memories[1].caches, strict=True))
    one, two = (streamed(net, m, f[7:]) for m, f in zip(memories, (frames, other), strict=True))
    assert not torch.equal(one, two)


def test_older_row_of_a_batch_learns_nothing_from_the_newer_one() -> None:
    net, frames, past = network(), clip(), memory(rows=2)
    for row in range(2):
        past.commit([torch.randn(1, p, 1, d) for p, d in cache_shapes(adapter(), SIZE)], range(row, row + 1))
    batches = torch.stack([frames[5], frames[4]]), torch.stack([frames[6], frames[4]])
    with torch.inference_mode():
        one, two = (net(z, TIME.expand(2), WORDS.expand(2, -1, -1), *past.inputs(1.0)) for z in batches)
    assert torch.equal(one[0][1], two[0][1])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one[1:], two[1:], strict=True))
    assert not torch.equal(one[0][0], two[0][0])


def test_memory_is_constant() -> None:
    past = memory(rows=2)
    addresses, size = [cache.data_ptr() for cache in past.caches], past.nbytes
    new = [torch.randn(2, p, 1, d) for p, d in cache_shapes(adapter(), SIZE)]
    assert size == sum(t.nbytes for t in new) * WINDOW.slots
    for _ in range(500):
        past.commit(new)
        shapes = [t.shape for t in past.inputs(1.0)]
    assert ([cache.data_ptr() for cache in past.caches], past.nbytes) == (addresses, size)
    assert shapes == [t.shape for t in memory(rows=2).inputs(1.0)]
    assert past.seen == [500, 500]


@pytest.mark.parametrize("window", [WINDOW, Window(1, 2, refresh=2)], ids=repr)
def test_after_a_reset_nothing_of_before_is_left(window: Window) -> None:
    net, past, frames = network(), memory(window), clip(4)
    streamed(net, past, torch.full_like(frames, float("nan")))
    past.reset()
    assert torch.equal(streamed(net, past, frames), streamed(net, memory(window), frames))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stored(bad: float) -> None:
    net, past, frames = network(), memory(), clip(4)
    streamed(net, past, frames)
    poison = [torch.ones(1, p, 1, d) for p, d in cache_shapes(adapter(), SIZE)]
    poison[-1][0, 0, 0, 0] = bad
    past.commit(poison)
    assert past.seen == [0]
    assert torch.equal(streamed(net, past, frames), streamed(net, memory(), frames))


# Training, models and engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, ["down_blocks.1", "mid_block", "up_blocks.0"]])
def test_one_causal_pass_over_a_clip_equals_streaming_it(only: list[str] | None) -> None:
    net, frames = network("mini", only=only), clip(WINDOW.length, 8)
    past = Rolling(WINDOW, cache_shapes(adapter(), SIZE, only))
    wanted = streamed(net, past, frames)
    net.train()  # position tables now follow the weights
    output, *new = net(frames, TIME, WORDS, *whole_clip(WINDOW.length), torch.ones(1))
    assert (output - wanted).abs().max() <= 1e-4
    assert len(new) == len(past.caches) == (28 if only is None else 16)
    output.square().mean().backward()
    grad = net.motion[0].blocks[0].attentions[1].to_k.weight.grad
    assert grad is not None
    assert grad.abs().max() > 0
    changed = frames.clone()
    changed[4:] += 1
    with torch.inference_mode():
        again, *_ = net(changed, TIME, WORDS, *whole_clip(WINDOW.length), torch.ones(1))
    assert torch.equal(again[:4], output[:4])


@pytest.mark.parametrize("size", [(8, 12), (9, 13)])
def test_shapes_are_known_without_weights(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        bare = MotionAdapter.from_config(adapter().config)
    past = Rolling(WINDOW, cache_shapes(bare, size))
    _, *new = network()(torch.randn(1, 4, *size), TIME, WORDS, *past.inputs(1.0))
    past.commit(new)
    assert [t.shape[:2] for t in new] == [c.shape[:2] for c in past.caches]


@pytest.mark.parametrize("spelling", ["animatediff", "diffusers", "peft", "kohya"])
def test_merged_motion_lora_equals_the_lora_at_run_time(spelling: str) -> None:
    image, motion, z = unet(), adapter(), clip(1)
    theirs = UNetMotionModel.from_unet2d(image, adapter()).eval()
    lora: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(4)
    for path, n, to in product(
        ("down_blocks.0", "mid_block", "up_blocks.1"), (1, 2), ("to_q", "to_k", "to_v", "to_out.0")
    ):
        name = f"{path}.motion_modules.0.transformer_blocks.0.attn{n}.{to}"
        layer = theirs.get_submodule(name)
        down = torch.randn(4, layer.in_features, generator=generator) / 4
        up = torch.randn(layer.out_features, 4, generator=generator) / 4
        factor = 0.8
        match spelling:
            case "animatediff" | "diffusers":
                parts = "_lora.down", "_lora.up"
                name = name.removesuffix(".0").replace(f"attn{n}.", f"attn{n}.processor.")
                if spelling == "animatediff":
                    name = name.replace("transformer_blocks", "temporal_transformer.transformer_blocks")
                    name = name.replace(f"attn{n}", f"attention_blocks.{n - 1}")
                else:
                    name = f"unet.{name}"
            case "peft":
                name, parts = f"unet.{name}", (".lora_A", ".lora_B")
            case _:
                name, parts = "lora_unet_" + name.replace(".", "_"), (".lora_down", ".lora_up")
                lora[f"{name}.alpha"] = torch.tensor(2.0)
                factor *= 2 / 4  # over the rank
        lora |= {f"{name}{part}.weight": tensor for part, tensor in zip(parts, (down, up), strict=True)}
        layer.register_forward_hook(lambda _, x, y, d=down, u=up, f=factor: y + f * x[0] @ d.T @ u.T)
    plain = MotionUNet(image, adapter()).eval()
    merge_lora(motion, lora, 0.8)
    with torch.inference_mode():
        wanted = theirs(z.movedim(0, 1)[None], TIME, WORDS, return_dict=False)[0][0, :, 0]
        found, *_ = MotionUNet(image, motion).eval()(z, TIME, WORDS, *memory().inputs(1.0))
        before, *_ = plain(z, TIME, WORDS, *memory().inputs(1.0))
    assert (found[0] - wanted).abs().max() <= 1e-4
    assert (before[0] - wanted).abs().max() > 0.01


def test_domain_adapter_is_merged_into_the_unet_with_its_scale() -> None:
    """v3's adapter is a LoRA of the image model's own attentions."""
    image, key = unet(), "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    layer = image.get_submodule(f"{key}.to_out.0")
    before, down, up = layer.weight.clone(), torch.randn(4, 32), torch.randn(32, 4)
    names = [f"{key}.processor.to_out_lora.{part}.weight" for part in ("down", "up")]
    merge_lora(image, dict(zip(names, (down, up), strict=True)), 0.5)
    assert (layer.weight - (before + 0.5 * up @ down)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"up_blocks.9.attn1.to_q.lora_A.weight": torch.ones(1, 1)}, "another model"),
        ({"mid_block.attentions.0.proj_in.weight": torch.ones(1, 1)}, "not a LoRA"),
        ({"mid_block.motion_modules.0.proj_in.lora_A.weight": torch.ones(1, 1)}, "incomplete"),
    ],
)
def test_lora_that_does_not_fit_is_refused(lora: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_lora(adapter(), lora)


def test_adapter_that_does_not_fit_is_refused() -> None:
    options = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8}
    for channels, layers in [((32, 64, 64), 1), ((32, 32), 1), ((32, 64), 2)]:
        with pytest.raises(UserError, match="motion adapter"):
            MotionUNet(unet(), MotionAdapter(block_out_channels=channels, motion_layers_per_block=layers, **options))


def test_module_that_the_adapter_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"no up_blocks\.1\.motion_modules\.9"):
        MotionUNet(unet(), adapter(), ["up_blocks.1.motion_modules.1", "up_blocks.1.motion_modules.9"])


def test_window_longer_than_the_position_table_is_refused() -> None:
    motion_specs(adapter(), SIZE, Window.of(12))
    with pytest.raises(UserError, match="12 positions"):
        motion_specs(adapter(), SIZE, Window.of(13))


def test_openvino_engine_streams_the_same() -> None:
    frames, only = clip(7), ["up_blocks.1"]
    inputs, outputs = motion_specs(adapter(), SIZE, WINDOW, only=only)
    plain = TensorSpec("z", (1, 4, *SIZE)), TensorSpec("t", (1,)), TensorSpec("words", (1, 5, 32))
    spec = EngineSpec("motion", plain + inputs, (TensorSpec("output", (1, 4, *SIZE)), *outputs), "random", "fp32")
    engine = OpenVINOBackend(threads=1).load(lambda: network(only=only), spec)
    shapes = cache_shapes(adapter(), SIZE, only)
    wanted = streamed(network(only=only), Rolling(WINDOW, shapes), frames)
    assert (streamed(engine, Rolling(WINDOW, shapes), frames) - wanted).abs().max() <= 1e-3
