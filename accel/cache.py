"""Content-addressed store of compiled engines.

`root/<16 hex>/` holds `engine.bin` and `manifest.json`; the hex digits begin the SHA-256 of the key's canonical
JSON. An entry is written beside its place and renamed into it whole, so readers and other writers of the same key
see all of it or nothing. The manifest's modification time is when the entry was last used. A cache that cannot be
read or written costs a warning and a rebuild, never an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accel.engine import EngineSpec
from accel.hold import is_held

log = logging.getLogger(__name__)

MAX_BYTES = 24 << 30  # kept by write: 24 GiB; one UNet of Stable Diffusion takes 3.3
STALE_S = 3600.0  # a temporary folder this old was left by a process that died
TEMPORARY = ".tmp-"

Key = dict[str, Any]  # JSON-able


def default_root() -> Path:
    """Return the folder of the user's engines: `$LIVESTYLE_CACHE/engines`, else the platform's cache folder."""
    from platformdirs import user_cache_dir

    # An empty variable means unset, as in the XDG specification.
    return Path(os.environ.get("LIVESTYLE_CACHE") or user_cache_dir("livestyle")) / "engines"


def key_of(backend: str, spec: EngineSpec) -> Key:
    """Return everything that decides what an engine is: the backend's fingerprint, this platform and the spec."""
    decides = {name: value for name, value in asdict(spec).items() if name != "architecture" or value}
    key = {"backend": backend, "platform": f"{platform.system()} {platform.machine()}", "spec": decides}
    normal: Key = json.loads(json.dumps(key))  # as it will be read back: tuples become lists
    return normal


def digest_of(key: Key) -> str:
    """Return the name of the key's folder: 16 hex digits."""
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read(root: Path, key: Key) -> bytes | None:
    """Return the engine of this key, or None when there is none; a damaged one is dropped and said in one line."""
    folder = root / digest_of(key)
    try:
        manifest = _manifest(folder)
        blob = (folder / "engine.bin").read_bytes()
        if manifest["key"] != key:
            raise ValueError("it belongs to another key")
        if _sha256(blob) != manifest["sha256"]:
            raise ValueError("checksum differs")
    except FileNotFoundError:
        if not (folder / "manifest.json").exists() and not (folder / "engine.bin").exists():
            return None
        problem = "half of it is missing"
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    except OSError as error:
        _warn_once(f"engine cache {root} cannot be read ({error.strerror}); engines are built again")
        return None
    else:
        _touch(folder)
        return blob
    log.warning("cached engine %s is damaged (%s): building it again", folder, problem)
    drop(root, folder.name)
    return None


def sound(root: Path, key: Key) -> bool:
    """Whether this key's engine is there and whole, without reading it into memory; a damaged one is dropped."""
    folder = root / digest_of(key)
    if not folder.exists():
        return False
    entry = _verified(folder, _entry(folder))
    if entry.problem is None and entry.key == key:
        _touch(folder)
        return True
    log.warning("cached engine %s is damaged (%s): building it again", folder, entry.problem)
    drop(root, folder.name)
    return False


