"""What runs a row program on a kind of device: an emitted Triton kernel, or the torch reference on a CPU.

With ``TRITON_INTERPRET=1`` the CPU runs the emitted kernels too, in Triton's interpreter; that is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor

from . import reference
from .program import parse

Launcher = Callable[[Sequence[Tensor]], list[Tensor]]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def implementation_on(device: str) -> str:
    """``triton`` or ``torch``, for a device type."""
    return "triton" if device == "cuda" or INTERPRETED else "torch"


@lru_cache(maxsize=4096)
def launcher(text: str, device: str) -> Launcher:
    """The launcher of a program on a device type, made once. It is a plain function, so that generated code can name it."""
    program = parse(text)
    if implementation_on(device) == "triton":
        from .kernels.launch import prepare

        prepared = prepare(program)

        def launch(tensors: Sequence[Tensor]) -> list[Tensor]:
            return prepared(tensors)
    else:

        def launch(tensors: Sequence[Tensor]) -> list[Tensor]:
            return reference.execute(program, tensors)

    launch.__name__ = launch.__qualname__ = "fused_" + "_".join(output.name for output in program.outputs)
    launch.__module__ = "fxfuse"
    return launch


@lru_cache(maxsize=1024)
def pair_launcher(text: str) -> Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """The launcher of a program on two sets of tensors at once, on a GPU."""
    from .kernels.pair import prepare_pair

    prepared = prepare_pair(parse(text))

    def launch(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return prepared(first, second)

    launch.__name__ = launch.__qualname__ = "fused_pair"
    launch.__module__ = "fxfuse"
    return launch
