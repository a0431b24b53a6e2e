"""Small contiguous tensors, each in another dtype, in one launch.

torch's own function for lists gives 65536 numbers to an instance: the fourteen matrices of a block's adapters, 1.5 million numbers, are
23 instances, and take 17 us on an H200, a tenth of what its memory allows. Here an instance takes 1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from fxfuse.kernels import ahead
from fxfuse.kernels.casts_kernel import STARTS, cast_kernel
from fxfuse.kernels.invoke import Kernel

SLOTS = len(STARTS) + 1  # tensors of a launch
BLOCK, WARPS = 1024, 4
NEVER = 2**31 - 1  # the first instance of a slot that is not used


def cast_all(sources: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Each result = its source, of the same size; False, and nothing is done, where a size or an address does not suit."""
    if any(t.data_ptr() & 15 for t in (*sources, *results)) or not suits(sources):
        return False
    for start in range(0, len(sources), SLOTS):
        some, into = sources[start : start + SLOTS], results[start : start + SLOTS]
        kernel, instances = _kernel(tuple([t.numel() for t in some]), some[0].dtype, into[0].dtype, some[0].device)
        kernel(_filled(some, into), instances)
    return True


def suits(sources: Sequence[Tensor]) -> bool:
    return all(t.numel() and t.numel() % BLOCK == 0 for t in sources)


def compile_ahead(on: torch.device, sources: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Has the kernels compiled for such tensors, which may be mere forms."""
    if suits(sources):
        with ahead.announcing(on):
            Kernel(cast_kernel, _numbers((BLOCK,)), {"num_warps": WARPS}).load(
                _filled(sources[:1], [torch.empty_like(sources[0], dtype=dtype)]))


@lru_cache(maxsize=4096)
def _kernel(sizes: tuple[int, ...], source: torch.dtype, result: torch.dtype, device: torch.device) -> tuple[Kernel, int]:
    """A launch's kernel and instances. (Dtypes and device: a loaded kernel is for one of each.)"""
    return Kernel(cast_kernel, _numbers(sizes), {"num_warps": WARPS}), sum(sizes) // BLOCK


def _numbers(sizes: tuple[int, ...]) -> tuple[int, ...]:
    starts = [numbers // BLOCK for numbers in accumulate(sizes[:-1])]
    return (*starts, *[NEVER] * (SLOTS - 1 - len(starts)), BLOCK)


def _filled(sources: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """The kernel's tensors, the first ones again where a slot is not used."""
    rest = SLOTS - len(sources)
    return [*sources, *[sources[0]] * rest, *results, *[results[0]] * rest]
