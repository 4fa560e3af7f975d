"""The engine store, without any engine."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from accel import cache
from accel.engine import EngineSpec, TensorSpec


def key(name: str = "unet", fingerprint: str = "f0") -> cache.Key:
    spec = EngineSpec(name, (TensorSpec("x", (1, 2)),), (TensorSpec("y", (1, 2)),), fingerprint)
    return cache.key_of("test 1.0", spec)


def use(root: Path, k: cache.Key, when: float) -> None:
    os.utime(root / cache.digest_of(k) / "manifest.json", (when, when))


def test_written_engine_is_read_back(tmp_path) -> None:
    assert cache.read(tmp_path, key()) is None
    cache.write(tmp_path, key(), b"blob", 1.5)
    assert cache.read(tmp_path, key()) == b"blob"
    assert cache.read(tmp_path, key(fingerprint="f1")) is None
    manifest = json.loads((tmp_path / cache.digest_of(key()) / "manifest.json").read_text())
    assert manifest["key"] == key()
    assert manifest["size"] == 4
    assert manifest["build_s"] == 1.5


def test_digest_does_not_depend_on_the_order_of_the_key() -> None:
    assert cache.digest_of(dict(reversed(key().items()))) == cache.digest_of(key())
    assert len(cache.digest_of(key())) == 16


@pytest.mark.parametrize("broken", ["engine.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["garbage", "removed"])
def test_damaged_entry_reads_as_none_and_makes_room(tmp_path, caplog, broken: str, how: str) -> None:
    cache.write(tmp_path, key(), b"blob", 0.0)
    path = tmp_path / cache.digest_of(key()) / broken
    path.write_bytes(b"[]") if how == "garbage" else path.unlink()
    (found,) = cache.verify(tmp_path)
    assert found.problem
    with caplog.at_level(logging.WARNING):
        assert cache.read(tmp_path, key()) is None
    assert len(caplog.records) == 1
    cache.write(tmp_path, key(), b"blob", 0.0)
    assert cache.read(tmp_path, key()) == b"blob"
    assert [e.problem for e in cache.verify(tmp_path)] == [None]


def test_prune_drops_the_least_recently_used_first(tmp_path) -> None:
    keys = [key(fingerprint=f"f{n}") for n in range(3)]
    for n, k in enumerate(keys):
        cache.write(tmp_path, k, bytes(5000), 0.0)
        use(tmp_path, k, 1000.0 + n)
    assert cache.read(tmp_path, keys[0])  # now the most recently used
    dropped = cache.prune(tmp_path, max_bytes=12_000)
    assert [e.digest for e in dropped] == [cache.digest_of(keys[1])]
    assert cache.read(tmp_path, keys[0])
    assert cache.read(tmp_path, keys[2])
    cache.prune(tmp_path, max_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_write_keeps_the_store_bounded_but_never_drops_what_it_wrote(tmp_path) -> None:
    for n in range(4):
        cache.write(tmp_path, key(fingerprint=f"f{n}"), bytes(5000), 0.0, max_bytes=12_000)
        use(tmp_path, key(fingerprint=f"f{n}"), 1000.0 + n)
    assert len(cache.entries(tmp_path)) == 2
    cache.write(tmp_path, key("large"), bytes(20_000), 0.0, max_bytes=12_000)
    assert [e.name for e in cache.entries(tmp_path)] == ["large"]


def test_prune_removes_what_dead_writers_left_and_spares_the_living(tmp_path) -> None:
    dead, living = tmp_path / ".tmp-dead", tmp_path / ".tmp-living"
    dead.mkdir()
    living.mkdir()
    os.utime(dead, (1000.0, 1000.0))
    cache.prune(tmp_path)
    assert not dead.exists()
    assert living.exists()


def test_concurrent_writers_of_one_key_leave_one_sound_entry(tmp_path) -> None:
    start = threading.Barrier(8)
    wrong: list[bytes | None] = []

    def write(n: int) -> None:
        start.wait()
        for _ in range(5):
            cache.write(tmp_path, key(), bytes([n]) * 10_000, 0.0)
            found = cache.read(tmp_path, key())
            if found is None or len(found) != 10_000 or len(set(found)) != 1:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [e.problem for e in cache.verify(tmp_path)] == [None]
    assert [p.name for p in tmp_path.iterdir()] == [cache.digest_of(key())]


def test_full_disk_costs_a_warning_and_leaves_nothing(tmp_path, caplog, monkeypatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        cache.write(tmp_path, key(), b"blob", 0.0)
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_default_folder_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LIVESTYLE_CACHE", str(tmp_path))
    assert cache.default_root() == tmp_path / "engines"
    monkeypatch.delenv("LIVESTYLE_CACHE")
    assert cache.default_root().name == "engines"
    assert "livestyle" in cache.default_root().parts
