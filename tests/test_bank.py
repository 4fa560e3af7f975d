"""The bank: equal to attention over the frames side by side, one ring per row, and never a word about the future."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.bank import Bank, BankMemory, bank_layers
from models.self_attention import Masking, SelfMask
from models.unet import Call, Denoise, Feature, Seen

SIZE = (7, 6)  # latents, height and width: odd, so that a downsampler has to round
WORDS = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def unet() -> UNet2DConditionModel:
    """Self-attention at both levels, with maps far from even."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "attn1.to_" in name and name.endswith("weight"):
                parameter.mul_(3)
    return net.requires_grad_(False)


def bank(slots: int = 2, rows: int = 1, **choice: Any) -> Bank:
    return Bank(bank_layers(unet().config, SIZE, **choice), slots, rows)


def names(features: Sequence[Feature]) -> list[str]:
    return ["z", "t", "words", *(spec.name for feature in features for spec in feature.inputs)]


def graph(*features: Feature) -> Denoise:
    return Denoise(unet(), names(features), features).eval()


def clip(frames: int, seed: int = 2, rows: int = 1) -> Tensor:
    return torch.randn(frames, rows, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


def call_of(z: Tensor, rows: range | None = None, *, every: int = 1, fusion: float = 0.0, **more: Any) -> Call:
    rows = rows or range(len(z))
    t = torch.tensor([499.0 - 100 * row for row in rows])
    frames = (Seen(None, {"bank_every": every, "fusion": fusion}),) * len(z)
    return Call(z, t, WORDS.expand(len(z), -1, -1), rows, tuple(rows), len(rows), frames, **more)


def step(net: Any, memory: BankMemory, call: Call) -> Tensor:
    """One call as a stream makes it; `net` is a graph or an engine."""
    inputs = {"z": call.z, "t": call.t, "words": call.words, **memory.inputs(call), **Masking().inputs(call)}
    features = [memory.bank, *([SelfMask()] if call.masked else [])]
    output, *found = net(*(inputs[name].contiguous() for name in names(features)))
    memory.keep(call, dict(zip((spec.name for spec in memory.bank.outputs), found, strict=True)))
    return output.clone()


@torch.inference_mode()
def streamed(net: Any, memory: BankMemory, frames: Tensor, **settings: Any) -> Tensor:
    return torch.stack([step(net, memory, call_of(z, **settings)) for z in frames])


@torch.inference_mode()
def plain(frames: Tensor, net: UNet2DConditionModel | None = None) -> Tensor:
    net = net or unet()
    calls = [call_of(z) for z in frames]
    return torch.stack([net(call.z, call.t, call.words, return_dict=False)[0] for call in calls])


class SideBySide:
    """The formulas as they stand: past frames' tokens beside the present's, and fusion token by token."""

    def __init__(self, fusion: float, alike: float) -> None:
        self.past: list[tuple[Tensor, Tensor, Tensor]] = []
        self.now: tuple[Tensor, Tensor, Tensor] | None = None
        self.fusion, self.alike = fusion, alike
        self.taken = 0

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None = None, **_: Any) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        keys, values = torch.cat([k, *(p[0] for p in self.past)], 1), torch.cat([v, *(p[1] for p in self.past)], 1)
        heads = [torch.stack(t.chunk(attn.heads, -1), 1) for t in (q, keys, values)]
        o: Tensor = attn.to_out[0](torch.cat(F.scaled_dot_product_attention(*heads).unbind(1), -1))
        if self.past and self.fusion:
            stored = torch.cat([p[2] for p in self.past], 1)[0]
            for i, token in enumerate(o[0].clone()):
                cosines = F.cosine_similarity(token[None], stored)
                if cosines.max() >= self.alike:
                    o[0, i] = (1 - self.fusion) * token + self.fusion * stored[cosines.argmax()]
                    self.taken += 1
        self.now = (k, v, o.clone())
        return o


