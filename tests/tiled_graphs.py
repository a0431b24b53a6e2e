"""Graphs for tests of tiles: traced from plain functions, with sizes that vary; and a count of the bytes that live while one runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxfuse.bufferize import boxed


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The ATen graph of a function; its placeholders are symbolic in every dimension that is not 1 or a multiple of 16."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)
    fakes = []
    for i, tensor in enumerate(inputs):
        dims = [DimDynamic.STATIC if size == 1 or size % 16 == 0 else DimDynamic.DUCK for size in tensor.shape]
        fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dims), source=ConstantSource(f"in_{i}")))
    with mode:
        return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)


def outputs(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a graph as it is run in earnest: inputs are let go when they were last read."""
    return list(boxed(gm)(list(inputs)))


class LiveBytes(TorchDispatchMode):
    """``most``: the most bytes that lived at once, of what operations made. Memory counts as long as a tensor lies in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.known: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        foreign = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, foreign)
        self.most = max(self.most, sum(self.sizes.values()))
        return result

    def _note(self, tensor: Tensor, foreign: set[int]) -> None:
        key = tensor.untyped_storage()._cdata
        if hasattr(tensor, "_counted") or (key in foreign and key not in self.tensors):
            return
        tensor._counted = True  # type: ignore[attr-defined]
        self.tensors[key] += 1
        self.sizes[key] = tensor.untyped_storage().nbytes()
        weakref.finalize(tensor, self._forget, key)

    def _forget(self, key: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key], self.sizes[key]
