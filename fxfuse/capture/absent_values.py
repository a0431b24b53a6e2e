"""What a graph holds none of is not looked for in each of its nodes, nor made ready for.

AOTAutograd goes through a joint graph for sizes that are floats (Dynamo makes constants of floats here), with a place to insert at for
every node, and takes nodes out that nobody uses; and it makes a dozen tensors for a graph that is given the state of a random number
generator, whether or not it is.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import SymFloat, fx

from fxfuse._torch import PhiloxState, graph_compile, size_kinds

_of_torch = graph_compile.tensorify_python_scalars
_no_state = vars(PhiloxState()).copy()


@wraps(_of_torch)
def tensorify_python_scalars(gm: fx.GraphModule, shape_env: Any, fake_mode: Any) -> None:
    """torch's, which takes out what nobody uses too."""
    floats = size_kinds.SymT.FLOAT
    symbols = (*shape_env.backed_var_to_val, *shape_env.var_to_range)
    if any(size_kinds.symbol_is_type(symbol, floats) for symbol in symbols) or any(map(_is_float, gm.graph.nodes)):
        _of_torch(gm, shape_env, fake_mode)
        return
    for node in reversed(gm.graph.nodes):
        if node.op not in ("output", "placeholder") and not node.users and not node.is_impure():
            gm.graph.erase_node(node)


def _is_float(node: fx.Node) -> bool:
    """A float that depends on sizes, or on values."""
    return isinstance(node.meta.get("val"), SymFloat)


def reset(self: Any) -> None:
    """No state: that of a graph which is given one is noted down before anything is made of it."""
    vars(self).update(_no_state)


SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (graph_compile, "tensorify_python_scalars", tensorify_python_scalars),
    (PhiloxState, "reset", reset),
)