@torch.inference_mode()
def side_by_side(frames: Tensor, slots: int, every: int, fusion: float = 0.0, alike: float = 0.0) -> tuple[Tensor, int]:
    net, outputs = unet(), []
    layers = {name: SideBySide(fusion, alike) for name, module in net.named_modules() if name.endswith("attn1")}
    for name, layer in layers.items():
        net.get_submodule(name).set_processor(layer)
        layer.fusion = fusion if name.startswith(("mid_block", "up_blocks.0")) else 0.0
    for i, z in enumerate(frames):
        outputs.append(plain(z[None], net)[0])
        for layer in layers.values():
            assert layer.now is not None
            layer.past = [*layer.past, layer.now][-slots:] if i % every == 0 else layer.past
    return torch.stack(outputs), sum(layer.taken for layer in layers.values())


@pytest.mark.parametrize(("slots", "every"), [(1, 1), (2, 1), (3, 2)])
def test_equals_attention_over_the_frames_side_by_side(slots: int, every: int) -> None:
    frames = clip(6)
    seen = bank(slots)
    ours = streamed(graph(seen), BankMemory(seen), frames, every=every)
    theirs, _ = side_by_side(frames, slots, every)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours[1:] - plain(frames)[1:]).abs().max() > 1e-2, "the bank changes what frames become"


def test_fusion_equals_the_formula_token_by_token() -> None:
    frames = clip(1) + 0.02 * clip(4, seed=5)
    seen = bank(2, fused=("mid_block", "up_blocks.0"))
    ours = streamed(graph(seen), BankMemory(seen, alike=0.999), frames, fusion=0.7)
    theirs, taken = side_by_side(frames, 2, 1, 0.7, 0.999)
    assert 0 < taken < 3 * len(frames) * 2 * 12, "some tokens are alike and some are not"
    assert (ours - theirs).abs().max() < 1e-5


def test_an_empty_bank_is_the_plain_unet() -> None:
    frames, seen = clip(1), bank(4)
    assert (streamed(graph(seen), BankMemory(seen), frames, fusion=1.0) - plain(frames)).abs().max() < 3e-6


def test_fusion_zero_is_identity() -> None:
    frames = clip(1).expand(4, -1, -1, -1, -1)
    fusing, not_fusing = bank(), bank(fused=())
    assert not not_fusing.fuses
    ours = streamed(graph(fusing), BankMemory(fusing, alike=0.1), frames, fusion=0.0)
    assert torch.equal(ours, streamed(graph(not_fusing), BankMemory(not_fusing), frames))


def test_the_same_frame_again_stays_what_it_was() -> None:
    """Weights over equal keys are shared among them; fusion finds each token itself."""
    frames, seen = clip(1).expand(5, -1, -1, -1, -1), bank(3)
    ours = streamed(graph(seen), BankMemory(seen), frames, fusion=0.8)
    assert (ours - plain(frames)).abs().max() < 1e-5


def test_levels_and_blocks_can_be_left_out() -> None:
    paths = [layer.path for layer in bank().layers]
    assert len(paths) == 2 * 3 + 1
    assert {layer.places for layer in bank().layers} == {7 * 6, 4 * 3}
    deep = bank_layers(unet().config, SIZE, only=(1,))
    assert {layer.places for layer in deep} == {4 * 3}
    assert [layer.path for layer in bank_layers(unet().config, SIZE, only=("mid_block",))] == [MID]
    frames, seen = clip(3), bank(only=(1,), fused=())
    assert (streamed(graph(seen), BankMemory(seen), frames)[1:] - plain(frames)[1:]).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"no self-attention in up_blocks\.7"):
        bank_layers(unet().config, SIZE, only=("up_blocks.7",))


def test_another_unet_than_the_configurations_is_refused() -> None:
    config = dict(unet().config) | {"block_out_channels": (32, 64)}
    with pytest.raises(UserError, match="does not fit"):
        graph(Bank(bank_layers(config, SIZE), 1))


