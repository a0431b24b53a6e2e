"""``fxfuse::dequantize_4bit``: a weight that bitsandbytes packed in 4 bits (NF4 or FP4), as numbers, in one op.

    W[n] = cast(code[nibble n] * scale[n // blocksize])

With it a 4-bit linear is a dequantization and a linear, and the linear's own derivative is the whole backward (dX = dY W): the weight
is frozen, so the op has none. Its arguments are those of ``bitsandbytes::gemm_4bit``: with nested scales ``absmax`` are the scales of
the scales, which are ``absmax_code[absmax_8bit] * absmax + absmax_offset``, blocks of 256.

On a GPU it is one kernel (kernels/nf4.py), on a CPU bitsandbytes' own operations. The values are bitsandbytes' on both, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from . import kept_weights
from .lowering import implementation_on

LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")
LIBRARY.define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset, "
    "int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
dequantize_4bit = torch.ops.fxfuse.dequantize_4bit.default
TENSORS = 5  # the first of the arguments
Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def is_dequantization(node: Any) -> bool:
    """Is this the node of a weight that is dequantized."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is dequantize_4bit


def _run(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None,
         blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # fmt: skip
    if implementation_on(packed.device.type) == "triton":
        launch = weight_launcher(blocksize, quant_type, tuple(shape), dtype, absmax_8bit is not None)
        result = launch(packed, absmax, absmax_8bit, absmax_code, absmax_offset)
        return result.detach() if kept_weights.WANTED else result  # an operation's result is a tensor of its own

    tensors: Packed = (packed, absmax, absmax_8bit, absmax_code, absmax_offset)

    def write(*given: Any) -> None:
        given[TENSORS].copy_(by_bitsandbytes(*tensors, blocksize, quant_type, shape, dtype))

    found = kept_weights.kept(tensors, tuple(shape), dtype, None, write) if kept_weights.WANTED else None
    return by_bitsandbytes(*tensors, blocksize, quant_type, shape, dtype) if found is None else found.detach()


def by_bitsandbytes(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
                    absmax_offset: Tensor | None, blocksize: int, quant_type: str, shape: Sequence[int],
                    dtype: torch.dtype) -> Tensor:  # fmt: skip
    """The same from bitsandbytes: its kernels for the scales and for the weight."""
    import bitsandbytes  # noqa: F401  (a graph with this op may run where nothing has imported it)

    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    return ops.dequantize_4bit.default(packed, absmax, blocksize, quant_type, list(shape), dtype)


def _fake(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None,
          blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # fmt: skip
    """A contiguous weight [rows, columns]."""
    return packed.new_empty(tuple(shape), dtype=dtype)


LIBRARY.impl("dequantize_4bit", _run, "CPU")
LIBRARY.impl("dequantize_4bit", _run, "CUDA")
torch.library.register_fake("fxfuse::dequantize_4bit", _fake, lib=LIBRARY)


def launch_directly(node: fx.Node) -> None:
    """In a graph that nothing will trace again: the launcher in place of the op, where a kernel runs it.

    The launcher takes the five tensors and ``out``: a view of wider rows, if there is room to leave beside the weight.
    """
    if implementation_on(node.meta["val"].device.type) != "triton":
        return
    blocksize, quant_type, shape, dtype = node.args[TENSORS:]
    node.target = weight_launcher(blocksize, quant_type, tuple(shape), dtype, node.args[2] is not None)
    node.args = node.args[:TENSORS]
    if "fxfuse_room" in node.meta:  # products/augmented.py
        node.kwargs = {"room": node.meta["fxfuse_room"]}


@lru_cache(maxsize=1024)
def weight_launcher(blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype, nested: bool
                    ) -> Callable[..., Tensor]:  # fmt: skip
    """The launcher of one kind of weight, a plain function, so that generated code can name it."""
    from .kernels.nf4 import Weight, dequantizer

    prepared = dequantizer(Weight(blocksize, quant_type, *shape, dtype, nested))

    def launch(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
               absmax_offset: Tensor | None, out: Tensor | None = None, room: tuple[int, int] | None = None) -> Tensor:  # fmt: skip
        if kept_weights.WANTED and out is None:
            found = kept_weights.kept((packed, absmax, absmax_8bit, absmax_code, absmax_offset), shape, dtype, room, prepared)
            if found is not None:
                return found
        if room is not None:  # rows and columns to leave free behind the weight
            wide = torch.empty((shape[0] + room[0], shape[1] + room[1]), dtype=dtype, device=packed.device)
            out = wide.as_strided(shape, wide.stride())
        return prepared(packed, absmax, absmax_8bit, absmax_code, absmax_offset, out)

    def compile_ahead(on: torch.device, *tensors: Tensor | None, room: tuple[int, int] | None = None) -> None:
        prepared.compile_ahead(shape[1] + (0 if room is None else room[1]), on)

    launch.compile_ahead = compile_ahead  # type: ignore[attr-defined]
    launch.__name__ = launch.__qualname__ = f"dequantize_{shape[0]}x{shape[1]}"
    launch.__module__ = "fxfuse"
    return launch