def write(
    root: Path,
    key: Key,
    blob: bytes | Path,
    build_s: float,
    max_bytes: int = MAX_BYTES,
    error: float | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Add an engine, then drop the least recently used others until all fit in `max_bytes`.

    A path of a file under `root` is moved, not copied. `error` is what was measured against the reference, if it was.
    What goes `beside` the engine is named as its file. When two processes write one key the first keeps its place;
    equal keys mean equal engines.
    """
    digest = digest_of(key)
    manifest: dict[str, Any] = {"key": key, "build_s": build_s, "created": time.time(), "error": error}
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
        try:
            if isinstance(blob, Path):
                manifest |= {"sha256": _file_sha256(blob), "size": _size(blob)}
                os.replace(blob, scratch / "engine.bin")
            else:
                manifest |= {"sha256": _sha256(blob), "size": len(blob)}
                (scratch / "engine.bin").write_bytes(blob)
            for name, content in (beside or {}).items():
                (scratch / name).write_bytes(content)
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            scratch.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of a shared cache
            _move(scratch, root / digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        prune(root, max_bytes, keep=digest)
    except OSError as error:
        _warn_once(f"engine cache {root} cannot be written ({error.strerror}); engines are not kept")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored engine, or what is left of it; sizes in bytes, times in seconds since the epoch."""

    digest: str
    name: str = "?"
    backend: str = "?"
    size: int = 0  # of the whole folder
    created: float = 0.0
    last_used: float = 0.0
    build_s: float = 0.0
    problem: str | None = None
    key: Key = field(default_factory=dict, repr=False)


def entries(root: Path) -> list[Entry]:
    """List the stored engines, the most recently used first; reads manifests only."""
    folders = [f for f in root.iterdir() if _is_digest(f.name)] if root.is_dir() else []
    return sorted((_entry(folder) for folder in folders), key=lambda e: e.last_used, reverse=True)


def verify(root: Path) -> list[Entry]:
    """List the stored engines with their checksums checked: `problem` is None for a sound one."""
    return [_verified(root / entry.digest, entry) for entry in entries(root)]


def prune(root: Path, max_bytes: int = MAX_BYTES, keep: str = "") -> list[Entry]:
    """Drop the least recently used engines until the rest fit, and what dead writers left; return the dropped.

    What `accel.hold` holds stays, and the entry that `keep` names, even where it alone is larger than `max_bytes`.
    """
    kept = entries(root)
    total = sum(entry.size for entry in kept)
    dropped = []
    for entry in reversed(kept):
        if total <= max_bytes:
            break
        if entry.digest != keep and not is_held(root / entry.digest) and drop(root, entry.digest):
            dropped.append(entry)
            total -= entry.size
    for left in root.glob(f"{TEMPORARY}*") if root.is_dir() else ():
        if time.time() - _mtime(left) > STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    return dropped


def drop(root: Path, digest: str) -> bool:
    """Remove one engine; True when it is gone."""
    trash = root / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        os.replace(root / digest, trash)  # one step, so that nobody reads a half-removed entry
    except FileNotFoundError:
        return True  # another process was faster
    except OSError as error:
        _warn_once(f"engine cache {root} cannot be changed ({error.strerror})")
        return False
    shutil.rmtree(trash, ignore_errors=True)
    return True


def _move(scratch: Path, place: Path) -> None:
    try:
        os.replace(scratch, place)  # atomic; refuses a folder that has something in it
    except OSError:
        if not (place / "manifest.json").exists():
            raise


def _manifest(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("manifest is not an object")
    return found


def _entry(folder: Path) -> Entry:
    size = _folder_size(folder)
    used = _mtime(folder / "manifest.json")
    try:
        m = _manifest(folder)
        name, backend = str(m["key"]["spec"]["name"]), str(m["key"]["backend"])
        created, build_s = float(m["created"]), float(m["build_s"])
        return Entry(folder.name, name, backend, size, created, used, build_s, None, m["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Entry(folder.name, size=size, last_used=used, problem=f"manifest: {error}")


def _verified(folder: Path, entry: Entry) -> Entry:
    if entry.problem:
        return entry
    try:
        found = _file_sha256(folder / "engine.bin")
        wrong = digest_of(entry.key) != entry.digest or found != _manifest(folder)["sha256"]
        problem = "checksum differs" if wrong else None
    except (OSError, ValueError, KeyError) as error:
        problem = str(error)
    return Entry(**{**asdict(entry), "problem": problem})


def _touch(folder: Path) -> None:
    # A read-only cache is used as it is; only its order of use is not kept.
    with contextlib.suppress(OSError):
        os.utime(folder / "manifest.json")


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _folder_size(folder: Path) -> int:
    try:
        return sum(_size(file) for file in folder.iterdir())
    except OSError:  # another process has just dropped it
        return 0


def _is_digest(name: str) -> bool:
    return len(name) == 16 and all(c in "0123456789abcdef" for c in name)


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
