"""Outputs that transformers collects by hooks (router logits, attention weights): what a captured block shows it of them.

Asked for once, transformers leaves hooks on modules inside of blocks, which look up in a context variable whether somebody collects.
Dynamo traces no such variable; transformers' wrapper of it is a plain attribute while something is being compiled. Here it is that for
the length of a captured call: it holds nothing, or a collection of the same names, empty for every block, so that one graph serves all
of them. What the block has put there joins the real collection afterwards.

A checkpoint's backward runs a block when nobody collects any more: it is shown what it was shown in its forward, and nothing is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fxfuse._torch import graph_task_id


class Collected:
    """The names that were collected at the last forward of one block."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Around a captured call, and around the eager one that may stand in for it."""
        variable = _variable()
        if variable is None:
            yield
            return
        again = graph_task_id() != -1
        real: dict[str, Any] = {} if again else variable.context_var.get() or {}
        if not again:
            self.names = tuple(name for name, outputs in real.items() if isinstance(outputs, list))
        shown: dict[str, list] = {name: [] for name in self.names}
        variable.compiling, variable.global_var = True, shown or None
        try:
            yield
        finally:
            variable.compiling, variable.global_var = False, None
        for name in self.names if real else ():
            # Before the first hidden state a hook puts what came in, where it finds an empty list, as it does in every block here.
            twice = name == "hidden_states" and bool(real[name])
            real[name].extend(shown[name][1:] if twice else shown[name])


def _variable() -> Any:
    """transformers' variable, or None where there is none, or somebody else compiles with it."""
    variable: Any = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    known = all(hasattr(variable, name) for name in ("compiling", "global_var", "context_var"))
    return variable if known and not variable.compiling else None
