"""A joint graph and its metadata as bytes, and back: nodes by their place, operators by name and schema, fake tensors by their facts.

Sizes stay expressions over the symbols of the run that reads them. Tensors that shared memory when they were written share it when they
are read, others do not (torch's elimination of equal nodes looks at it). Where nodes come from in the model is not written: it is
taken from the graph that is being compiled. Not kept, because nothing after AOTAutograd reads it: ``from_node`` (which pass made a
node), ``source_fn_stack`` and ``eager_input_vals`` (for Inductor and export).
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx

from .._torch import FakeTensor, FakeTensorMode, OpOverload, SymNode, ViewAndMutationMeta, make_graph_module
from .asked import Unknown, text_of, text_of_function, text_of_op, text_of_tensor

_DROPPED = frozenset(["from_node", "source_fn_stack", "fwd_source_fn_stack", "eager_input_vals"])
_STACKS = ("nn_module_stack", "fwd_nn_module_stack")  # from numbers of objects to paths and classes
_READABLE = ("torch", "sympy", "collections", "operator", "_operator", "math", __name__)
_ARITHMETIC = ("operator", "_operator", "math")
_READERS = frozenset(["_member", "_of_torch", "_operator", "_sym_int", "_tensor"])
_OF_SIZES = frozenset(["sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum"])
_BUILTINS = frozenset(["set", "frozenset", "slice", "complex", "range", "type"])


@dataclass
class Row:
    """A node, with Place for nodes in its arguments. ``stacks``: for these facts the place, in the graph that was asked about, of a
    node that comes from the same modules.
    """

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    type: Any
    meta: dict[str, Any]
    stacks: dict[str, int]


class Place:
    """The node at this place of the graph."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple:
        return Place, (self.index,)


@dataclass
class Written:
    """A trace without what it belongs to. ``names``: the names that the graph has used, which later nodes avoid."""

    rows: list[Row]
    names: tuple[set[str], dict[str, int]]
    metadata: Any
    kind: str


def write(gm: fx.GraphModule, metadata: ViewAndMutationMeta, asked: fx.Graph) -> bytes:
    """The trace as bytes. Unknown where something cannot be written."""
    _check_metadata(metadata)
    origins = _Origins(asked)
    places = {node: Place(index) for index, node in enumerate(gm.graph.nodes)}
    rows = [_row(node, places, origins) for node in gm.graph.nodes]
    space = gm.graph._graph_namespace
    with io.BytesIO() as stream:
        pickler = _Pickler(stream, protocol=5)
        try:
            pickler.dump(Written(rows, (set(space._used_names), dict(space._base_count)), metadata, type(gm).__name__))
        except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
            raise Unknown(f"a trace that cannot be written: {error}") from error
        return stream.getvalue()


def read(data: bytes, fake_mode: FakeTensorMode, asked: fx.Graph) -> tuple[fx.GraphModule, ViewAndMutationMeta]:
    """The trace, in this run's fake tensors and symbols. Unknown where this run does not have what it names."""
    with io.BytesIO(data) as stream:
        written = _Unpickler(stream, fake_mode).load()
    origins = list(asked.nodes)
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def node_at(value: Any) -> Any:
        return nodes[value.index] if type(value) is Place else value

    for row in written.rows:
        args, kwargs = (fx.node.map_aggregate(part, node_at) for part in (row.args, row.kwargs))
        node = graph.create_node(row.op, row.target, args, kwargs, row.name, row.type)
        if node.name != row.name:
            raise Unknown(f"the name {row.name}")
        node.meta = row.meta
        for fact, place in row.stacks.items():
            node.meta[fact] = origins[place].meta["nn_module_stack"]
        nodes.append(node)
    graph._graph_namespace._used_names, graph._graph_namespace._base_count = written.names
    graph.lint()
    return make_graph_module(torch.nn.Module(), graph, written.kind), written.metadata


def text_of_trace(gm: fx.GraphModule, metadata: ViewAndMutationMeta) -> str:
    """All that is kept of a trace, to compare two of them."""
    storages: dict[int, int] = {}
    lines = [text_of(list(sorted(gm.graph._graph_namespace._used_names))), type(gm).__name__, repr(metadata)]
    for node in gm.graph.nodes:
        kept = {key: value for key, value in node.meta.items() if key not in (*_DROPPED, *_STACKS, "desc")}
        shared = [storages.setdefault(t.untyped_storage()._cdata, len(storages)) for t in _tensors(node.meta.get("val"))]
        stacks = [repr(node.meta.get(fact)) for fact in _STACKS]
        target = str(node.target) if isinstance(node.target, str) else _target_text(node.target)
        kept = {key: kept[key] for key in sorted(kept)}
        lines.append(f"{node.name} = {node.op} {target} {text_of(node.args)} {text_of(node.kwargs)} {text_of(kept)} {shared} {stacks} "
                     f"{node.meta.get('desc')!r}")
    return "\n".join(lines)


def _target_text(target: Any) -> str:
    return text_of_op(target) if isinstance(target, OpOverload) else text_of_function(target)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _check_metadata(metadata: ViewAndMutationMeta) -> None:
    """Only graphs that change none of their inputs, and give none of them back as views."""
    if metadata.tokens or metadata.num_backward_tokens or metadata.num_intermediate_bases or metadata.num_graphsafe_rng_states:
        raise Unknown("a graph with effects, or with outputs that share memory")
    if any(info.mutates_data or info.mutates_metadata for info in metadata.input_info):
        raise Unknown("a graph that changes its inputs")
    if any(info.view_meta_sequence is not None for info in metadata.output_info):
        raise Unknown("outputs that are views")


