"""Fetching against a fake hub, and what is said where it fails."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save
from transformers import CLIPTokenizer

from accel.errors import UserError
from models import hub as hub_module
from models.addons import ADDONS, AddOn, addon, addons
from models.folder import Folder
from models.load import folder_of, load
from models.spec import MODELS
from models.weights import fault, fetch, fetch_shown, found
from tests.hub import COMMIT, FakeHub, published

UNET = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], bytes]:
    return published("sd-turbo", tmp_path_factory.mktemp("published") / "sd")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written; time-outs are short."""
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.5)


@pytest.fixture
def hub(turbo: dict[tuple[str, str], bytes]) -> Iterator[FakeHub]:
    with FakeHub(dict(turbo)) as fake:
        yield fake


def refused(hub_url: str, name: str = "sd-turbo") -> UserError:
    with pytest.raises(UserError) as caught:
        fetch(name, endpoint=hub_url)
    assert caught.value.hint
    return caught.value


def test_a_fetched_model_loads_by_its_name(hub: FakeHub) -> None:
    folder = fetch("sd-turbo", endpoint=hub.url)
    assert folder == MODELS["sd-turbo"].folder == folder_of("sd-turbo").path
    model = Folder(folder)
    assert model.index["vae"] == ["diffusers", "AutoencoderTiny"]
    assert model.unet() is not None
    assert model.vae() is not None
    assert len(CLIPTokenizer.from_pretrained(folder / "tokenizer")("oil").input_ids) == 5
    assert model.text() is not None
    assert model.scheduler().config["prediction_type"] == "epsilon"


@pytest.mark.parametrize("name", ["sd15-lcm", "sd15-hyper", "sdxl-turbo", "sdxl-lightning", "animatediff-lcm"])
def test_every_other_row_makes_a_folder_too(name: str, tmp_path: Path) -> None:
    with FakeHub(published(name, tmp_path / "published")) as hub:
        folder = folder_of(str(fetch(name, endpoint=hub.url)))
    spec = MODELS[name]
    assert folder.path == spec.folder
    assert folder.index["_class_name"] == spec.pipeline
    assert folder.unet() is not None
    assert folder.text() is not None
    assert folder.has_adapter == (name == "animatediff-lcm")
    if folder.has_adapter:
        assert folder.adapter() is not None
        assert folder.scheduler().config["beta_schedule"] == "linear"
    lora = folder.path / "lora" / "lora.json"
    assert lora.is_file() == (name != "sdxl-turbo")
    if lora.is_file():
        assert json.loads(lora.read_text())["scale"] == spec.recipe.lora_scale


def test_diffusers_own_loader_reads_the_folder(hub: FakeHub) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(fetch("sd-turbo", endpoint=hub.url))
    assert type(pipeline.vae).__name__ == "AutoencoderTiny"
    assert pipeline.safety_checker is None


def test_only_the_needed_files_are_asked_for_and_the_commit_is_kept(hub: FakeHub) -> None:
    folder = fetch("sd-turbo", endpoint=hub.url)
    wanted = {file for source in MODELS["sd-turbo"].sources for file in source.files}
    assert {path for _, path, _ in hub.asked} == wanted
    listed = json.loads((folder / "fetched.json").read_text())["files"]
    assert listed["unet/diffusion_pytorch_model.safetensors"]["commit"] == COMMIT
    assert len(listed["unet/diffusion_pytorch_model.safetensors"]["sha256"]) == 64


def test_progress_goes_from_nothing_to_all(hub: FakeHub, turbo: dict[tuple[str, str], bytes]) -> None:
    seen: list[tuple[int, int]] = []
    fetch("sd-turbo", endpoint=hub.url, report=lambda file, done, total: seen.append((done, total)))
    sizes = sum(len(content) for content in turbo.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sizes, sizes)


def test_the_second_fetch_downloads_nothing(hub: FakeHub) -> None:
    fetch("sd-turbo", endpoint=hub.url)
    hub.asked.clear()
    fetch("sd-turbo", endpoint=hub.url)
    assert {method for method, _, _ in hub.asked} == {"HEAD"}


def test_a_broken_download_goes_on_where_it_stopped(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    length = len(hub.files["stabilityai/sd-turbo", UNET])

    def cable_pulled(file: str, done: int, total: int) -> None:
        if done > length // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("sd-turbo", endpoint=hub.url, report=cable_pulled)
    assert not MODELS["sd-turbo"].folder.exists()
    hub.asked.clear()
    fetch("sd-turbo", endpoint=hub.url)
    (ranged,) = {asked for method, path, asked in hub.asked if method == "GET" and path == UNET}
    assert int(ranged.removeprefix("bytes=").rstrip("-")) >= length // 4


def test_a_connection_that_breaks_is_made_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cuts = 1
    assert fetch("sd-turbo", endpoint=hub.url) == found("sd-turbo")
    assert [asked for method, _, asked in hub.asked if method == "GET" and asked]


def test_a_connection_that_keeps_breaking_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 30)
    hub.cuts = 1000
    error = refused(hub.url)
    assert "goes on where it stopped" in error.hint


