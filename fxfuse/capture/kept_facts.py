"""What an operation makes of stand-ins for tensors is kept by torch, so that the same one is not asked for again. What is kept is tried
out at once: a tensor is made from it, of which torch wants to know whether its operations would be dispatched alike. With symbolic
sizes making one takes as long as the operation took.

How operations on a tensor are dispatched follows from its kind: device, dtype, layout, and so on. So one of a kind is tried.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from fxfuse._torch import FakeTensor, FakeTensorMode, dispatch_keys

_tried: set[tuple] = set()
_described = FakeTensorMode._get_output_info_for_cache_entry


@wraps(_described)
def described(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What is kept of ``output``; torch raises its own error if nothing is to be."""
    by_values = self.shape_env is not None and self.shape_env.unbacked_symint_counter > 0  # then trying could fail
    if type(output) is not FakeTensor or by_values:
        return _described(self, state, key, func, args, kwargs, output)
    kind = (dispatch_keys(output), output.device, output.dtype, output.layout, output.requires_grad, output.is_conj(), output.is_neg(),
            getattr(func, "is_view", False))
    if kind not in _tried:
        info = _described(self, state, key, func, args, kwargs, output)
        _tried.add(kind)
        return info
    self._output_from_cache_entry = lambda *_: output
    try:
        return _described(self, state, key, func, args, kwargs, output)
    finally:
        del self._output_from_cache_entry


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((FakeTensorMode, "_get_output_info_for_cache_entry", described),)
