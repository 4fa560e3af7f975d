"""The hub: what it says of a file, the file itself, and its errors as two lines."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import UserError
from models.rows import Row, Source, models_root

TIMEOUT = 8.0  # s for the hub's answer; a download that stalls is tried 5 times more, 10 s each
POINTER = b"version https://git-lfs"  # how a file begins that git left behind
PICKLED = (".bin", ".pth")  # endings of weights that are written anew as safetensors
ROOMY = 1 << 28  # bytes left free on the disk


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub, as it was asked for and answered."""

    source: Source
    file: str
    commit: str
    size: int  # bytes, 0 where the hub does not say
    digest: str  # SHA-256, or how it begins; "" where neither the hub nor the row says

    @property
    def target(self) -> str:
        """Where it goes in the row's folder; pickled weights are written anew as safetensors."""
        name = Path(self.file).name.replace(".fp16.", ".")
        name = f"{name.removesuffix(ending)}.safetensors" if (ending := Path(name).suffix) in PICKLED else name
        return f"{self.source.part}/{name}" if self.source.part else name


def fault(file: Path) -> str:
    """What is wrong with a safetensors file, or "": the header says how long it must be."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(POINTER))
            if start.startswith(POINTER):
                return "only git's pointer to it is here (`git lfs pull`)"
            length = int.from_bytes(start[:8], "little")
            if length > size - 8:
                return f"half-downloaded, {size} bytes do not hold its header"
            stream.seek(8)
            rows = {name: row for name, row in json.loads(stream.read(length)).items() if name != "__metadata__"}
        whole = 8 + length + max((row["data_offsets"][1] for row in rows.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"not readable as safetensors ({type(error).__name__})"
    return "" if size == whole else f"half-downloaded, {size} of {whole} bytes"


def address(source: Source, file: str, revision: str | None, endpoint: str | None) -> str:
    """Where a file is: on the hub, or at an address of its own."""
    from huggingface_hub import hf_hub_url

    if source.elsewhere:
        return f"{source.repo}/{file}"
    return hf_hub_url(source.repo, file, revision=revision, endpoint=endpoint)


def token_for(source: Source) -> bool | None:
    """False: the user's token is the hub's, and nobody else's."""
    return False if source.elsewhere else None


