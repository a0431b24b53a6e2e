"""Tiles as a plan asks for them, with a record of what was done."""

from __future__ import annotations

import logging

from torch import fx

from ..._torch import make_graph_module
from ...reporting.records import GraphRecord
from ..plan import tiles_of
from . import TileReport, tile, tile_freely

logger = logging.getLogger("fxfuse")


def tile_as_planned(gm: fx.GraphModule, record: GraphRecord, plan: str, *, backward: bool, strict: bool) -> str:
    """Cut a graph into as many tiles as the plan says; without a plan (``none``) a backward, where it is free. Returns the tiles' code.

    strict: raise on an internal error, which would otherwise leave the graph as it was
    """
    count = tiles_of(plan)
    if count == 1 and not (backward and plan == "none"):
        return ""
    work = make_graph_module(gm, _copied(gm.graph))
    try:
        report = tile(work, tiles=count) if count > 1 else tile_freely(work)
    except Exception as error:
        if strict:
            raise
        line = f"no tiles in {record.module or 'a graph'}: {type(error).__name__}: {error}"
        logger.error("%s", line, exc_info=error)
        record.errors.append(line)
        return ""
    if report is None or not report.segments:
        return ""
    gm.graph = work.graph
    gm.recompile()
    return described(report)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    copy.output(copy.graph_copy(graph, {}))
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy


def described(report: TileReport) -> str:
    """What runs in tiles, as comments and code for people."""
    parts = [f"# tiles_{i}: {count} tiles of at most {rows} rows\n{source.strip()}"
             for i, ((_, rows, count), source) in enumerate(zip(report.segments, report.sources, strict=True))]
    return "\n\n".join(["", *parts, ""])
