"""Texts that torch writes for its logs, left out where no log is kept: AOTAutograd's of graphs, Dynamo's of the user's line to which
each guard goes back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from fxfuse._torch import dynamo_guards, graph_compile, trace_log

_OF_GRAPHS = (graph_compile.aot_joint_log, graph_compile.aot_graphs_log)
_OF_GUARDS = tuple(getattr(dynamo_guards, f"{name}_log") for name in ("guards", "verbose_guards", "recompiles", "recompiles_verbose"))


def if_kept(write: Callable[..., Any], logs: Iterable[logging.Logger], unwritten: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes for these logs, or another one where all are off."""

    @wraps(write)
    def written(*args: Any, **named: Any) -> Any:
        kept = trace_log.handlers or any(log.isEnabledFor(logging.INFO) for log in logs)
        return (write if kept else unwritten)(*args, **named)

    return written


SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (graph_compile, "_log_joint_graph", if_kept(graph_compile._log_joint_graph, _OF_GRAPHS, lambda *_, **__: None)),
    (graph_compile, "_log_fw_bw_graphs", if_kept(graph_compile._log_fw_bw_graphs, _OF_GRAPHS, lambda *_, **__: (None, None))),
    (dynamo_guards, "get_verbose_code_part", if_kept(dynamo_guards.get_verbose_code_part, _OF_GUARDS, lambda guard, _: guard)),
)
