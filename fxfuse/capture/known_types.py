"""Values whose type says how Dynamo takes them, taken so at once.

Before it looks at a type, torch imports half a dozen names and makes up to three classes, for what a value of Triton's could be:
for each of the hundreds of tensors, numbers and containers of a block.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from fxfuse._torch import VariableBuilder

_of_torch = VariableBuilder._wrap


@wraps(_of_torch)
def wrap(self: Any, value: Any) -> Any:
    take = self._type_dispatch().get(type(value))
    return _of_torch(self, value) if take is None else take(self, value)


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((VariableBuilder, "_wrap", wrap),)
