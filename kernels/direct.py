"""A launch of known layout as one generated Python function: no loops, no look-ups, nothing computed that is known.

It checks that the tensors are what it was made for (or returns None), allocates the outputs and calls Triton's C launcher, whose
arguments are constants but for the stream and the addresses. What those arguments are differs between versions of Triton: they
are found by having Triton's own launcher call a recorder, with numbers in place of the addresses that are recognised afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse import _torch
from fxfuse.kernels.invoke import INTERPRETED, Kernel, current_device, current_stream

# Numbers that stand for addresses and the stream while the arguments of the C launcher are recorded.
FIRST_MARK = 0x5EED0000


class Form(NamedTuple):
    """What an allocation needs to make an output again."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Made(NamedTuple):
    """A tensor that a launch writes: allocated by its form, or the tensor named by ``place``."""

    name: str
    form: Form
    place: str = ""


@dataclass(frozen=True)
class Stage:
    """One kernel of a launch, and the names of its tensors in order."""

    kernel: Kernel
    instances: int
    operands: tuple[str, ...]


def names_of(group: int, count: int) -> list[str]:
    """How the tensors of an argument list are named."""
    return [f"a{group}_{k}" for k in range(count)]


def compose(groups: Sequence[Sequence[Tensor]], made: Sequence[Made], stages: Sequence[Stage], results: str,
            guarded: bool = True) -> Callable[..., Any] | None:
    """The function of the argument lists ``groups`` that makes ``made``, runs ``stages`` and returns ``results``, an expression.

    None: some tensor is not aligned to 16 bytes, which the kernels would have to know. ``guarded``: compare by torch's own guard,
    which also looks at what launches do not depend on; without it, attribute by attribute.
    """
    tensors = [t for group in groups for t in group]
    if any(t.data_ptr() & 15 for t in tensors):
        return None
    index = tensors[0].get_device()
    names = [name for g, group in enumerate(groups) for name in names_of(g, len(group))]
    known: dict[str, Any] = {"current_device": current_device, "current_stream": current_stream, "empty": _allocator(tensors[0])}
    lines = [f"def launch({', '.join(f'group{g}' for g in range(len(groups)))}):"]
    lines += [f"    {', '.join(names_of(g, len(group)))}, = group{g}" for g, group in enumerate(groups) if group]
    lines.append(f"    if {_differ(names, tensors, known, guarded)}{'' if INTERPRETED else f' or current_device() != {index}'}:")
    lines.append("        return None")
    lines += [f"    p_{name} = {name}.data_ptr()" for name in names]
    lines += [f"    if ({' | '.join(f'p_{name}' for name in names)}) & 15:", "        return None"]
    for one in made:
        known[f"dtype_{one.name}"] = one.form.dtype
        made_anew = f"empty({tuple(one.form.shape)}, {tuple(one.form.strides)}, dtype_{one.name})"
        lines.append(f"    {one.name} = {one.place or made_anew}")
    addresses = {name: f"p_{name}" for name in names} | {one.name: f"p_{one.place}" for one in made if one.place}
    if not INTERPRETED:
        lines.append(f"    stream = current_stream({index})")
    for k, stage in enumerate(stages):
        lines.append(f"    {_call(stage, k, addresses, known)}")
    lines.append(f"    return {results}")
    exec(compile("\n".join(lines), "<fxfuse launch>", "exec"), known)
    return known["launch"]


def _allocator(like: Tensor) -> Callable[..., Tensor]:
    """What allocates on the tensor's device, current at the call; in torch's deterministic mode, with its filling."""
    if like.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return _torch.empty_strided_cuda
    device = like.device
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _differ(names: Sequence[str], tensors: Sequence[Tensor], known: dict[str, Any], guarded: bool) -> str:
    """An expression: are these tensors others than those of this layout."""
    if guarded:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        known["same"] = _torch.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return f"not same({', '.join(names)})"
    parts = []
    for name, tensor in zip(names, tensors, strict=True):
        known |= {f"shape_{name}": tensor.shape, f"strides_{name}": tensor.stride(), f"type_{name}": tensor.dtype}
        parts.append(f"{name}.shape != shape_{name} or {name}.stride() != strides_{name} or {name}.dtype is not type_{name}")
    return f"{' or '.join(parts)} or {names[0]}.get_device() != {tensors[0].get_device()}"


def _call(stage: Stage, k: int, addresses: dict[str, str], known: dict[str, Any]) -> str:
    """The statement that launches a stage on ``stream``."""
    if INTERPRETED:
        known[f"kernel_{k}"] = stage.kernel
        return f"kernel_{k}(({', '.join(stage.operands)},), {stage.instances})"
    values = [addresses.get(name, f"{name}.data_ptr()") for name in stage.operands]
    recorded = record(stage.kernel.compiled, stage.instances, len(values), stage.kernel.numbers)
    if recorded is None:
        known |= {f"run_{k}": stage.kernel.compiled.run, f"function_{k}": stage.kernel.compiled.function,
                  f"packed_{k}": stage.kernel.compiled.packed_metadata}
        numbers = [repr(number) for number in stage.kernel.numbers]
        return (f"run_{k}({stage.instances}, 1, 1, stream, function_{k}, packed_{k}, None, None, None, "
                f"{', '.join([*values, *numbers])})")
    launch, arguments = recorded
    known[f"run_{k}"] = launch
    marks = {FIRST_MARK: "stream"} | {FIRST_MARK + 1 + i: value for i, value in enumerate(values)}
    return f"run_{k}({_written(arguments, marks, f'constant_{k}_', known)[1:-1]})"


def record(compiled: Any, instances: int, count: int, numbers: Sequence[int]) -> tuple[Callable[..., Any], tuple] | None:
    """Triton's C launcher and what it would be called with, ``count`` addresses and the stream being marks.

    None: this version's launcher is none of the kind, or needs memory of its own at each call.
    """
    launcher = compiled.run
    launch = getattr(launcher, "launch", None)
    needs_memory = any(hasattr(launcher, name) and getattr(launcher, name) for name in ("global_scratch_size", "profile_scratch_size"))
    if not inspect.isbuiltin(launch) or not hasattr(launcher, "__dict__") or needs_memory:
        return None
    calls: list[tuple] = []
    marks = [FIRST_MARK + i for i in range(count + 1)]
    launcher.launch = lambda *arguments: calls.append(arguments)
    try:
        launcher(instances, 1, 1, marks[0], compiled.function, compiled.packed_metadata, None, None, None, *marks[1:], *numbers)
    finally:
        launcher.launch = launch
    if len(calls) != 1 or sorted(_marks_in(calls[0], marks)) != marks:
        return None
    return launch, calls[0]


def _marks_in(value: Any, marks: Sequence[int]) -> list[int]:
    if isinstance(value, tuple):
        return [mark for item in value for mark in _marks_in(item, marks)]
    return [value] if type(value) is int and value in marks else []


def _written(value: Any, marks: dict[int, str], prefix: str, known: dict[str, Any]) -> str:
    """A recorded argument as an expression; constants that have no text get a name."""
    if type(value) is tuple:
        return f"({''.join(_written(item, marks, prefix, known) + ', ' for item in value)})"
    if type(value) is int and value in marks:
        return marks[value]
    if value is None or type(value) in (int, bool):
        return repr(value)
    name = f"{prefix}{len(known)}"
    known[name] = value
    return name
