"""The user's checkpointing, switched off for one forward of a model that has a memory plan, and put back.

Flags are attributes named ``gradient_checkpointing`` on modules, as transformers sets them on its layers and on older models' bodies;
trainers set them after ``fxfuse.optimize``. Only values on instances are touched, and they come back on exceptions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn

FLAG = "gradient_checkpointing"


@contextmanager
def without_checkpointing(module: nn.Module, kwargs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(the arguments to call ``module`` with, a sentence on what was switched off or nothing).

    A model that checkpoints does not fill a key/value cache; it does not do so here either.
    """
    flagged = [child for child in module.modules() if vars(child).get(FLAG) is True] if module.training else []
    if not flagged:
        yield kwargs, ""
        return
    cls: Any = type(module)
    if takes_use_cache(cls):
        kwargs = {**kwargs, "use_cache": False}
    for child in flagged:
        setattr(child, FLAG, False)
    try:
        yield kwargs, f"gradient checkpointing of {len(flagged)} modules is switched off while the model runs"
    finally:
        for child in flagged:
            setattr(child, FLAG, True)


@lru_cache(maxsize=256)
def takes_use_cache(cls: Any) -> bool:
    """Has the forward of a class an argument that says whether to fill a cache."""
    return "use_cache" in inspect.signature(cls.forward).parameters
