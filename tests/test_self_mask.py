"""The mask on self-attention: Style-A-Video's formula where it is asked for, nothing where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from accel.errors import UserError
from models import self_attention
from models.bank import BankMemory
from models.self_attention import Masking, SelfMask, self_attentions, standing_out
from models.unet import Denoise
from tests.test_bank import WORDS, bank, call_of, clip, graph, names, plain, step, unet

T = torch.tensor([499.0])


class AsPublished:
    """A = softmax(QKᵀ/√d), ψ = mean(A) of each map, M = 1(A > ψ), and A·M applied to V."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None = None, **_: Any) -> Tensor:
        x = hidden_states
        q, k, v = (torch.stack(to(x).chunk(attn.heads, -1), 1) for to in (attn.to_q, attn.to_k, attn.to_v))
        maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (n, heads, S, S)
        kept = (maps > maps.mean((-2, -1), keepdim=True)) * maps
        found: Tensor = attn.to_out[0](torch.cat((kept @ v).unbind(1), -1))
        return found


@torch.inference_mode()
def masked(value: float, z: Tensor, **choice: Any) -> Tensor:
    net = graph(SelfMask(rows=len(z), **choice))
    (output,) = net(z, T.expand(len(z)), WORDS.expand(len(z), -1, -1), torch.full((len(z),), value))
    return output


@torch.inference_mode()
def published(z: Tensor) -> Tensor:
    net = unet()
    for place in self_attentions(net):
        net.get_submodule(place.path).set_processor(AsPublished())
    return net(z, T.expand(len(z)), WORDS.expand(len(z), -1, -1), return_dict=False)[0]


def test_masked_rows_follow_the_formula() -> None:
    z = clip(1)[0]
    assert (masked(1.0, z) - published(z)).abs().max() < 1e-5
    assert (masked(1.0, z) - plain(z[None])[0]).abs().max() > 1e-2


@torch.inference_mode()
def test_rows_that_are_not_masked_are_the_plain_unets() -> None:
    """But for rounding: torch's fused attention adds up in another order than a whole map."""
    z = clip(1)[0]
    assert (masked(0.0, z) - plain(z[None])[0]).abs().max() < 3e-6
    doubles = (z.double(), T.double(), WORDS.double())
    (output,) = graph(SelfMask()).double()(*doubles, torch.zeros(1).double())
    assert (output - unet().double()(*doubles, return_dict=False)[0]).abs().max() < 1e-12


@torch.inference_mode()
def test_each_row_has_its_own_switch() -> None:
    z = clip(1)[0].expand(3, -1, -1, -1)
    net = graph(SelfMask(rows=3))
    (rows,) = net(z, T.expand(3), WORDS.expand(3, -1, -1), torch.tensor([0.0, 1.0, 0.0]))
    assert (rows[:1] - plain(z[:1][None])[0]).abs().max() < 1e-5
    assert (rows[1:2] - published(z[:1])).abs().max() < 1e-5
    assert (rows[0] - rows[2]).abs().max() < 1e-6


def test_large_maps_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 2, 10, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    once = standing_out(q, k, v, None, torch.ones(2))
    monkeypatch.setattr(self_attention, "LARGEST_MAP", 2 * 2 * 10 * 3)
    assert (standing_out(q, k, v, None, torch.ones(2)) - once).abs().max() < 1e-6


@torch.inference_mode()
def test_an_empty_bank_does_not_move_the_bar() -> None:
    """Hidden keys are no part of the mean: first frames are as without a bank, whichever feature was put in first."""
    z, seen = clip(1)[0], bank(3)
    net = graph(seen, SelfMask())
    for value, expected in ((True, published(z)), (False, plain(z[None])[0])):
        output = step(net, BankMemory(seen), call_of(z, masked=(value,)))
        assert (output - expected).abs().max() < 1e-5
    given = {"z": z, "t": T, "words": WORDS, "masked": torch.ones(1), **BankMemory(seen).inputs(call_of(z))}
    turned = (SelfMask(), bank(3))
    other, *_ = Denoise(unet(), names(turned), turned)(*(given[name] for name in names(turned)))
    assert (other - published(z)).abs().max() < 1e-5


@torch.inference_mode()
def test_a_bank_of_the_same_frame_changes_no_mask() -> None:
    """Every weight is shared among equal keys, and so is the bar."""
    z, seen = clip(1)[0], bank(2)
    net, memory = graph(seen, SelfMask()), BankMemory(seen)
    for _ in range(3):
        output = step(net, memory, call_of(z, masked=(True,)))
        assert (output - published(z)).abs().max() < 1e-4


def test_the_call_says_which_rows_are_masked() -> None:
    z = clip(1, rows=2)[0]
    assert Masking().inputs(call_of(z, masked=(False, True)))["masked"].tolist() == [0, 1]
    assert Masking().inputs(call_of(z))["masked"].tolist() == [0, 0]


def test_an_even_picture_has_finite_results() -> None:
    assert masked(1.0, torch.zeros(1, 4, 7, 6)).isfinite().all()


def test_a_unet_without_self_attention_is_refused() -> None:
    net = UNet2DConditionModel(
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    with pytest.raises(UserError, match="no self-attention"):
        SelfMask().install(net)
