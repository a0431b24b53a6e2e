"""Texts of graphs that AOTAutograd writes for its logs, left out where no log is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from fxfuse._torch import graph_compile, trace_log

_LOGS = (graph_compile.aot_joint_log, graph_compile.aot_graphs_log)


def if_kept(write: Callable[..., Any], unwritten: Any) -> Callable[..., Any]:
    """A function that logs, or what it returns where logs are off."""

    @wraps(write)
    def logged(*args: Any, **named: Any) -> Any:
        if trace_log.handlers or any(log.isEnabledFor(logging.INFO) for log in _LOGS):
            return write(*args, **named)
        return unwritten

    return logged


SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (graph_compile, "_log_joint_graph", if_kept(graph_compile._log_joint_graph, None)),
    (graph_compile, "_log_fw_bw_graphs", if_kept(graph_compile._log_fw_bw_graphs, (None, None))),
)
