"""Writing canonical nodes: each new node is computed once on fake tensors, so that its dtype, shape and strides are facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map, tree_map_only

from .._torch import FakeTensor, FakeTensorMode, enable_python_dispatcher
from .facts import provenance, record, same_size, same_sizes, tensor_of, value_of
from .vocabulary import CAST, aten


class Leave(Exception):
    """Raised by a reader that meets a form it has no canonical words for: the node stays exactly as it was."""


class Builder:
    """Inserts nodes before ``node``, the spelling that is being replaced, and keeps what it inserted."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph: Graph = gm.graph
        self.fake_mode = _fake_mode_of(gm)
        self.node: Node
        self.inserted: list[Node] = []

    def at(self, node: Node) -> None:
        self.node, self.inserted = node, []

    def discard(self) -> None:
        """Take back what was inserted for a node that is left as it was."""
        for node in reversed(self.inserted):
            self.graph.erase_node(node)
        self.inserted = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert ``target(*args)`` with its facts computed; autocast is off, so a dtype follows from the operands alone."""
        value = self._computed(target, args, kwargs)
        return self._insert(target, args, kwargs, value)

    def finish(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """The call whose result stands for the spelling's. Where autocast ran the spelling in another dtype than its operands',
        the cast that it made becomes a node."""
        expected = self.expected()
        if self._settled(args, expected):
            return self._insert(target, args, kwargs, expected)
        value = self._computed(target, args, kwargs)
        if value.dtype != expected.dtype:
            args = tuple(self._autocast(arg, expected.dtype) for arg in args)
            value = self._computed(target, args, kwargs)
        if value.dtype != expected.dtype:
            raise Leave(f"{target} gives {value.dtype} where the graph has {expected.dtype}")
        return self._insert(target, args, kwargs, value)

    def like(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Insert an operation in the spelling's own words (a method, an operator), under its own autocast."""
        callee = getattr(torch.Tensor, target) if op == "call_method" else target
        value = self._computed(callee, args, kwargs)
        return self._insert(target, args, kwargs, value, op)

    def viewed(self, memory: Tensor, shape: Tensor) -> Tensor:
        """A fake view of ``memory`` with the sizes and strides of ``shape``."""
        with self._tracing():
            return memory.as_strided(shape.shape, shape.stride(), 0)

    def expected(self) -> Tensor:
        """The fake result of the spelling."""
        expected = tensor_of(self.node)
        if expected is None:
            raise Leave("the trace kept no tensor for this node")
        return expected

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        return x if self.tensor(x).dtype == dtype else self.call(CAST, x, dtype)

    def tensor(self, x: Any) -> Tensor:
        """The fake tensor of an argument that must be a dense real tensor."""
        tensor = tensor_of(x)
        if tensor is None or tensor.layout is not torch.strided:
            raise Leave("an operand is not a dense tensor")
        return tensor

    def dim(self, x: Node, dim: Any, extra: int = 0) -> int:
        """A dimension of x (of a result with ``extra`` more dimensions) counted from the end: -1 is the last."""
        rank = self.tensor(x).dim() + extra
        if not isinstance(dim, int) or not -rank <= dim < rank:
            raise Leave("a dimension is not a number in range")
        return dim if dim < 0 else dim - rank

    def sizes(self, shape: Sequence[Any], *sources: Node) -> list[Any]:
        """A shape as arguments: numbers where static, ``sym_size`` of a source where symbolic, one -1 for what is left."""
        return _inferred([self._size(size, sources) for size in shape])

    def _size(self, size: Any, sources: Sequence[Node]) -> Any:
        if not isinstance(size, SymInt):
            return size
        for source in sources:
            for i, candidate in enumerate(self.tensor(source).shape):
                if same_size(candidate, size):
                    return self._insert(aten.sym_size.int, (source, i), {}, candidate)
        return None

    def _settled(self, args: tuple[Any, ...], expected: Tensor) -> bool:
        """No operand is converted on the way to the result: the spelling's own fake result is the canonical node's too."""
        tensors = [t for t in (tensor_of(arg) for arg in args) if t is not None]
        floating = [t for t in tensors if t.is_floating_point()]
        return bool(floating) and all(t.dtype == expected.dtype for t in floating)

    def _autocast(self, arg: Any, dtype: torch.dtype) -> Any:
        tensor = tensor_of(arg)
        return self.cast(arg, dtype) if tensor is not None and tensor.is_floating_point() else arg

    def _computed(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Node, self._operand, (args, kwargs))
        try:
            with self._tracing():
                return target(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError) as error:
            raise Leave(f"{target} has no value on these operands: {error}") from error

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        shape_env = self.fake_mode.shape_env
        no_new_guards = shape_env.suppress_guards() if shape_env is not None else nullcontext()
        needs_grad = any(t.requires_grad for t in _tensors(value_of(self.node)))
        # The dispatcher of Python, as Dynamo has it: without it torch 2.11 cannot tell the shape of a linear over symbolic sizes.
        with self.fake_mode, no_new_guards, enable_python_dispatcher(), torch._C._DisableAutocast(), torch.set_grad_enabled(needs_grad):
            yield

    def _operand(self, node: Node) -> Any:
        return tree_map(self._fake, value_of(node))

    def _fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self.fake_mode.from_tensor(value, static_shapes=True)
        return value

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any,
                op: str = "call_function") -> Node:  # fmt: skip
        with self.graph.inserting_before(self.node):
            node = self.graph.create_node(op, target, args, kwargs)
        node.meta = provenance(self.node)
        record(node, value, like=self.node)
        self.inserted.append(node)
        return node


def stands_for(node: Node, original: Node) -> bool:
    """Has the canonical result the dtype, shape and device of the node that it replaces."""
    new, old = tensor_of(node), tensor_of(original)
    if new is None or old is None:
        return False
    return new.dtype == old.dtype and new.device == old.device and same_sizes(new.shape, old.shape)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def _inferred(sizes: list[Any]) -> list[Any]:
    if sizes.count(None) > 1:
        raise Leave("a shape has two sizes that no operand has")
    return [-1 if size is None else size for size in sizes]


def _fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    for node in gm.graph.nodes:
        for tensor in _tensors(value_of(node)):
            if isinstance(tensor, FakeTensor):
                return tensor.fake_mode
    return FakeTensorMode()