def test_a_wrong_byte_is_found_by_its_digest_and_thrown_away(hub: FakeHub) -> None:
    hub.damage = UNET
    error = refused(hub.url)
    assert "SHA-256" in error.message
    assert not MODELS["sd-turbo"].folder.exists()
    hub.damage = ""
    fetch("sd-turbo", endpoint=hub.url)


def test_a_half_downloaded_file_is_found_before_the_first_frame(hub: FakeHub) -> None:
    folder = fetch("sd-turbo", endpoint=hub.url)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # and with it what the link goes to
    with pytest.raises(UserError, match="half-downloaded") as caught:
        load("sd-turbo", (64, 64))
    assert "livestyle fetch sd-turbo" in caught.value.hint
    fetch("sd-turbo", endpoint=hub.url)
    assert file.read_bytes() == whole


def test_a_deleted_file_is_missed(hub: FakeHub) -> None:
    folder = fetch("sd-turbo", endpoint=hub.url)
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer/vocab\.json is gone"):
        found("sd-turbo")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "half-downloaded"),
        (b"\x00\x01", "half-downloaded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\x08" + bytes(7) + b"not json", "not readable"),
        (b"\x02" + bytes(7) + b"[]", "not readable"),
        (b"\x08" + bytes(7) + b'{"a": 1}', "not readable"),
    ],
)
def test_what_is_no_safetensors_file_is_named_so(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert problem in fault(file)


def test_a_model_that_is_not_here_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match="sd-turbo is not here yet") as caught:
        load("sd-turbo", (64, 64))
    assert caught.value.hint == "`livestyle fetch sd-turbo`"


def test_a_model_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model: nothing"):
        found("nothing")
    with pytest.raises(UserError, match="is no model that can be fetched"):
        fetch("nothing")
    with pytest.raises(UserError, match="mini comes with livestyle"):
        fetch("mini")
    (tmp_path / "old.ckpt").touch()
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        found(str(tmp_path / "old.ckpt"))


def test_offline_by_choice_is_said_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(hub.url)
    assert "HF_HUB_OFFLINE" in error.message
    assert "livestyle fetch sd-turbo" in error.hint
    assert str(MODELS["sd-turbo"].folder) in error.hint


