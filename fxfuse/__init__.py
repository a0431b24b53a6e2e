"""fxfuse: derives fused training kernels from a PyTorch model's graph, and proves each one before using it.

    model = fxfuse.optimize(model)      # in place; the same object
    print(fxfuse.report(model))         # what was done, and what has run since
    fxfuse.restore(model)               # the exact original

Importing this package imports nothing else: each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfuse import errors as errors
    from fxfuse.api import explain, optimize, report, restore
    from fxfuse.derived import derive
    from fxfuse.fusing import fuse, rewrite
    from fxfuse.merging import merge
    from fxfuse.quantization.dynamic import quantize
    from fxfuse.reporting.records import Report
    from fxfuse.rules import pattern

__version__ = "0.1.0"

# In a checkout, kernels/ and patterns/ lie beside this folder; installed, they lie inside it.
if os.path.exists(os.path.join(os.path.dirname(__path__[0]), "pyproject.toml")):
    __path__.append(os.path.dirname(__path__[0]))

_HOME = {
    "optimize": "fxfuse.api",
    "restore": "fxfuse.api",
    "report": "fxfuse.api",
    "explain": "fxfuse.api",
    "fuse": "fxfuse.fusing",
    "derive": "fxfuse.derived",
    "rewrite": "fxfuse.fusing",
    "pattern": "fxfuse.rules",
    "quantize": "fxfuse.quantization.dynamic",
    "merge": "fxfuse.merging",
    "Report": "fxfuse.reporting.records",
}

__all__ = [
    "Report",
    "derive",
    "errors",
    "explain",
    "fuse",
    "merge",
    "optimize",
    "pattern",
    "quantize",
    "report",
    "restore",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from the module it lives in (PEP 562), once."""
    if name == "errors":
        return importlib.import_module("fxfuse.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'fxfuse' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