def _row(node: fx.Node, places: dict[fx.Node, Place], origins: _Origins) -> Row:
    if node.op == "get_attr":
        raise Unknown("a trace with tensors or graphs of its own")
    if node.op == "call_function":
        _target_text(node.target)
    stacks = {fact: origins.place(node.meta[fact]) for fact in _STACKS if node.meta.get(fact) is not None}
    meta = {key: value for key, value in node.meta.items() if key not in _DROPPED and key not in stacks}
    args, kwargs = (fx.node.map_arg(part, places.__getitem__) for part in (node.args, node.kwargs))  # type: ignore[arg-type]
    return Row(node.op, node.target, args, kwargs, node.name, node.type, meta, stacks)


class _Origins:
    """Where in the graph that was asked about the modules that a node comes from are found."""

    def __init__(self, asked: fx.Graph) -> None:
        self.places: dict[str, int] = {}
        for index, node in enumerate(asked.nodes):
            if "nn_module_stack" in node.meta:
                self.places.setdefault(repr(node.meta["nn_module_stack"]), index)

    def place(self, modules: Any) -> int:
        found = self.places.get(repr(modules))
        if found is None:
            raise Unknown("modules that are nowhere in the graph")
        return found


class _Pickler(pickle.Pickler):
    """Fake tensors, symbolic sizes and operators by what they are."""

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol=protocol)
        self.storages: dict[int, int] = {}
        self.kept: list[Any] = []  # (what is described is not written itself: it must live while its id is used)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return self._tensor(obj)
        if isinstance(obj, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if not isinstance(obj, torch.SymInt) or obj.node.hint is None:
                raise Unknown(f"the size {obj}")
            return _sym_int, (_THE_MODE, obj.node.expr, obj.node.hint)
        if isinstance(obj, OpOverload):
            return _operator, (obj._schema.name, obj._overloadname, text_of_op(obj))
        if isinstance(obj, (torch.dtype, torch.layout, torch.memory_format)):
            return _of_torch, (str(obj).removeprefix("torch."),)
        if isinstance(obj, enum.Enum):
            return _member, (type(obj), obj.value)  # (Python's own way differs between its versions, some by ``getattr``)
        if isinstance(obj, fx.Node):
            raise Unknown("a node among the facts of a node")
        return NotImplemented

    def persistent_id(self, obj: Any) -> str | None:
        return "mode" if obj is _THE_MODE else None

    def _tensor(self, tensor: Tensor) -> tuple:
        text_of_tensor(tensor)
        if type(tensor) is not FakeTensor or tensor.requires_grad:
            raise Unknown("a tensor of a trace that is differentiated")
        self.kept.append(tensor)
        storage = self.storages.setdefault(tensor.untyped_storage()._cdata, len(self.storages))
        return _tensor, (_THE_MODE, storage, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)


class _Mode:
    """Stands for the fake mode and the symbols of the run that reads."""


_THE_MODE = _Mode()


class _Unpickler(pickle.Unpickler):
    """Reads what _Pickler wrote; names nothing but types of torch's and plain data."""

    def __init__(self, stream: io.BytesIO, fake_mode: FakeTensorMode) -> None:
        super().__init__(stream)
        self.now = _Now(fake_mode)

    def persistent_load(self, pid: Any) -> Any:
        return self.now

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in _READABLE and module != __name__ and not (module == "builtins" and name in _BUILTINS):
            raise Unknown(f"{module}.{name} in a file of traces")
        if module not in sys.modules:
            raise Unknown(f"{module}, which this run has not loaded")
        found = None if "." in name else super().find_class(module, name)  # (dots lead from torch to all that it imports)
        if module in _ARITHMETIC:
            plain = isinstance(found, BuiltinFunctionType)
        else:
            plain = isinstance(found, type) or name in (_READERS if module == __name__ else _OF_SIZES)
        if not plain:
            raise Unknown(f"{module}.{name} in a file of traces")
        return found


class _Now:
    """The fake mode of this run, and the memory that its tensors of one trace share."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.bases: dict[int, Tensor] = {}
        self.sizes: dict[Any, Any] = {}


def _sym_int(now: _Now, expr: Any, hint: int) -> Any:
    size = now.sizes.get(expr)
    if size is None:
        # (what create_symintnode makes, also where a size is known by now and it would make a number of it)
        size = now.sizes[expr] = torch.SymInt(SymNode(expr, now.mode.shape_env, int, hint))
    return size


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    if not issubclass(kind, enum.Enum):
        raise Unknown(f"a member of {kind}")
    return kind(value)


def _of_torch(name: str) -> torch.dtype | torch.layout | torch.memory_format:
    found = getattr(torch, name)
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise Unknown(f"torch.{name} in a file of traces")
    return found


def _operator(name: str, overload: str, schema: str) -> OpOverload:
    namespace, _, packet = name.partition("::")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    if str(op._schema) != schema:
        raise Unknown(f"another {name}.{overload}")
    return op


def _tensor(now: _Now, storage: int, size: Sequence[Any], stride: Sequence[Any], offset: Any, dtype: torch.dtype,
            device: torch.device) -> Tensor:
    base = now.bases.get(storage)
    if base is None:
        base = now.bases[storage] = torch.empty(0, dtype=dtype, device="meta")
    elem = (base if base.dtype == dtype else base.view(dtype)).as_strided(size, stride, offset)
    return FakeTensor(now.mode, elem, device)