def test_offline_makes_the_folder_anew_from_what_is_stored(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("sd-turbo", endpoint=hub.url)
    shutil.rmtree(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("sd-turbo", endpoint=hub.url) == found("sd-turbo")


def test_what_another_program_has_fetched_is_not_fetched_again(hub: FakeHub) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("stabilityai/sd-turbo", UNET, endpoint=hub.url)
    hub.asked.clear()
    fetch("sd-turbo", endpoint=hub.url)
    assert ("GET", UNET) not in {(method, path) for method, path, _ in hub.asked}


@pytest.mark.parametrize("way", ["refusing", "silent"])
def test_an_unreachable_hub_is_no_hang(hub: FakeHub, way: str) -> None:
    hub.silent = 3.0 if way == "silent" else 0.0
    started = time.monotonic()
    error = refused(hub.url if way == "silent" else "http://127.0.0.1:9")
    assert time.monotonic() - started < 3
    assert "cannot be reached" in error.message
    assert "livestyle fetch sd-turbo" in error.hint


def test_a_hub_that_fails_is_quoted(hub: FakeHub) -> None:
    hub.status = 503
    assert "503" in refused(hub.url).message


def test_gated_and_unknown_repositories_are_told_apart(hub: FakeHub) -> None:
    hub.gated = {"stabilityai/sd-turbo"}
    error = refused(hub.url)
    assert "accepts its licence" in error.message
    assert "https://huggingface.co/stabilityai/sd-turbo" in error.hint
    hub.gated = set()
    hub.files.clear()
    assert "the hub has no stabilityai/sd-turbo" in refused(hub.url).message


def test_a_repository_with_other_files_is_said(hub: FakeHub) -> None:
    del hub.files["stabilityai/sd-turbo", UNET]
    assert "other files" in refused(hub.url).message


def test_a_full_disk_is_said_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    error = refused(hub.url)
    assert "the disk is full" in error.message
    assert "LIVESTYLE_MODELS" in error.hint
    assert not [path for method, path, _ in hub.asked if method == "GET"]


def test_where_links_are_impossible_files_are_copied(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no links here")

    with monkeypatch.context() as patch:
        patch.setattr("models.weights.os.link", refuse)
        patch.setattr("models.weights.os.symlink", refuse)
        folder = fetch("sd-turbo", endpoint=hub.url)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert found("sd-turbo") == folder


def test_a_checkpoint_of_the_users_own_with_the_lcm_lora(tmp_path: Path) -> None:
    from tests.folders import random_folder

    own = random_folder(tmp_path / "own", "sd")
    unet = own / "unet"
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 1024}))
    with pytest.raises(UserError, match=r"not of the Stable Diffusion 1.5 family"):
        fetch("sd15-lcm", base=own)
    with pytest.raises(UserError, match="takes no other base"):
        fetch("sd-turbo", base=own)
    (unet / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    with FakeHub(published("sd15-lcm", tmp_path / "published")) as hub:
        folder = fetch("sd15-lcm", base=own, endpoint=hub.url)
        assert {path for _, path, _ in hub.asked} == {
            "config.json", "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors",
        }  # fmt: skip
    assert json.loads((folder / "lora" / "lora.json").read_text()) == {
        "file": "pytorch_lora_weights.safetensors",
        "scale": 1.0,
    }
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert found("sd15-lcm") == folder


def test_the_command_draws_its_progress_on_the_error_stream(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fetch
    monkeypatch.setattr("models.weights.fetch", lambda name, **options: whole(name, endpoint=hub.url, **options))
    assert fetch_shown("sd-turbo") == found("sd-turbo")
    out, err = capsys.readouterr()
    assert out == ""
    assert "MB" in err


def small_add_on(row: AddOn) -> dict[tuple[str, str], bytes]:
    """The files of an add-on's repositories, as small as files of their kinds can be."""
    made = {}
    for source in row.sources:
        for file in source.files:
            tensors = {"weight": torch.arange(6, dtype=torch.float16).reshape(2, 3).mT}
            pickled = io.BytesIO()
            torch.save(tensors, pickled)
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            made[source.repo, file] = {".json": b"{}", ".bin": pickled.getvalue()}.get(Path(file).suffix) or save(whole)
    return made


@pytest.mark.parametrize("name", ["controlnet-sd15-canny", "controlnet-sd21-depth", "safety-checker"])
def test_an_add_on_is_fetched_into_a_folder_of_its_own(name: str) -> None:
    row = ADDONS[name]
    with FakeHub(small_add_on(row)) as hub:
        folder = fetch(name, endpoint=hub.url)
    assert folder == row.folder == addon(row.kind, row.family)
    weights = "model" if row.kind == "safety" else "diffusion_pytorch_model"
    assert (folder / "config.json").is_file()
    found = load_file(folder / f"{weights}.safetensors")["weight"]
    assert found.dtype == torch.float16
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [row["name"] for row in addons() if row["ready"]] == [name]
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize("name", ["ip-adapter-sd15", "rtmo-small"])
def test_an_add_on_with_another_digest_is_refused(name: str) -> None:
    row = ADDONS[name]
    with FakeHub(small_add_on(row)) as hub, pytest.raises(UserError, match="SHA-256 is not the published one"):
        fetch(row.name, endpoint=hub.url)


def test_a_network_in_onnx_is_fetched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ADDONS["rtmo-small"]
    (source,) = row.sources
    monkeypatch.setitem(ADDONS, row.name, replace(row, sources=(replace(source, sha256=()),)))
    files = small_add_on(row)
    with FakeHub(files) as hub:
        folder = fetch(row.name, endpoint=hub.url)
    assert folder == addon("bodies")
    assert (folder / "model.onnx").read_bytes() == files["Xenova/RTMO-s", "onnx/model.onnx"]
    assert (folder / "model.onnx").stat().st_nlink == 2  # not twice on the disk


def test_a_pickle_that_holds_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    row, trace = ADDONS["controlnet-sd15-tile"], tmp_path / "trace"
    files = small_add_on(row)
    pickled = io.BytesIO()
    torch.save({"weight": Opens(trace)}, pickled)
    files["lllyasviel/control_v11f1e_sd15_tile", "diffusion_pytorch_model.bin"] = pickled.getvalue()
    with FakeHub(files) as hub, pytest.raises(UserError, match="holds no plain tensors"):
        fetch(row.name, endpoint=hub.url)
    assert not trace.exists()
    assert not row.folder.exists()


class Opens:
    """What a hostile pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
