"""Every network that is exported, small: `python -m tests.exported` prints how near each one's file is to eager."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from accel.engine import Backend, EngineSpec
from accel.export import OLDER, OPSET, Exported, example, export, parity
from models.bank import Bank, bank_layers
from models.controlnet import control_folder, control_graph
from models.folder import Folder
from models.image_prompt import ImagePrompt
from models.ip_adapter import find_adapter
from models.motion import Motion
from models.networks import Graph, graphs
from models.raft import RaftNet, flow_engine
from models.refiner import load_refiner
from models.residuals import Residuals
from models.rolling import Window
from models.self_attention import SelfMask
from models.slots import Slots
from models.unet import Feature
from tests.folders import random_folder, random_xl_folder
from tests.test_controlnet import random_controlnet
from tests.test_image_prompt import random_adapter as random_picture_adapter
from tests.test_stylizer_rolling import with_adapter

SIZE = (64, 64)
LATENT = (1, 4, 8, 8)
MOVING = ["down_blocks.1.motion_modules.0", "up_blocks.0.motion_modules.1"]
SPELT_OUT = (  # exported without the operator Attention
    "unet, bank and mask",  # ONNX Runtime's takes no mask that all queries share; TensorRT's does
    "unet, style picture",  # TensorRT-RTX 1.7.1 crashes, and the backend then does the same
)


def sd(root: Path) -> Folder:
    """A random folder, with a motion adapter: made once per root."""
    path = root / "sd"
    return Folder(path if path.exists() else with_adapter(random_folder(path, "sd"), only=MOVING))


def part(name: str, root: Path) -> Graph:
    return graphs(sd(root), SIZE)[name]


def widened(feature: Callable[[Folder, Path], Feature], root: Path) -> Graph:
    folder = sd(root)
    return graphs(folder, SIZE, features=[feature(folder, root)])["unet"]


def picture_prompt(folder: Folder, root: Path) -> Feature:
    path = random_picture_adapter(root / "ip", folder.unet(), "base")
    return ImagePrompt(find_adapter(path, int(folder.config("unet")["cross_attention_dim"])))


def with_bank(root: Path) -> Graph:
    """The bank and the mask together: they share their attention."""
    folder = sd(root)
    bank = Bank(bank_layers(folder.config("unet"), LATENT[2:]), slots=2)
    return graphs(folder, SIZE, features=[bank, SelfMask()])["unet"]


def xl(root: Path) -> Graph:
    path = random_xl_folder(root / "xl")
    torch.manual_seed(2)
    config = UNet2DConditionModel.load_config(path / "unet") | {"transformer_layers_per_block": (1, 1, 1)}
    UNet2DConditionModel.from_config(config).save_pretrained(path / "unet")
    return graphs(Folder(path), SIZE)["unet"]


def controlnet(root: Path) -> Graph:
    folder = sd(root)
    net = random_controlnet(root / "net", folder.path, seed=3)
    return control_graph(control_folder(f"canny={net}", folder), folder, LATENT)


def mini(name: str, root: Path) -> Graph:
    return graphs(Folder(Path(__file__).parent.parent / "models" / "mini"), SIZE)[name]


def caught(load: Callable[[Backend], object]) -> Graph:
    """What a loader gives its backend to compile."""
    found: list[Graph] = []

    class Caught:
        """A backend that only looks."""

        name = device = fingerprint = "caught"

        def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> None:
            found.append(Graph(module, spec))

    load(Caught())  # type: ignore[arg-type]
    return found[0]


def refiner(root: Path) -> Graph:
    return caught(lambda backend: load_refiner(SIZE, backend))


def flow(root: Path) -> Graph:
    """Both sides are made larger inside."""
    torch.manual_seed(0)
    file = root / "raft.safetensors"
    save_file(RaftNet().state_dict(), file)
    return caught(lambda backend: flow_engine(file, (1, 3, 136, 150), backend))


NETWORKS: dict[str, Callable[[Path], Graph]] = {
    "unet": partial(part, "unet"),
    "unet, K/V ring": partial(widened, lambda folder, root: Motion(folder, LATENT[2:], Window.of(4))),
    "unet, residuals": partial(widened, lambda folder, root: Residuals(folder.config("unet"), LATENT[2:])),
    "unet, style picture": partial(widened, picture_prompt),
    "unet, room for LoRAs": partial(widened, lambda folder, root: Slots(folder.config("unet"), 8)),
    "unet, bank and mask": with_bank,
    "unet, XL": xl,
    "controlnet": controlnet,
    "encode, TAESD": partial(part, "encode"),
    "decode, TAESD": partial(part, "decode"),
    "encode, mini": partial(mini, "encode"),
    "decode, mini": partial(mini, "decode"),
    "refiner": refiner,
    "flow": flow,
}


def inputs_of(spec: EngineSpec) -> dict[str, Tensor]:
    """`accel.export.example`, but within what the product gives: masks hide nothing, an age is at least one frame."""
    given = {s.name: tensor for s, tensor in zip(spec.inputs, example(spec), strict=True)}
    plausible: Mapping[str, Callable[[Tensor], Tensor]] = {
        "mask": torch.zeros_like,
        "bank_mask": torch.zeros_like,
        # What is above a bar is a matter of rounding near it: in float32, files with bars agree to 1e-6.
        "bank_alike": lambda t: torch.full_like(t, 0.98),
        "masked": torch.zeros_like,
        "lora": lambda t: t / 8,
        "age": lambda t: 1 + t.abs(),
        **dict.fromkeys(("stylized", "source", "trust", "now", "before"), Tensor.sigmoid),
        **dict.fromkeys(("apart", "coarse"), lambda t: t / 10),
        "travel": Tensor.abs,
    }
    return {name: plausible[name](tensor) if name in plausible else tensor for name, tensor in given.items()}


def checked(name: str, root: Path, file: Path) -> tuple[Exported, float]:
    """The network exported in half precision, and its error against eager float32."""
    graph = NETWORKS[name](root)
    torch.manual_seed(0)
    module, given = graph.build().eval(), inputs_of(graph.spec)
    with torch.inference_mode():
        found = module(*given.values())
    outputs = (found,) if isinstance(found, Tensor) else found
    wanted = [tensor.clone() for tensor in outputs]
    exported = export(module, graph.spec, file, OLDER if name in SPELT_OUT else OPSET)
    return exported, parity(exported, wanted, given)


def main() -> None:
    print("| network | opset | nodes | largest error | export, s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or NETWORKS:
            started = time.process_time()
            exported, error = checked(name, Path(folder), Path(folder) / "network.onnx")
            seconds = time.process_time() - started
            print(f"| {name} | {exported.opset} | {exported.nodes} | {error:.1e} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
