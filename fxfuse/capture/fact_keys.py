"""What torch asks its cache of operations on stand-ins with, written down directly; and views from that cache, made once.

The question is a list of all that the operands are: for each tensor its dtype, sizes, strides and so on, for each of those its type.
torch asks of every item whether it is one of a dozen kinds, most of which no operand of a model is. The same list is written here for
tensors, tuples, plain numbers and texts, by their types; everything else by torch.

How a tensor's channels lie is no question where sizes are symbols: torch works it out and leaves it away.

A view that is found in the cache was made as a tensor of its own first, with all its sizes, and then put into its base's memory, whose
size was worked out once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import SymInt
from torch.fx.immutable_collections import immutable_list

from fxfuse._torch import FakeTensor, FakeTensorMode, OpOverload, fake_tensors, in_kernel_invocation

_described = fake_tensors.extract_tensor_metadata
_suggested = fake_tensors.suggest_memory_format
_write_of_torch = FakeTensorMode._prep_args_for_hash
_made_by_torch = FakeTensorMode._get_output_tensor_from_cache_entry
_FIELDS = tuple(fake_tensors.TensorMetadata.__dataclass_fields__)
_PLAIN = frozenset([bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload])
_SEVERAL = frozenset([tuple, list, torch.Size, immutable_list])


@wraps(_write_of_torch)
def write(self: Any, result: list[object], args: Any, state: Any, id_hashed_objects: list[object]) -> None:
    """Appends to ``result`` what stands for ``args``; torch raises its own error for what cannot be asked."""
    kind = type(args)
    if kind is dict:
        result += (kind, f"length_{len(args)}")
        write(self, result, iter(args.keys()), state, id_hashed_objects)
        write(self, result, iter(args.values()), state, id_hashed_objects)
        return
    if kind in _SEVERAL:
        result += (kind, f"length_{len(args)}")
    elif isinstance(args, (list, tuple, dict)):
        _write_of_torch(self, result, args, state, id_hashed_objects)
        return
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            result += (kind, arg)
        elif kind is SymInt:
            state.convert_sym_int(result, arg)
        elif kind is FakeTensor and arg.fake_mode is self and arg.constant is None and arg.layout is torch.strided:
            _write_tensor(arg, result, state)
        elif kind in _SEVERAL:
            write(self, result, arg, state, id_hashed_objects)
        else:
            _write_of_torch(self, result, iter((arg,)), state, id_hashed_objects)


def _write_tensor(tensor: Any, result: list[object], state: Any) -> None:
    """All fields of what torch describes a tensor by."""
    facts = _described(tensor)
    for name in _FIELDS:
        value = getattr(facts, name)
        kind = type(value)
        if kind is torch.Size or kind is tuple:
            result += (kind, f"length_{len(value)}")
            for size in value:
                if type(size) is int:
                    result += (int, size)
                else:
                    state.convert_sym_int(result, size)
        elif kind is SymInt:
            state.convert_sym_int(result, value)
        else:
            result.append(value)


@wraps(_suggested)
def suggested(tensor: Any) -> torch.memory_format:
    return torch.contiguous_format if tensor._has_symbolic_sizes_strides else _suggested(tensor)


@wraps(_made_by_torch)
def made(self: Any, state: Any, entry: Any, key: Any, func: Any, args: Any) -> Any:
    """The output that ``entry`` describes."""
    facts = entry.metadata
    base: Any = args[entry.view_idx] if entry.view_idx is not None and isinstance(func, OpOverload) and func.is_view else None
    if facts is None or entry.inplace_idx is not None or type(base) is not FakeTensor or facts.is_conj or facts.is_neg \
            or facts.layout is not torch.strided or facts.requires_grad or facts.dtype != base.dtype or self.shape_env is None:
        return _made_by_torch(self, state, entry, key, func, args)
    sizes = [_known(value, key, state) for value in facts.shape]
    strides = [_known(value, key, state) for value in facts.stride]
    offset = _known(facts.storage_offset, key, state)
    with in_kernel_invocation(self), self.shape_env.suppress_guards():
        view = torch.as_strided(base, sizes, strides, offset)
    return FakeTensor(self, view, facts.device)


def _known(value: Any, key: Any, state: Any) -> Any:
    return value if type(value) is int else value.extract(key, state.shape_env)


SETTINGS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (FakeTensorMode, "_prep_args_for_hash", write),
    (FakeTensorMode, "_get_output_tensor_from_cache_entry", made),
    (fake_tensors, "suggest_memory_format", suggested),
)
