"""A fake hub: an HTTP server that answers for model repositories as the real one does, and fails as it can."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from diffusers import MotionAdapter
from safetensors.torch import save

from models.spec import MODELS
from tests.folders import random_folder, random_xl_folder, tokenizer

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """Serves `files` of (repository, path); the settings below make it a bad one."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    silent: float = 0.0  # s before it says anything
    status: int = 200
    cuts: int = 0  # how many downloads of weights end halfway
    damage: str = ""  # a file whose last byte is sent wrong
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path in the repository, Range)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        time.sleep(self.silent)
        owner, name, _, _, *rest = request.path.strip("/").split("/")
        repo, path = f"{owner}/{name}", "/".join(rest)
        self.asked.append((request.command, path, request.headers.get("Range", "")))
        content = self.files.get((repo, path))
        refusal = ""
        if repo in self.gated:
            refusal = "GatedRepo"
        elif repo not in {known for known, _ in self.files}:
            refusal = "RepoNotFound"
        elif content is None:
            refusal = "EntryNotFound"
        if refusal or self.status != 200 or content is None:
            status = self.status if not refusal else 403 if refusal == "GatedRepo" else 404
            request.send_response(status)
            request.send_header("X-Error-Code", refusal)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        large = path.endswith(".safetensors")
        etag = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        request.send_response(206 if first else 200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("Content-Length", str(len(content) - first))
        if first:
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if body:
            if path == self.damage:
                content = content[:-1] + bytes([content[-1] ^ 1])
            end = len(content)
            if large and self.cuts:
                self.cuts -= 1
                end = first + (end - first) // 2
            with suppress(ConnectionError):
                request.wfile.write(content[first:end])
            request.close_connection = True


def published(row: str, path: Path) -> dict[tuple[str, str], bytes]:
    """The files of a row's repositories, from a small random folder of the same classes."""
    spec = MODELS[row]
    large = spec.pipeline == "StableDiffusionXLPipeline"
    folder = random_xl_folder(path) if large else random_folder(path, "sd")
    small = {
        "unet/diffusion_pytorch_model.fp16.safetensors": "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors": "text_encoder/model.safetensors",
        "text_encoder_2/model.fp16.safetensors": "text_encoder_2/model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors": "motion_adapter/diffusion_pytorch_model.safetensors",
    }
    for words in folder.glob("tokenizer*"):
        (words / "tokenizer.json").unlink()  # the published ones have the older pair of files
        (words / "vocab.json").write_text(json.dumps(tokenizer().get_vocab()))
        (words / "merges.txt").write_text("#version: 0.2\n")
        (words / "special_tokens_map.json").write_text("{}")
    MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).save_pretrained(folder / "motion_adapter")
    lora = {"lora_unet_conv_in.lora_up.weight": torch.ones(16 if large else 32, 1, 1, 1)}
    lora |= {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3), "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    files: dict[tuple[str, str], bytes] = {}
    for source in spec.sources:
        for file in source.files:
            place = small.get(file, file if "/" in file else f"{source.part}/{file}")
            files[source.repo, file] = save(lora) if source.part == "lora" else (folder / place).read_bytes()
    shutil.rmtree(folder)
    return files
