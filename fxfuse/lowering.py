"""What runs a row program on a kind of device: an emitted Triton kernel, or the torch reference on a CPU.

A launcher that runs kernels has a ``compile_ahead(device, *its arguments)``, which takes mere forms and has them compiled meanwhile.

With ``TRITON_INTERPRET=1`` the CPU runs the emitted kernels too, in Triton's interpreter; that is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from re import sub
from threading import Thread

import torch
from torch import Tensor, nn

from . import reference
from ._torch import graph_is_kept, storage_use_count
from .program import parse

Launcher = Callable[..., list[Tensor]]

# Places of outputs (reuse.py): for each the operand whose memory it takes, or None.
Places = tuple[int | None, ...]
# Outputs whose rows lie further apart: for each (operand of the same shape, its dtype, columns to leave free beside it), or None.
Rooms = Sequence[tuple[int, torch.dtype, int] | None]
# On the CPU reuse saves nothing, as the reference computes elsewhere and copies; tests of the liveness proof turn it on.
REUSE_ON_CPU = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def implementation_on(device: str) -> str:
    """``triton`` or ``torch``, for a device type."""
    return "triton" if device == "cuda" or INTERPRETED else "torch"


def start_compilers(model: nn.Module, how: object) -> Thread | None:
    """Where there is a GPU, begins what its first kernels wait for, and starts the processes that compile them: those take a moment to
    come up, and a core each. Where an earlier run of this build optimized such a model, in this way (``how``), they start when
    something is to be compiled after all. The thread that is returned ends when all is there but the processes.
    """
    if not torch.cuda.is_available():
        return None
    from . import earlier_runs
    from .kernels import warm_up, workers

    begun = warm_up.begin(torch.device("cuda", torch.cuda.current_device()))
    if workers.enabled():
        asked = repr(how), *sorted({f"{sub('[0-9]+', '*', name)} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()})
        if earlier_runs.recall("optimized", *asked) is None:
            workers.start()
            earlier_runs.remember("optimized", True, *asked)
    return begun


@contextmanager
def rehearsal() -> Iterator[bool]:
    """Launches in here compile their kernels in other processes and run nothing. False: they do not, and nothing is to be rehearsed."""
    if not torch.cuda.is_available():
        yield False
        return
    from .kernels import ahead

    with ahead.rehearsal() as useful:
        yield useful


@contextmanager
def untimed() -> Iterator[None]:
    """Launches in here that are new take the rule of thumb: their sizes are those of a trial, and what is timed is not used again."""
    if not torch.cuda.is_available():
        yield
        return
    from .kernels import tuning

    with tuning.untimed():
        yield


@lru_cache(maxsize=4096)
def launcher(text: str, device: str) -> Launcher:
    """The launcher of a program on a device type, made once. It is a plain function, so that generated code can name it."""
    program = parse(text)
    if implementation_on(device) == "triton":
        from .kernels.launch import prepare

        prepared = prepare(program)

        def launch(tensors: Sequence[Tensor], reuse: Places = (), saved: Sequence[int] = (), rooms: Rooms = ()) -> list[Tensor]:
            if rooms:
                return prepared(tensors, outputs=with_rooms(tensors, rooms, free_places(tensors, reuse, saved)))
            return prepared(tensors, reuse=free_places(tensors, reuse, saved) if reuse else None)

        def compile_ahead(on: torch.device, tensors: Sequence[Tensor], reuse: Places = (), saved: Sequence[int] = (), rooms: Rooms = ()
                          ) -> None:
            wide = with_rooms(tensors, rooms, ()) if rooms else [None] * len(program.outputs)
            prepared.compile_ahead(tensors, [reference.allocate(program, form, tensors) if out is None else out
                                             for form, out in zip(program.outputs, wide, strict=True)], on)

        launch.compile_ahead = compile_ahead  # type: ignore[attr-defined]
    else:

        def launch(tensors: Sequence[Tensor], reuse: Places = (), saved: Sequence[int] = (), rooms: Rooms = ()) -> list[Tensor]:
            results = reference.execute(program, tensors)
            if rooms:
                wide = with_rooms(tensors, rooms, ())
                results = [r if out is None else out.copy_(r) for r, out in zip(results, wide, strict=True)]
            return in_place(tensors, results, free_places(tensors, reuse, saved)) if reuse and REUSE_ON_CPU else results

    launch.__name__ = launch.__qualname__ = "fused_" + "_".join(output.name for output in program.outputs)
    launch.__module__ = "fxfuse"
    return launch


def with_rooms(tensors: Sequence[Tensor], rooms: Rooms, places: Places) -> list[Tensor | None]:
    """Where the outputs go: into new memory with wider rows, into an operand's, or (None) where the kernel likes."""
    outputs: list[Tensor | None] = [None if i is None else tensors[i] for i in places] or [None] * len(rooms)
    for index, room in enumerate(rooms):
        if room is not None:
            like, dtype, columns = tensors[room[0]], room[1], room[2]
            width = like.shape[-1]
            buffer = like.new_empty((like.numel() // max(width, 1), width + columns), dtype=dtype)
            outputs[index] = buffer[:, :width].view(like.shape)
    return outputs


def free_places(tensors: Sequence[Tensor], reuse: Places, saved: Sequence[int]) -> Places:
    """The places, less those of saved tensors that somebody still needs: the autograd graph is kept, or their memory is held."""
    held = {i for i in saved if is_held(tensors[i])} if saved and not graph_is_kept() else set(saved)
    return tuple(None if i in held else i for i in reuse) if held else reuse


def is_held(tensor: Tensor) -> bool:
    """Does another tensor lie in this tensor's memory. (The count includes the tensor's and the question's own reference.)"""
    return storage_use_count(tensor.untyped_storage()._cdata) > 2


def in_place(tensors: Sequence[Tensor], results: list[Tensor], places: Places) -> list[Tensor]:
    """The results, those with a place copied there."""
    return [result if i is None else tensors[i].copy_(result) for result, i in zip(results, places, strict=True)]


@lru_cache(maxsize=1024)
def pair_launcher(text: str) -> Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """The launcher of a program on two sets of tensors at once, on a GPU."""
    from .kernels.launch import prepare
    from .kernels.pair import compile_pair_ahead, prepare_pair

    program = parse(text)
    prepared = prepare_pair(program)

    def launch(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return prepared(first, second)

    def compile_ahead(on: torch.device, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        compile_pair_ahead(prepare(program), first, second, on)

    launch.compile_ahead = compile_ahead  # type: ignore[attr-defined]
    launch.__name__ = launch.__qualname__ = "fused_pair"
    launch.__module__ = "fxfuse"
    return launch
