"""Dequantization of bitsandbytes' 4-bit weights (NF4 and FP4) in one launch, their nested scales decoded on the way.

    out[n] = cast(code[nibble n] * scale[n // blocksize])        the product in float32, one rounding
    scale[b] = absmax_code[absmax_8bit[b]] * absmax[b // 256] + absmax_offset        where the scales are quantized too

Two nibbles a byte, the high one first. Each thread reads one word of packed nibbles and writes 16 bytes (``Config.lookup`` says how
it turns nibbles to numbers). The output may be a view of wider rows, so that columns beside the weight stay free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fxfuse.kernels.invoke import INTERPRETED, Kernel
from fxfuse.kernels.nf4_kernel import dequantize_kernel

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # the only one that bitsandbytes multiplies with
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * magnitude / 12.0 for sign in (1.0, -1.0) for magnitude in _FP4_MAGNITUDES)
TABLES = {"nf4": NF4, "fp4": FP4}

LOOKUPS = {"table": 0, "shuffle": 1, "select": 2}


@dataclass(frozen=True)
class Config:
    """lookup: table, shuffle or select. warps: of an instance. unroll: words a thread."""

    lookup: str = "table"
    warps: int = 8
    unroll: int = 2


CONFIGS = (*(Config(lookup, warps, unroll) for lookup in ("shuffle", "table") for warps in (4, 8, 16) for unroll in (1, 2, 4)),
           Config("select", 8, 2))  # fmt: skip


class Weight(NamedTuple):
    """What a packed weight is, but for its numbers."""

    blocksize: int
    quant_type: str
    rows: int
    columns: int
    dtype: torch.dtype
    nested: bool


class Plan(NamedTuple):
    """A launch: how the packed nibbles are read, the integer arguments and options of the kernel, its instances."""

    word: torch.dtype
    numbers: tuple[int, ...]
    options: dict[str, Any]
    instances: int


def plan(weight: Weight, row_stride: int, alignment: int, config: Config) -> Plan:
    """``row_stride`` of the output in elements; ``alignment``: bytes that divide the address of the packed weight."""
    total = weight.rows * weight.columns
    strided = row_stride != weight.columns and weight.rows > 1
    nibbles = 16 // weight.dtype.itemsize
    while nibbles > 2 and ((weight.columns if strided else total) % nibbles or alignment % (nibbles // 2)):
        nibbles //= 2
    words, width = triton.cdiv(total, nibbles), 32 * config.warps
    wide = max(total, weight.rows * row_stride) + config.unroll * width * nibbles >= 2**31
    group_shift = int(math.log2(weight.blocksize // nibbles))
    numbers = (words, total, row_stride, weight.columns // nibbles if strided else 0, nibbles, group_shift, int(weight.nested),
               int(weight.quant_type == "nf4"), LOOKUPS[config.lookup], int(wide), int(total % nibbles != 0),
               config.unroll, width)
    word = {2: torch.uint8, 4: torch.int16, 8: torch.int32}[nibbles]
    return Plan(word, numbers, {"num_warps": config.warps, "enable_fp_fusion": False}, triton.cdiv(words, config.unroll * width))


def chosen_config() -> Config:
    """Shuffles on NVIDIA; in the interpreter and on AMD the table, which is portable."""
    return Config("table") if INTERPRETED or torch.version.hip else Config("shuffle")


@lru_cache(maxsize=64)
def table_of(quant_type: str, device: torch.device) -> Tensor:
    """The 16 numbers of a code, float32, on a device."""
    return torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device)


class Dequantizer:
    """Dequantizes weights of one description; ``config`` pins the kernel's (benchmarks)."""

    def __init__(self, weight: Weight, config: Config | None = None) -> None:
        if weight.blocksize not in BLOCKSIZES or weight.quant_type not in TABLES:
            raise ValueError(f"4-bit weights have blocks of {BLOCKSIZES} and the codes {tuple(TABLES)}, got {weight}")
        self.weight, self.config = weight, config or chosen_config()
        self.launches: dict[tuple[int, int, int], Callable[..., None]] = {}

    def __call__(self, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
                 absmax_offset: Tensor | None, out: Tensor | None = None) -> Tensor:  # fmt: skip
        """Into a new tensor [rows, columns], or into ``out`` of that shape, whose rows may lie further apart."""
        weight = self.weight
        if out is None:
            out = torch.empty((weight.rows, weight.columns), dtype=weight.dtype, device=packed.device)
        key = (packed.get_device(), out.stride(0), packed.data_ptr() & 15 | (out.data_ptr() & 15) << 4)
        launch = self.launches.get(key)
        if launch is None:
            check(weight, packed, absmax, absmax_8bit, absmax_code, absmax_offset, out)
            launch = self.launches[key] = self.specialize(packed, out)
        launch(packed, absmax, absmax_8bit, absmax_code, absmax_offset, out)
        return out

    def specialize(self, packed: Tensor, out: Tensor) -> Callable[..., None]:
        """Everything that follows from device, row stride and alignment."""
        weight, stride = self.weight, out.stride(0)
        if weight.rows > 1 and stride != weight.columns and weight.columns % 2:
            # A byte holds the end of one row and the start of the next.
            return lambda *tensors: tensors[-1].copy_(self(*tensors[:-1]))
        alignment = math.gcd(packed.data_ptr(), 16)
        layout = plan(weight, stride, alignment, self.config)
        kernel = Kernel(dequantize_kernel, layout.numbers, layout.options)
        table = table_of(weight.quant_type, packed.device)

        def launch(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
                   absmax_offset: Tensor | None, out: Tensor) -> None:  # fmt: skip
            if absmax_8bit is None:
                absmax_8bit = absmax_code = absmax_offset = absmax
            if INTERPRETED or kernel.compiled is None:
                packed = packed.view(torch.uint8).view(-1).view(layout.word)  # later launches need the address alone
            kernel((packed, absmax, absmax_8bit, absmax_code, absmax_offset, table, out), layout.instances)

        return launch

    def compile_ahead(self, row_stride: int, device: torch.device) -> None:
        """Has the kernel compiled elsewhere, for an output whose rows lie so far apart."""
        layout = plan(self.weight, row_stride, 16, self.config)
        scale = torch.uint8 if self.weight.nested else torch.float32
        dtypes = (layout.word, torch.float32, scale, torch.float32, torch.float32, torch.float32, self.weight.dtype)
        Kernel(dequantize_kernel, layout.numbers, layout.options).compile_ahead(
            [torch.empty(0, dtype=dtype, device="meta") for dtype in dtypes], device)