def marked(memory: BankMemory, value: float, rows: range) -> dict[str, Tensor]:
    """Outputs of a call whose every number says which frame it was."""
    shapes = {spec.name: spec.shape[1:] for spec in memory.bank.outputs}
    return {name: torch.full((len(rows), *shape), float(value)) for name, shape in shapes.items()}


def frames_in(memory: BankMemory, row: int = 0) -> list[int]:
    (layer, *_) = memory.tensors.values()
    return [int(layer[row, slot, 0, 0]) for slot in range(min(memory.stored[row], memory.bank.slots))]


def run(memory: BankMemory, frames: Sequence[int], rows: range = range(1), **call: Any) -> None:
    for frame in frames:
        memory.keep(call_of(torch.zeros(len(rows), 4, *SIZE), rows, **call), marked(memory, frame, rows))


@pytest.mark.parametrize(
    ("slots", "every", "sink", "expected"),
    [
        (2, 1, False, [[0], [0, 1], [2, 1], [2, 3], [4, 3], [4, 5], [6, 5]]),
        (2, 3, False, [[0], [0], [0], [0, 3], [0, 3], [0, 3], [6, 3]]),
        (3, 1, True, [[0], [0, 1], [0, 1, 2], [0, 3, 2], [0, 3, 4], [0, 5, 4], [0, 5, 6]]),
        (1, 1, True, [[0], [1], [2], [3], [4], [5], [6]]),
    ],
)
def test_the_newest_overwrites_the_oldest(slots: int, every: int, sink: bool, expected: list[list[int]]) -> None:
    memory = BankMemory(bank(slots), sink=sink)
    for frame, slots_hold in enumerate(expected):
        run(memory, [frame], every=every)
        assert frames_in(memory) == slots_hold


def test_the_first_frame_of_a_shot_is_stored_at_once_and_the_last_shot_forgotten() -> None:
    memory = BankMemory(bank())
    run(memory, range(6), every=4)
    memory.reset()
    assert memory.inputs(call_of(clip(1)[0]))["bank_mask"].tolist() == [[-1e4, -1e4]]
    run(memory, [6, 7], every=4)
    assert frames_in(memory) == [6]
    frames = clip(9)
    again, fresh, net = BankMemory(bank()), BankMemory(bank()), graph(bank())
    streamed(net, again, frames[:4])
    again.reset()
    assert torch.equal(streamed(net, again, frames[4:]), streamed(net, fresh, frames[4:]))


def test_each_row_has_its_own_past() -> None:
    """Rows one by one in calls of one row equal both at once, also when one is a frame behind as in a stream batch."""
    frames, both, one = clip(4, rows=2), bank(rows=2), bank()
    together = streamed(graph(both), BankMemory(both, 2), frames)
    memory, net = BankMemory(one, 2), graph(one)
    with torch.inference_mode():
        apart = [[step(net, memory, call_of(z[row : row + 1], range(row, row + 1))) for row in (0, 1)] for z in frames]
    assert (together - torch.stack([torch.cat(rows) for rows in apart])).abs().max() < 1e-5


def test_rows_may_be_filled_to_different_depths_and_forget_apart() -> None:
    memory = BankMemory(bank(rows=2), 2)
    run(memory, [0], range(2), live=(True, False))
    run(memory, [1, 2], range(2), live=(True, True))
    run(memory, [3], range(2), live=(True, False))
    assert (frames_in(memory, 0), frames_in(memory, 1)) == ([2, 3], [1, 2])
    memory.reset(0)
    run(memory, [4], range(2))
    assert (frames_in(memory, 0), frames_in(memory, 1)) == ([4], [4, 2])
    assert memory.inputs(call_of(clip(1, rows=2)[0]))["bank_mask"].tolist() == [[0, -1e4], [0, 0]]


