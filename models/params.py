"""The one settings schema: TOML files, `--set`, HTTP and the page's controls all come from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Style(_Section):
    """What the picture should look like."""

    prompt: Annotated[str, Field(max_length=2000, description="what it should look like")] = "oil painting"
    negative: Annotated[str, Field(max_length=2000, description="what it should not look like (guidance > 1)")] = ""
    strength: Annotated[float, Field(gt=0, le=1, description="how far from the camera picture, 0–1")] = 1.0
    steps: Annotated[int, Field(ge=1, le=8, description="denoising steps")] = 1
    guidance: Annotated[float, Field(ge=0, le=30, description="classifier-free guidance; ≤ 1 = off")] = 1.0
    image_guidance: Annotated[
        float, Field(ge=0, le=10, description="how much to hold on to the camera picture (guidance > 1)")
    ] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32, description="noise seed")] = 1
    seed_mode: Annotated[
        Literal["fixed", "per-frame", "flow"],
        Field(description="same noise for every frame, new noise, or noise that moves with the scene"),
    ] = "fixed"
    blend_frames: Annotated[
        int, Field(ge=0, le=600, description="diffused frames in which a changed prompt or style picture takes hold")
    ] = 0
    guidance_mode: Annotated[
        Literal["full", "self", "onetime-negative", "four-way"],
        Field(description="guidance > 1: a pass of its own per step, residual (StreamDiffusion), or Style-A-Video's"),
    ] = "full"
    delta: Annotated[float, Field(ge=0, le=2, description="how much of the residual counts (guidance_mode self …)")] = (
        1.0
    )
    mask_guidance: Annotated[
        float, Field(ge=0, le=10, description="how much what stands out counts (guidance_mode four-way)")
    ] = 0.0
    control: Annotated[
        str,
        Field(
            max_length=1000,
            description="ControlNets: kind[=folder][:weight][@start-end][!mode], …, as canny:0.8, tile@0-0.6",
        ),
    ] = ""
    lora: Annotated[str, Field(max_length=2000, description="LoRAs: ink.safetensors:0.8, other.safetensors")] = ""
    lora_rank: Annotated[
        int,
        Field(ge=0, le=512, description="room for LoRAs to change while running; 0 = what is asked for at the start"),
    ] = 0
    picture: Annotated[str, Field(max_length=1000, description="a picture whose style is wanted (IP-Adapter)")] = ""
    picture_scale: Annotated[float, Field(ge=0, le=2, description="how much the style picture counts")] = 0.5
    picture_adapter: Annotated[
        str, Field(max_length=1000, description="folder of the IP-Adapter; empty = the model's own, or the fetched one")
    ] = ""
    embeddings: Annotated[
        str, Field(max_length=2000, description="files of textual inversions, whose words prompts may then use")
    ] = ""
    safety: Annotated[
        Literal["off", "blank", "previous"],
        Field(description="safety checker: what is shown instead of unsafe pictures"),
    ] = "off"


class Temporal(_Section):
    """How frames hang together in time."""

    mode: Annotated[
        Literal["auto", "every-frame", "cadence", "reproject"],
        Field(description="diffuse every frame, every Nth, or as often as the device can"),
    ] = "auto"
    cadence: Annotated[
        int, Field(ge=0, le=60, description="mode cadence: diffuse every Nth frame; 0 = by its cost")
    ] = 0
    latency_ms: Annotated[
        float, Field(ge=0, le=10_000, description="mode auto: capture → output to stay under, ms; 0 = one frame")
    ] = 0.0
    refiner: Annotated[
        Literal["auto", "off", "analytic", "learned"], Field(description="takes out flicker along the source's motion")
    ] = "auto"
    flow: Annotated[
        Literal["auto", "dis", "raft"],
        Field(description="optical flow: raft needs `livestyle fetch raft-small`; auto takes it where a GPU has it"),
    ] = "auto"
    window: Annotated[int, Field(ge=0, le=16, description="frames of the rolling AnimateDiff buffer; 0 = off")] = 0
    motion_scale: Annotated[float, Field(ge=0, le=2, description="how much the rolling buffer counts")] = 1.0
    refresh: Annotated[
        int, Field(ge=0, le=8, description="newest frames of the rolling buffer that are computed again each time")
    ] = 0
    bank: Annotated[
        int, Field(ge=0, le=8, description="frames whose features the present one may look at; 0 = off")
    ] = 0
    bank_every: Annotated[int, Field(ge=1, le=60, description="diffused frames between two entries of the bank")] = 4
    fusion: Annotated[float, Field(ge=0, le=1, description="how much alike features of the bank are taken over")] = 0.0
    stream_batch: Annotated[
        bool, Field(description="several frames at different steps in one call; each comes out steps - 1 frames later")
    ] = False
    smoothing: Annotated[
        float, Field(ge=0, le=0.95, description="how much each step's picture is led to the last frame's, moved along")
    ] = 0.0
    skip_similar: Annotated[
        float, Field(ge=0, le=1, description="frames as alike as this are not diffused again, such as 0.98; 0 = off")
    ] = 0.0
    feedback: Annotated[
        float, Field(ge=0, le=0.4, description="how much each frame starts from the last result (strength < 1)")
    ] = 0.0


class Engines(_Section):
    """How networks are compiled; on TensorRT, and passed over by other engines."""

    fp8: Annotated[
        bool, Field(description="the UNet in 8-bit floats where its pictures stay close; cards from sm_89 on")
    ] = False
    refit: Annotated[
        bool, Field(description="UNets of equal architecture take each other's weights without being built again")
    ] = False


class Debug(_Section):
    """For tests and demonstrations."""

    style_delay_ms: Annotated[float, Field(ge=0, le=60_000, description="slows every diffused picture, ms")] = 0.0
    flicker: Annotated[float, Field(ge=0, le=1, description="adds fresh noise to every diffused picture")] = 0.0


class SinkSettings(_Section):
    """How results are written."""

    codec: Annotated[Literal["h264", "ffv1", "mpeg4"], Field(description="codec of file sinks")] = "h264"
    crf: Annotated[int, Field(ge=0, le=51, description="x264 quality, lower is better")] = 18


class FrameSettings(_Section):
    """How a source's pictures are brought to the model's size."""

    fit: Annotated[
        Literal["fit", "crop", "stretch"],
        Field(description="keep the aspect by a smaller frame, by cutting, or give it up"),
    ] = "fit"


class Params(_Section):
    """Every setting of a session. Immutable: a live change is a new `Params`.

    >>> Params().style.steps
    1
    """

    style: Style = Style()
    temporal: Temporal = Temporal()
    frame: FrameSettings = FrameSettings()
    engine: Engines = Engines()
    debug: Debug = Debug()
    sink: SinkSettings = SinkSettings()
