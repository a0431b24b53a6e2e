"""Counts the sites of a model by watching which ATen operators one forward pass runs: no compiler, no names.

A norm is a layer_norm or a reciprocal square root, an activation a silu, gelu, tanh..., a loss an nll_loss; a rotary
application is a product with something computed from cos, sin or polar alone. The same instrument runs on the eager
model (what there is) and on the optimized one (what was left: a fused op is one operator, its inside is not seen).
It looks at no class, no attribute and no compiler data structure, so renaming a model cannot change it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

_REFERENCE = os.path.join("fxfuse", "reference.py")
KINDS = ("norm", "activation", "rotary", "softmax", "loss")

_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "rsqrt", "rsqrt_"}
_ACTIVATIONS = {
    "silu",
    "gelu",
    "relu",
    "sigmoid",
    "tanh",
    "softplus",
    "expm1",
    "elu",
    "leaky_relu",
    "mish",
    "hardtanh",
    "hardswish",
}
_LOSSES = {"nll_loss_forward", "nll_loss2d_forward", "cross_entropy_loss"}
_SOFTMAXES = {"_softmax"}
_TABLES = {"cos", "sin", "polar"}
_PRODUCTS = {"mul", "mul_", "addcmul"}
# what keeps "the tensor being rotated" the same tensor: halves, pairs, signs, casts
_WITHIN = {
    "slice",
    "neg",
    "cat",
    "stack",
    "_to_copy",
    "alias",
    "detach",
    "select",
    "squeeze",
    "unsqueeze",
    "clone",
    "view_as_complex",
    "view_as_real",
    "lift_fresh",
}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _floating(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if (t.is_floating_point() or t.is_complex()) and t.dim() > 0]


def _inside_a_fused_op() -> bool:
    """Is fxfuse's CPU reference executing a row program? On a CPU a fused op is a stretch of ATen operators."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_REFERENCE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@dataclass
class Site:
    kind: str
    op: str
    module: str
    shape: tuple[int, ...]


@dataclass
class Census(TorchDispatchMode):
    """Use as `with Census.of(model) as census: model(**inputs)`; then `census.counts()`."""

    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._stack: list[str] = []
        self._tables = WeakIdKeyDictionary()
        self._origin = WeakIdKeyDictionary()
        self._pairs = WeakIdKeyDictionary()  # [..., d/2, 2], to be flattened again
        self._rotated: set[tuple[str, int]] = set()
        self._next = 0

    __hash__ = object.__hash__

    @classmethod
    def of(cls, model: torch.nn.Module) -> Census:
        """The census of one model: module paths for its sites, and its buffers that are rotary tables already."""
        census = cls({id(module): name for name, module in model.named_modules()})
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.dim() > 1 and buffer.shape[-1] % 2 == 0:
                a, b = buffer.double().chunk(2, dim=-1)
                if torch.allclose(
                    a * a + b * b, torch.ones_like(a), atol=1e-2
                ):  # [sin, cos]: GPT-J keeps one
                    census._tables[buffer] = True
        return census

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled under this mode, so that the optimized model can be watched too."""
        return True

    def __enter__(self) -> Self:
        if self.names:
            self._called = torch.nn.Module.__call__
            torch.nn.Module.__call__ = self._followed(self._called)  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.names:
            torch.nn.Module.__call__ = self._called  # type: ignore[method-assign]

    def _followed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Which module is running. No hook for all modules says so: while there is one, an optimized model runs eager."""

        @wraps(call)
        def followed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._stack.append(self.names.get(id(module), ""))
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()

        return followed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("aten", "prims") and not _inside_a_fused_op():
            self._see(func._schema.name.split("::")[-1], args, out)
        return out

    def counts(self) -> dict[str, int]:
        counted = Counter(site.kind for site in self.sites)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    # --- what one operator tells -------------------------------------------------------------------------

    def _see(self, name: str, args: Any, out: Any) -> None:
        inputs = _floating(_tensors(args))
        if name in _NORMS or (name == "pow" and isinstance(args[1], float) and args[1] == -0.5):
            self._add("norm", name, inputs)
        elif name in _ACTIVATIONS and inputs and inputs[0].dim() > 1:
            self._add("activation", name, inputs)
        elif name in _SOFTMAXES:
            self._add("softmax", name, inputs)
        elif name in _LOSSES:
            self._add("loss", name, inputs)
        self._rotary(name, inputs, _floating(_tensors(out)))

    def _add(self, kind: str, op: str, inputs: list[torch.Tensor]) -> None:
        self.sites.append(
            Site(kind, op, self._stack[-1] if self._stack else "", tuple(inputs[0].shape) if inputs else ())
        )

    def _rotary(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        tables = [t for t in inputs if t in self._tables]
        if name in _TABLES or (inputs and len(tables) == len(inputs)):
            for tensor in outputs:
                self._tables[tensor] = True
        elif tables and name in _PRODUCTS:
            other = next(t for t in inputs if t not in self._tables)
            key = (self._stack[-1] if self._stack else "", self._origin_of(other))
            if key not in self._rotated:
                self._rotated.add(key)
                self._add("rotary", name, [other])
        elif inputs and self._keeps(name, inputs[0], outputs):
            for tensor in outputs:
                self._origin[tensor] = self._origin_of(inputs[0])
                if name == "stack":
                    self._pairs[tensor] = True

    def _keeps(self, name: str, tensor: torch.Tensor, outputs: list[torch.Tensor]) -> bool:
        if name in ("split", "split_with_sizes", "unbind"):
            return len(outputs) == 2  # halves of one head; three parts are q, k and v
        return name in _WITHIN or (name in ("view", "_unsafe_view") and tensor in self._pairs)

    def _origin_of(self, tensor: torch.Tensor) -> int:
        if tensor not in self._origin:
            self._next += 1
            self._origin[tensor] = self._next
        return self._origin[tensor]
