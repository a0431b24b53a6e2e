"""A whole plain function as one row program: what patterns, ``fuse`` and ``derive`` start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..canonical import canonicalize
from ..canonical.facts import user_line
from ..errors import UnsupportedGraph
from ..tracing import trace_function
from .find import find_regions
from .region import Region


def whole_region(gm: fx.GraphModule) -> Region:
    """The one region that computes every output of a canonical graph. Raises UnsupportedGraph naming what stands outside."""
    regions, declined = find_regions(gm)
    if declined:
        raise UnsupportedGraph(f"{declined[0].module or 'the function'}: {declined[0].reason}")
    results = {node for node in gm.graph.find_nodes(op="output")[0].all_input_nodes}
    for region in regions:
        if results <= {view.node for view in region.outputs}:
            return region
    covered = {node for region in regions for node in region.nodes}
    outside = [
        n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr") and n not in covered
    ]
    first = outside[0] if outside else next(iter(results))
    where = f" ({line})" if (line := user_line(first)) else ""
    raise UnsupportedGraph(
        f"the function is not one row program: {first.name}{where} is neither pointwise nor a reduction over the last "
        "dimension, or it computes too little to fuse; fuse the part around it"
    )


def trace_region(function: Callable[..., Any], *example_inputs: Any, **constants: Any) -> tuple[fx.GraphModule, Region]:
    """The canonical graph of a plain function and the region that covers it."""
    gm = trace_function(function, *example_inputs, **constants)
    canonicalize(gm)
    return gm, whole_region(gm)
