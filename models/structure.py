"""What of the settings decides which engines a session needs; all else changes between two frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accel.errors import UserError
from models.params import Params
from models.units import controls_of


@dataclass(frozen=True, slots=True)
class Structure:
    """A model's engines besides its weights and size. Another structure is another set of engines."""

    window: int = 0  # frames of the rolling buffer, 0 = off
    refresh: int = 0  # of them, computed again each time
    rows: int = 1  # denoising steps in flight: more than 1 is a stream batch
    spare: bool = False  # a row beside them in each call, for onetime-negative's second pass
    bank: int = 0  # frames whose features the present one may look at
    fused: bool = False  # those that are alike can be taken over
    masked: bool = False  # self-attention can be masked, for Style-A-Video's guidance
    controls: tuple[str, ...] = ()  # ControlNets by kind, or kind=folder: each once, alphabetical
    picture: bool = False  # takes a style picture
    picture_adapter: str = ""  # where from, "" = the model's own
    lora_rank: int = 0  # room for LoRAs in the graph
    lora_everywhere: bool = False  # that room is in every layer, not in attention blocks alone
    embeddings: tuple[str, ...] = ()  # files of textual inversions
    checked: bool = False  # pictures go through the safety checker
    fp8: bool = False  # the UNet may be in 8-bit floats
    refit: bool = False  # the UNet may be made of an engine for other weights

    @property
    def latents(self) -> int:
        """How many one call of the UNet takes."""
        return self.rows + self.spare

    def covers(self, other: Structure) -> bool:
        """Whether engines of this structure can do what the other asks for: what is not used is switched off."""
        room = replace(
            other,
            spare=self.spare,  # without it that pass is a call of its own
            controls=self.controls if {*other.controls} <= {*self.controls} else other.controls,
            picture=self.picture or other.picture,
            masked=self.masked or other.masked,
            checked=self.checked or other.checked,
            fused=self.fused or other.fused,
            lora_rank=max(self.lora_rank, other.lora_rank),
            lora_everywhere=self.lora_everywhere or other.lora_everywhere,
            refit=self.refit or other.refit,
        )
        return room == self


PLAIN = Structure()


def listed(text: str) -> tuple[str, ...]:
    """The entries of a setting between commas."""
    return tuple(entry for part in text.split(",") if (entry := part.strip()))


def structure_of(params: Params) -> Structure:
    """The structure that these settings need; UserError where one cannot be read.

    >>> structure_of(Params()) == Structure()
    True
    """
    style, temporal = params.style, params.temporal
    rows = style.steps if temporal.stream_batch else 1
    if rows > 1 and temporal.feedback:
        raise UserError(
            "temporal.feedback wants the last result, which a stream batch does not have yet",
            hint="temporal.feedback=0, or temporal.smoothing instead, or temporal.stream_batch=false",
        )
    if rows > 1 and temporal.refresh:
        raise UserError("temporal.refresh computes frames again, a stream batch none", hint="temporal.refresh=0")
    found = Structure(
        window=temporal.window,
        refresh=temporal.refresh,
        rows=rows,
        spare=rows > 1 and style.guidance_mode == "onetime-negative" and style.guidance > 1,
        bank=temporal.bank,
        fused=bool(temporal.bank and temporal.fusion),
        masked=style.guidance_mode == "four-way",
        controls=controls_of(style.control),
        picture=bool(style.picture),
        picture_adapter=style.picture_adapter if style.picture else "",
        lora_rank=style.lora_rank,
        embeddings=listed(style.embeddings),
        checked=style.safety != "off",
        fp8=params.engine.fp8,
        refit=params.engine.refit,
    )
    if style.lora:
        from models.worn import beyond_attention, lora_set, rank_of  # reads heads of files: with torch

        worn = lora_set(style.lora)
        rank = rank_of(worn, style.lora_rank)
        return replace(found, lora_rank=rank, lora_everywhere=beyond_attention(worn))
    return found