def asked(source: Source, file: str, endpoint: str | None) -> Remote:
    """What the hub says of a file; where it cannot be reached, what is stored of it here."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        url = address(source, file, source.revision, endpoint)
        answer = get_hf_file_metadata(url, token=token_for(source), timeout=TIMEOUT, endpoint=endpoint)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        unreachable: Exception = error
    except (HTTPError, OSError) as error:
        unreachable = error
    else:
        etag = answer.etag or ""
        stated = etag if len(etag) == 64 else ""  # of a large file it is the SHA-256
        pinned = dict(source.sha256).get(file, stated)
        return Remote(source, file, answer.commit_hash or "main", answer.size or 0, pinned)
    here = stored(source.repo, file, source.revision)
    if here is None:
        raise unreachable
    commit = here.parents[file.count("/")].name
    return Remote(source, file, commit, here.stat().st_size, "")


def store(repo: str) -> Path:
    """Where livestyle keeps what it has downloaded of a repository: `COMMIT/FILE`, shared by the rows that use it."""
    return models_root() / ".hub" / repo.replace("://", "--").replace("/", "--")


def stored(repo: str, file: str, commit: str | None) -> Path | None:
    """A whole file of a repository on this machine: in livestyle's store, or the hub library's cache."""
    from huggingface_hub import try_to_load_from_cache

    ours = sorted(store(repo).glob(f"{commit or '*'}/{file}"), key=lambda path: path.stat().st_mtime)
    theirs = None if "://" in repo else try_to_load_from_cache(repo, file, revision=commit)
    return ours[-1] if ours else Path(theirs) if isinstance(theirs, str) else None


def brought(remote: Remote, endpoint: str | None, report: Callable[[int], None]) -> Path:
    """The file on this machine, downloaded where it is not yet, its size and digest checked."""
    repo, file = remote.source.repo, remote.file
    path = stored(repo, file, remote.commit)
    if path is None or amiss(path, remote):
        path = downloaded(remote, endpoint, report)
        if problem := amiss(path, remote):
            raise UserError(f"{repo}/{file}: {problem}", hint="it was thrown away; fetch it again")
    return path


def amiss(path: Path, remote: Remote) -> str:
    """What is wrong with a stored file, or ""; where anything is, it is thrown away, else it would be found again."""
    problem = fault(path) if path.suffix == ".safetensors" else ""
    if remote.size and path.stat().st_size != remote.size:
        problem = problem or f"{path.stat().st_size} of {remote.size} bytes"
    elif remote.digest and not digest(path).startswith(remote.digest):
        problem = "its SHA-256 is not the published one"
    if problem:
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # a link to it
    return problem


def downloaded(remote: Remote, endpoint: str | None, report: Callable[[int], None]) -> Path:
    """Download into the store; what a broken download left there is gone on with.

    By plain HTTP and into a file of ours: the hub library's own download keeps no part of a file, and tries for
    minutes to reach a hub that has gone.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    whole = store(remote.source.repo) / remote.commit / remote.file
    part = whole.with_name(f"{whole.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    url, token = address(remote.source, remote.file, remote.commit, endpoint), token_for(remote.source)
    try:
        with FileLock(f"{part}.lock", timeout=1), part.open("ab") as stream:
            if stream.tell() > remote.size:
                stream.truncate(0)
            missing, room = remote.size - stream.tell(), shutil.disk_usage(part.parent).free
            if room < missing + ROOMY:
                raise OSError(errno.ENOSPC, f"{missing >> 20} MB wanted, {room >> 20} MB free")
            # Fails at once, where the next would try on.
            get_hf_file_metadata(url, token=token, timeout=TIMEOUT, endpoint=endpoint)
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(token=token),
                expected_size=remote.size or None,
                tqdm_class=counter(report),
            )
    except Timeout as error:
        raise UserError(f"{remote.file} is being fetched already", hint="wait for the other one to end") from error
    part.replace(whole)
    return whole


def counter(report: Callable[[int], None]) -> Any:
    """A class for the hub library's `tqdm_class`: it draws nothing, and reports bytes."""

    class Counter:
        def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
            self.bytes = initial

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, bytes_: float | None = 1) -> None:
            self.bytes += int(bytes_ or 0)
            report(self.bytes)

    return Counter


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def told(spec: Row) -> Iterator[None]:
    """The hub library's errors, and the disk's, as two lines."""
    from huggingface_hub import errors

    again = f"`livestyle fetch {spec.name}`"
    copy = f"or copy the folder {spec.folder} from a machine that has it"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        where = f"accept its licence at https://huggingface.co/{repo_of(error)}, then `hf auth login`, then {again}"
        raise UserError(f"{repo_of(error)} is only for who accepts its licence", hint=where) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no {repo_of(error)}, or it is private",
            hint=f"{copy}; if it is private: `hf auth login`, {again}",
        ) from error
    except (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"the hub's {repo_of(error)} has other files than this livestyle knows", hint=f"update livestyle, {copy}"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        hint = f"unset HF_HUB_OFFLINE and {again}, {copy}"
        raise UserError(f"{spec.name} is not here, and HF_HUB_OFFLINE forbids to fetch it", hint=hint) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"the hub answered {status} for {repo_of(error)}", hint=f"later: {again}, {copy}") from error
    except (errors.HTTPError, errors.FileMetadataError) as error:  # type: ignore[attr-defined]
        hint = f"with a network: {again}, which goes on where it stopped; {copy}"
        raise UserError(f"the hub cannot be reached ({type(error).__name__})", hint=hint) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            what = f"the disk is full: {error.strerror}"
            room = f"{spec.megabytes / 1000:.1f} GB are needed; HF_HOME and LIVESTYLE_MODELS name other disks"
            raise UserError(what, hint=f"{room}; then {again}") from error
        raise UserError(
            f"{spec.name} could not be fetched: {error}", hint=f"{again} goes on where it stopped"
        ) from error


def repo_of(error: Any) -> str:
    """The repository that an answer of the hub's is about, "owner/name"."""
    return "/".join(str(error.response.request.url.path).strip("/").split("/")[:2])
