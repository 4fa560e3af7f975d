"""The table of add-ons: what a model can be given besides, each a row that `livestyle fetch` brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import UserError
from models.rows import LIST, Row, Source
from models.spec import HALF, SD15

FAMILIES = {768: "sd15", 1024: "sd21", 2048: "sdxl"}  # by the width of the words that a UNet reads
SPOKEN = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1 and SD-Turbo", "sdxl": "Stable Diffusion XL"}
VISION = "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030"  # CLIP ViT-H, as it is published everywhere


@dataclass(frozen=True, slots=True)
class AddOn(Row):
    """One add-on. A ControlNet's kind is its name in `style.control`."""

    kind: str = ""
    family: str = ""  # "" = serves every model


def _control(kind: str, family: str, repo: str, file: str, megabytes: float, licence: str) -> AddOn:
    return AddOn(
        name=f"controlnet-{family}-{kind}",
        about=f"ControlNet, {kind}, for {SPOKEN[family]}",
        licence=licence,
        megabytes=megabytes,
        sources=(Source("", repo, ("config.json", file)),),
        kind=kind,
        family=family,
    )


def _picture(family: str, file: str, megabytes: float) -> AddOn:
    return AddOn(
        name=f"ip-adapter-{family}",
        about=f"IP-Adapter: a picture as the style, for {SPOKEN[family]}",
        licence="Apache-2.0",
        megabytes=megabytes,
        sources=(
            Source("", "h94/IP-Adapter", (file,)),
            Source(
                "image_encoder",
                "h94/IP-Adapter",
                ("models/image_encoder/config.json", "models/image_encoder/model.safetensors"),
                sha256=(("models/image_encoder/model.safetensors", VISION),),
            ),
        ),
        kind="picture",
        family=family,
    )


WHOLE = (".safetensors", ".onnx")  # endings of weights, one file each

# ControlNet 1.1 (Zhang and Agrawala 2023, arXiv 2302.05543). Where a repository's own branch has no safetensors, the
# pickled weights are fetched and written anew as safetensors; see `weights.unpickled`.
PICKLED = "diffusion_pytorch_model.bin"
ADDONS: dict[str, AddOn] = {
    row.name: row
    for row in (
        *(
            _control(kind, "sd15", f"lllyasviel/control_{version}_sd15_{kind}", HALF, 723, "OpenRAIL")
            for kind, version in (
                ("canny", "v11p"),
                ("lineart", "v11p"),
                ("softedge", "v11p"),
                ("depth", "v11f1p"),
                ("openpose", "v11p"),
            )
        ),
        _control("tile", "sd15", "lllyasviel/control_v11f1e_sd15_tile", PICKLED, 1445, "OpenRAIL"),
        *(
            _control(
                kind,
                "sd21",
                f"thibaud/controlnet-sd21-{kind}-diffusers",
                PICKLED,
                729,
                "other (its card: that of the preprocessor)",
            )
            for kind in ("canny", "depth")
        ),
        *(
            _control(kind, "sdxl", f"diffusers/controlnet-{kind}-sdxl-1.0-small", HALF, 320, "OpenRAIL++")
            for kind in ("canny", "depth")
        ),
        _picture("sd15", "models/ip-adapter_sd15.safetensors", 2573),
        _picture("sdxl", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 3227),
        AddOn(
            name="depth-anything-small",
            about="Depth Anything V2 small: distances, for depth control",
            licence="Apache-2.0",
            megabytes=99.2,
            sources=(
                Source(
                    "",
                    "depth-anything/Depth-Anything-V2-Small-hf",
                    ("config.json", "model.safetensors", "preprocessor_config.json"),
                ),
            ),
            kind="distances",
        ),
        AddOn(
            name="rtmo-small",
            about="RTMO small: people's poses, for openpose control",
            licence="Apache-2.0",
            megabytes=39.6,
            sources=(
                Source(
                    "",
                    "Xenova/RTMO-s",  # OpenMMLab's network as ONNX
                    ("config.json", "onnx/model.onnx"),
                    revision="d8c526187f341d287753831c9c8b1ecc4855bba1",
                    sha256=(("onnx/model.onnx", "1cd6a3517658903233e9ccb78666554862f57f0944b6886e2048093594aef4e7"),),
                ),
            ),
            kind="bodies",
        ),
        AddOn(
            name="raft-small",
            about="RAFT-small: optical flow, for temporal.flow=raft",
            licence="BSD-3-Clause; trained on FlyingChairs and FlyingThings3D, which are for research",
            megabytes=4.0,
            sources=(
                Source(
                    "",
                    "https://download.pytorch.org/models",  # torchvision's; part of the digest is in the name
                    ("raft_small_C_T_V2-01064c6d.pth",),
                    sha256=(("raft_small_C_T_V2-01064c6d.pth", "01064c6d"),),
                ),
            ),
            kind="flow",
        ),
        AddOn(
            name="safety-checker",
            about="Stable Diffusion's safety checker, for style.safety",
            licence="CreativeML OpenRAIL-M",
            megabytes=608,
            sources=(
                Source("", SD15, ("safety_checker/config.json", "safety_checker/model.fp16.safetensors")),
                Source("", SD15, ("feature_extractor/preprocessor_config.json",)),
            ),
            kind="safety",
        ),
    )
}


def addon(kind: str, family: str = "") -> Path:
    """The folder of a fetched add-on, its files looked over; UserError says how to get it.

    `kind` is a control's name, or "picture", "distances", "bodies", "flow", "safety"; `family` is that of `family_of`.

    >>> addon("canny", family_of(folder.config("unet")))
    """
    from models.weights import sound

    row = next((row for row in ADDONS.values() if row.kind == kind and row.family in ("", family)), None)
    if row is None:
        what = "IP-Adapter" if kind == "picture" else f"ControlNet for {kind}"
        key = "style.picture_adapter=FOLDER" if kind == "picture" else f"style.control={kind}=FOLDER"
        there = [row.kind for row in ADDONS.values() if row.family == family and row.kind != "picture"]
        has = f"there are ones for {', '.join(there)}; " if there and kind != "picture" else ""
        raise UserError(
            f"no {what} is known for {SPOKEN.get(family, 'this kind of model')}", hint=f"{has}one of yours: {key}"
        )
    if not any(file.name == "config.json" or file.suffix in WHOLE for file in row.folder.glob("*")):
        size = f"{row.megabytes / 1000:.1f} GB" if row.megabytes >= 1000 else f"{row.megabytes:.0f} MB"
        raise UserError(f"{row.name} is not here yet ({size})", hint=f"`livestyle fetch {row.name}`")
    return sound(row.folder, row.name)


def family_of(unet: dict[str, Any]) -> str:
    """The family of a model by its UNet's configuration: "sd15", "sd21", "sdxl", or "" for any other."""
    width = unet.get("cross_attention_dim")
    return FAMILIES.get(width, "") if isinstance(width, int) else ""


def addons() -> list[dict[str, Any]]:
    """A row per add-on for `livestyle models`: name, about, licence, megabytes, ready, kind, family."""
    return [
        {
            "name": row.name,
            "about": row.about,
            "licence": row.licence,
            "megabytes": row.megabytes,
            "ready": (row.folder / LIST).is_file(),
            "kind": row.kind,
            "family": row.family,
        }
        for row in ADDONS.values()
    ]
