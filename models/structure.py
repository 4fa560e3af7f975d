"""What of the settings decides which engines a session needs; all else changes between two frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accel.errors import UserError
from models.params import Params


@dataclass(frozen=True, slots=True)
class Structure:
    """A model's engines besides its weights and size. Another structure is another set of engines."""

    window: int = 0  # frames of the rolling buffer, 0 = off
    refresh: int = 0  # of them, computed again each time
    rows: int = 1  # denoising steps in flight: more than 1 is a stream batch
    bank: int = 0  # frames whose features the present one may look at
    masked: bool = False  # self-attention can be masked, for Style-A-Video's guidance
    controls: tuple[str, ...] = ()  # ControlNets by kind, or kind=folder, in the order of the setting
    picture: bool = False  # takes a style picture
    picture_adapter: str = ""  # where from, "" = the model's own
    lora_rank: int = 0  # room for LoRAs in the graph
    embeddings: tuple[str, ...] = ()  # files of textual inversions

    def covers(self, other: Structure) -> bool:
        """Whether engines of this structure can do what the other asks for: what is not used is switched off."""
        room = replace(
            other,
            controls=self.controls if {*other.controls} <= {*self.controls} else other.controls,
            picture=self.picture or other.picture,
            masked=self.masked or other.masked,
            lora_rank=max(self.lora_rank, other.lora_rank),
        )
        return room == self


PLAIN = Structure()


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
    return Structure(window=temporal.window, refresh=temporal.refresh, rows=rows)
