"""Which linears of a canonical graph read one input: found before autograd, so that it can be told before anything is compiled.

What is done with them is decided after the partition (stacking.py, accumulation.py); until then such a site is pending.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

from torch import fx

from ..canonical.facts import dtype_of, module_path, shape_of, static_size
from ..reporting.records import Site
from .expression import argument, is_linear
from .terms import is_thin

RULE = "shared_input_linears"


def shared_inputs(graph: fx.Graph, differentiable: Collection[fx.Node], use: Callable[[str], str]) -> list[Site]:
    """A site for each input that several linears read: thin ones forward, any where the input's gradient is their sum."""
    readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_linear(node) and dtype_of(node) == dtype_of(argument(node, 0, "input")):
            readers[argument(node, 0, "input")].append(node)
    places: dict[str, Site] = {}
    for source, linears in readers.items():
        thin = [node for node in linears if _is_thin(node)]
        wide = [node for node in linears if not _is_thin(node)]
        for group, applies in ((thin, True), (wide, source in differentiable)):
            if applies and len(group) > 1:
                reason = use(RULE)
                module = common_module([module_path(node) for node in group])
                places.setdefault(module, Site(RULE, module, "declined" if reason else "pending", reason))
    return list(places.values())


def _is_thin(linear: fx.Node) -> bool:
    shape = shape_of(argument(linear, 1, "weight"))
    return shape is not None and len(shape) == 2 and is_thin(static_size(shape[0]), static_size(shape[1]))


def common_module(paths: Sequence[str]) -> str:
    """The innermost module that all paths lead into."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*[path.split(".") for path in paths], strict=False))
    return ".".join(parts[0] for parts in shared)