def test_memory_is_constant_and_past_frames_stay_bit_for_bit() -> None:
    frames, seen = clip(8), bank(3)
    memory, net = BankMemory(seen), graph(seen)
    places = {name: tensor.data_ptr() for name, tensor in memory.tensors.items()}
    size, before = memory.nbytes, None
    assert size == sum(t.nbytes for t in memory.tensors.values()) > 0
    for i, z in enumerate(frames):
        with torch.inference_mode():
            step(net, memory, call_of(z))
        if before is not None:
            kept = [slot for slot in range(3) if slot != i % 3]
            assert all(torch.equal(memory.tensors[name][0, kept], old[0, kept]) for name, old in before.items())
        before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
    assert places == {name: tensor.data_ptr() for name, tensor in memory.tensors.items()}
    assert memory.nbytes == size


def test_the_future_changes_nothing_before_it() -> None:
    frames, seen = clip(6), bank(2)
    other = torch.cat([frames[:4], clip(2, seed=9)])
    net = graph(seen)
    ours, theirs = (streamed(net, BankMemory(seen), f, fusion=0.5) for f in (frames, other))
    assert torch.equal(ours[:4], theirs[:4])
    assert not torch.equal(ours[4], theirs[4])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stored(value: float) -> None:
    memory = BankMemory(bank(rows=2), 2)
    run(memory, [0, 1], range(2))
    broken = marked(memory, 2, range(2))
    broken["new_bank_v3"][0, 0, 0] = value
    memory.keep(call_of(clip(1, rows=2)[0]), broken)
    assert memory.stored == [0, 3]
    assert all(tensor.isfinite().all() for tensor in memory.tensors.values())


def test_noisy_frames_become_steadier() -> None:
    """The same scene under other noise in every frame: by looking at frames before, and more by fusing features."""
    frames = clip(1) + 0.1 * clip(10, seed=7)
    seen, net = bank(1), graph(bank(1))

    def unrest(video: Tensor) -> float:
        return float(video.diff(dim=0).abs().mean())

    looked, fused = (unrest(streamed(net, BankMemory(seen, alike=0.5), frames, fusion=f)) for f in (0.0, 0.8))
    assert looked < 0.85 * unrest(plain(frames))
    assert fused < 0.9 * looked


def test_a_window_with_refreshed_frames_shares_its_rows_past() -> None:
    """Two frames per row: each attends to the row's bank, and the newest is stored."""
    frames = clip(2, rows=2)
    seen, net = bank(1), graph(bank(1))
    memory = BankMemory(seen)
    with torch.inference_mode():
        step(net, memory, call_of(frames[0, :1]))
        apart, inputs = [], memory.inputs(call_of(frames[1, :1]))
        for z in (frames[1, :1], frames[1, 1:]):
            given = {"z": z, "t": torch.tensor([499.0]), "words": WORDS, **inputs}
            apart.append(net(*(given[name] for name in names([seen]))))
        given["z"] = frames[1]
        given |= {name: given[name].repeat_interleave(2, 0) for name in ("t", "words")}
        output, *found = net(*(given[name] for name in names([seen])))
    assert (output - torch.cat([a[0] for a in apart])).abs().max() < 1e-5
    assert all(torch.allclose(new, last, atol=1e-4) for new, last in zip(found, apart[1][1:], strict=True))


def test_engines_agree_with_torch_over_a_stream() -> None:
    seen, mask = bank(2, rows=2), SelfMask(rows=2)
    base = (TensorSpec("z", (2, 4, *SIZE)), TensorSpec("t", (2,)), TensorSpec("words", (2, 5, 32)))
    output = TensorSpec("output", (2, 4, *SIZE))
    spec = EngineSpec("unet", (*base, *seen.inputs, *mask.inputs), (output, *seen.outputs), "x", "fp32")
    videos = []
    for backend in (TorchBackend(), OpenVINOBackend(threads=1)):
        engine = backend.load(lambda: graph(bank(2, rows=2), SelfMask(rows=2)), spec)
        memory = BankMemory(seen, 2, alike=0.9)
        videos.append(streamed(engine, memory, clip(4, rows=2), fusion=0.5, masked=(False, True)))
    assert (videos[0] - videos[1]).abs().max() < 1e-3
