"""What belongs to a module that nobody has imported is nowhere, and is not looked for.

Dynamo asks of callables whether they are the one that ``torch.distributed.tensor.experimental`` makes for ``local_map``, and imports
that module for the question: with all of its neighbours, in the middle of a first step, a twentieth of it on a cold disk.
"""

from __future__ import annotations

import sys
from typing import Any

from fxfuse._torch import LocalMapVariable

_HOME = "torch.distributed.tensor.experimental._func_map"
_of_torch: Any = LocalMapVariable.should_wrap_in_hop  # (bound to its class)


def should_wrap_in_hop(value: Any) -> bool:
    """Is ``value`` what ``local_map`` makes, while wrapping is on. (In its place it is asked of the class, of no instance.)"""
    return _HOME in sys.modules and _of_torch(value)


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((LocalMapVariable, "should_wrap_in_hop", should_wrap_in_hop),)
