"""What is wrong with a model is said in two lines, before the first frame, and soon."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.errors import UserError
from models import hub as hub_module
from models import memory
from models.folder import Folder
from models.load import load
from models.memory import available, check_memory, group_rest, needed, weights
from models.params import Params, Style
from models.spec import MODELS
from models.text import TextEncoder
from models.weights import fetch, found
from stream.cli import main
from tests.folders import random_folder, random_xl_folder
from tests.hub import FakeHub, published

BITS = ["(", ")", "[", "]", "|", ":", "1.3", "oil", "\\", ":1e9)"]
SOON = 10.0  # s, on a machine that does other things besides
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the user's is read or written, no hub is asked, and nothing takes long."""
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("LIVESTYLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(memory.IGNORE, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.5)
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("whole") / "model", "sd")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "toon"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """The two lines that a command ends with: what, and what to do."""
    assert main(arguments) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert "Traceback" not in error + hint
    return error, hint


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class TestFolders:
    @pytest.mark.parametrize(
        "lost",
        [
            UNET,
            "unet/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder/config.json",
            "tokenizer/tokenizer.json",
            "scheduler/scheduler_config.json",
            "scheduler",
        ],
    )
    def test_a_missing_file_is_named(self, folder: Path, lost: str, capsys: pytest.CaptureFixture[str]) -> None:
        target = folder / lost
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        error, hint = said(capsys, "run", "test", "--to", "null", "--frames", "1", "--model", str(folder))
        assert error.startswith("error: toon: ")
        assert lost.partition("/")[0] in error
        assert error.endswith("is missing")
        assert "copy it from where it is whole" in hint

    def test_a_missing_shard_is_named(self, folder: Path) -> None:
        unet = Folder(folder).unet()
        shutil.rmtree(folder / "unet")
        unet.save_pretrained(folder / "unet", max_shard_size="500KB")  # type: ignore[operator]
        assert found(str(folder)) == folder
        gone = sorted(folder.glob("unet/*-00002-of-*"))[0]
        gone.unlink()
        with pytest.raises(UserError, match=f"unet/{gone.name} is missing"):
            found(str(folder))
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
        with pytest.raises(UserError, match=r"index\.json"):
            found(str(folder))

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_a_half_downloaded_file_is_named(self, folder: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        halved(file)
        error, _ = said(capsys, "run", "test", "--to", "null", "--frames", "1", "--model", str(folder))
        assert f"toon/{part}/{file.name}: half-downloaded" in error

    def test_a_half_downloaded_checkpoint_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "toon.safetensors"
        file.write_bytes((1 << 20).to_bytes(8, "little") + b'{"a"')
        error, hint = said(capsys, "run", "test", "--to", "null", "--model", str(file))
        assert "toon.safetensors: half-downloaded" in error
        assert hint == "hint: fetch it again"

    @pytest.mark.parametrize("text", ["", "[", "[1, 2]", '{"unet": 3}', '{"vae": ["diffusers", "Nothing"]}'])
    def test_a_broken_index_is_no_traceback(self, folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "model_index.json").write_text(text)
        error, _ = said(capsys, "run", "test", "--to", "null", "--frames", "1", "--model", str(folder))
        assert "model_index.json" in error or "unknown autoencoder class" in error

    def test_a_name_that_is_nothing_lists_what_there_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        error, hint = said(capsys, "run", "test", "--to", "null", "--model", "sd-trubo")
        assert error == "error: no such model: sd-trubo"
        assert "sd-turbo" in hint
        error, hint = said(capsys, "run", "test", "--to", "null", "--model", "sd-turbo")
        assert hint == "hint: `livestyle fetch sd-turbo`"


class TestHub:
    @pytest.mark.parametrize("name", ["sd-turbo", "controlnet-sd15-canny"])
    def test_one_that_cannot_be_reached(
        self, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        error, hint = said(capsys, "fetch", name)
        assert "the hub cannot be reached" in error
        assert f"`livestyle fetch {name}`, which goes on where it stopped" in hint
        assert str(Path("models") / name) in hint

    def test_one_that_stops_in_the_middle(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The connection stays open and nothing comes any more, at every attempt."""
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        with FakeHub(published("sd-turbo", tmp_path / "published")) as hub:
            hub.cuts = 1000
            with pytest.raises(UserError, match="cannot be reached") as caught:
                fetch("sd-turbo", endpoint=hub.url)
        assert "goes on where it stopped" in caught.value.hint
        assert not MODELS["sd-turbo"].folder.exists()


class TestPrompts:
    def test_a_long_prompt_is_a_note_and_no_error(self, folder: Path) -> None:
        stylizer = load(str(folder), (64, 64), engine="torch")
        params = Params(style=Style(prompt="oil painting of a city " * 40))
        assert "longer than this model reads" in stylizer.advice(params)
        assert "longer" in stylizer.advice(Params(style=Style(prompt="oil | " + "ink " * 90)))
        assert stylizer.open(params) is not None

    @settings(deadline=2000, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.text(max_size=300)
        | st.text(st.sampled_from(r"\()[]|:19. ab" + "\0\n\ud800"), max_size=300)
        | st.lists(st.sampled_from(["(", ")", "[", "]", "|", ":", "1.3", "oil", "\\", ":1e9)"]), max_size=200).map(
            "".join
        )
    )
    def test_no_syntax_is_too_hostile_to_be_read(self, reader: TextEncoder, prompt: str) -> None:
        words = reader.embed(prompt)
        assert words.shape == (1, 77, 32)
        assert bool(words.isfinite().all())
        assert reader.is_cut(prompt) in (True, False)

    @pytest.mark.parametrize("bit", ["(", "((a:5)", "a|", "(a:1.1)|", "[a", "a b ", ":9|", "\\("])
    def test_the_longest_prompts_there_may_be_are_read_in_no_time(self, reader: TextEncoder, bit: str) -> None:
        started = time.thread_time()
        reader.embed((bit * 2000)[:2000])
        assert time.thread_time() - started < 2

    def test_longer_ones_are_the_settings_to_refuse(self, capsys: pytest.CaptureFixture[str]) -> None:
        error, hint = said(capsys, "run", "test", "--to", "null", "--prompt", "a" * 2001)
        assert "style.prompt" in error
        assert hint


@pytest.fixture(scope="module")
def reader(whole: Path) -> TextEncoder:
    text = Folder(whole).text()
    assert isinstance(text, TextEncoder)
    return text


class TestMemory:
    def test_too_little_of_it_is_said_with_both_figures(self, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available", lambda: 0.1e9)
        with pytest.raises(
            UserError, match=r"too little memory for model: about 0\.\d GB wanted, 0\.1 GB free"
        ) as found:
            check_memory(whole, "openvino", (512, 512))
        assert "a smaller --model" in found.value.hint
        monkeypatch.setenv(memory.IGNORE, "ignore")
        check_memory(whole, "openvino", (512, 512))

    def test_mini_fits_wherever_python_does(self) -> None:
        mini = MODELS["mini"].folder
        for engine in ("openvino", "torch", "torch-cuda", "null"):
            assert needed(mini, engine, (512, 288)) < 0.8e9
        check_memory(mini, "openvino", (512, 288))

    def test_what_is_wanted_grows_with_model_size_and_add_ons(self, whole: Path, tmp_path: Path) -> None:
        larger = random_xl_folder(tmp_path / "xl")
        assert needed(larger, "torch", (512, 512)) > needed(whole, "torch", (512, 512))
        assert needed(whole, "torch", (1024, 512)) > needed(whole, "torch", (512, 512))
        assert needed(whole, "openvino", (64, 64)) > needed(whole, "openvino", (64, 64), stored=True)
        assert needed(whole, "torch", (64, 64)) > needed(whole, "torch", (64, 64), text=False)
        more = needed(whole, "torch", (64, 64), others={"canny": 10**9})
        assert more - needed(whole, "torch", (64, 64)) > 4e9

    def test_weights_are_counted_by_their_headers(self, whole: Path) -> None:
        unet = Folder(whole).unet()
        assert weights(whole / "unet") == sum(p.numel() for p in unet.parameters())
        assert weights(whole / "none") == weights(whole / "tokenizer") == 0

    def test_a_full_size_model_wants_what_was_measured(self, tmp_path: Path) -> None:
        """Stable Diffusion 1.5's UNet at 512×512: 10.1 GB at the peak."""
        (tmp_path / "unet").mkdir()
        header = json.dumps({"w": {"dtype": "F16", "shape": [860, 1000, 1000], "data_offsets": [0, 0]}}).encode()
        (tmp_path / "unet" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert needed(tmp_path, "openvino", (512, 512)) == pytest.approx(10.1e9, rel=0.05)
        assert 7e9 < needed(tmp_path, "openvino", (512, 512), stored=True) < 9e9
        assert 4e9 < needed(tmp_path, "torch", (512, 512)) < 6e9

    def test_a_containers_limit_counts(self, tmp_path: Path) -> None:
        inner, proc = tmp_path / "cgroup" / "system.slice" / "app", tmp_path / "proc"
        inner.mkdir(parents=True)
        proc.write_text("0::/system.slice/app\n")
        assert group_rest(tmp_path / "cgroup", proc) == []
        (inner / "memory.max").write_text("max\n")
        (inner / "memory.current").write_text("5\n")
        assert group_rest(tmp_path / "cgroup", proc) == []
        (inner.parent / "memory.max").write_text("1000\n")
        (inner.parent / "memory.current").write_text("700\n")
        (inner.parent / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
        assert group_rest(tmp_path / "cgroup", proc) == [500]

    def test_the_older_kind_of_control_group_counts_too(self, tmp_path: Path) -> None:
        inner, proc = tmp_path / "memory" / "docker" / "abc", tmp_path / "proc"
        inner.mkdir(parents=True)
        proc.write_text("4:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n")
        (inner / "memory.limit_in_bytes").write_text("800\n")
        (inner / "memory.usage_in_bytes").write_text("900\n")
        assert group_rest(tmp_path, proc) == [0]
        assert group_rest(tmp_path, tmp_path / "no such file") == []

    def test_something_is_free_here(self) -> None:
        assert available() > 0
