"""The kernels that TensorRT-RTX compiles for the very card when an engine first runs there, kept for the next start."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "jit.bin"  # in the engine's folder


class Kernels:
    """Those of one engine. TensorRT compiles when it builds: it has none, and saving them does nothing.

    The library checks what it reads; what belongs to another driver or card is compiled anew.
    """

    def __init__(self, raw: Any, folder: Path | None) -> None:
        self.folder, self._raw = folder, raw
        self._cache: Any = None
        self._saved = b""

    def context(self, strategy: Any) -> Any:
        """An execution context that uses and fills them."""
        if not hasattr(self._raw, "create_runtime_config"):
            return self._raw.create_execution_context(strategy)
        config = self._raw.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                if self.folder:
                    self._saved = (self.folder / NAME).read_bytes()
                    self._cache.deserialize(self._saved)  # says False to what is of no use
            config.set_runtime_cache(self._cache)
        return self._raw.create_execution_context(config)

    def save(self) -> None:
        """Write what is new beside the engine, whole or not at all; that it cannot be written costs a note only."""
        if self._cache is None or self.folder is None or not self.folder.is_dir():
            return
        kernels = bytes(self._cache.serialize())
        if kernels == self._saved:
            return
        scratch = self.folder / f"{NAME}.{uuid.uuid4().hex}"
        try:
            scratch.write_bytes(kernels)
            os.replace(scratch, self.folder / NAME)
            self._saved = kernels
        except OSError as error:
            log.info("kernels of %s are not kept (%s)", self.folder.name, error.strerror)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
