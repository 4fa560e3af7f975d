"""The output file under a muxer: remembers the first failure and keeps what was good."""

from __future__ import annotations

import os


class Disk:
    """A writable file for FFmpeg that goes deaf at the first failed write, and takes back what was half written.

    A muxer that meets a full disk still tries to finish, seeks back and would turn the playable fragments before into
    a file without an index; so nothing after the first failure reaches the disk. Raises OSError once.
    """

    def __init__(self, path: str) -> None:
        self.failure: OSError | None = None
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        self._at = 0  # where the muxer believes to be
        self._whole = 0  # bytes up to which the file is well formed

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        if self.failure is None:
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                self.failure = error
                os.ftruncate(self._fd, self._whole)
                raise
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; only pretends to once deaf."""
        if self.failure is None:
            self._at = os.lseek(self._fd, offset, whence)
        elif whence == os.SEEK_CUR:
            self._at += offset
        else:
            self._at = offset
        return self._at

    def mark(self) -> None:
        """Between two packets: everything so far is well formed."""
        if self.failure is None:
            self._whole = self._at

    def tell(self) -> int:
        """Where the next write goes."""
        return self._at

    def close(self) -> None:
        """Close the file; twice is once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