def check(weight: Weight, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
          absmax_offset: Tensor | None, out: Tensor) -> None:  # fmt: skip
    """ValueError unless the tensors are what the description says."""
    total = weight.rows * weight.columns
    blocks = -(-total // weight.blocksize)
    scales = absmax if absmax_8bit is None else absmax_8bit
    expected = [(packed.is_contiguous() and packed.numel() * packed.element_size() * 2 >= total, f"{total} packed nibbles"),
                (scales.numel() == blocks and scales.is_contiguous(), f"{blocks} scales"),
                (absmax.dtype == torch.float32 and absmax.is_contiguous(), "scales in float32"),
                (weight.nested == (absmax_8bit is not None), "nested scales, or plain ones, as described"),
                (tuple(out.shape) == (weight.rows, weight.columns) and out.stride(1) == 1 and out.dtype == weight.dtype,
                 f"an output of {weight.rows} rows of {weight.columns} adjacent numbers of {weight.dtype}")]  # fmt: skip
    if absmax_8bit is not None and absmax_code is not None and absmax_offset is not None:
        expected += [(absmax_8bit.dtype == torch.uint8, "scales quantized to 8 bits"),
                     (absmax.numel() == -(-blocks // NESTED_BLOCKSIZE), f"one scale for {NESTED_BLOCKSIZE} quantized ones"),
                     (absmax_code.numel() == 256 and absmax_code.dtype == torch.float32, "a code of 256 numbers in float32"),
                     (absmax_offset.numel() == 1 and absmax_offset.dtype == torch.float32, "an offset in float32")]
    for holds, what in expected:
        if not holds:
            raise ValueError(f"dequantization of {weight} needs {what}")


@lru_cache(maxsize=1024)
def dequantizer(weight: Weight) -> Dequantizer:
    """The launcher for a kind of weight, one for the whole process."""
    return Dequantizer(weight)


def dequantize(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None,
               absmax_offset: Tensor | None = None, *, blocksize: int, quant_type: str, shape: tuple[int, int],
               dtype: torch.dtype, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """The weight [rows, columns] in ``dtype``; see the module. Its values are those of bitsandbytes, bit for bit."""
    weight = Weight(blocksize, quant_type, shape[0], shape[1], dtype, absmax_8bit is not None)
    return dequantizer(weight)(packed, absmax, absmax_8bit, absmax_code, absmax_offset, out)
