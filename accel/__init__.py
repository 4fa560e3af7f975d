"""Modules made fast: one backend per engine, behind `load(module, spec, cache) -> Engine`.

Importing this package loads neither torch nor openvino; choosing a backend does.
"""

from accel.engine import Backend, Engine, EngineSpec, Pending, TensorSpec
from accel.errors import UserError
from accel.select import Choice, choose, missing

__all__ = [
    "Backend",
    "Choice",
    "Engine",
    "EngineSpec",
    "Pending",
    "TensorSpec",
    "UserError",
    "choose",
    "missing",
]
