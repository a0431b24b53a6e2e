"""The kernel of casts.py, which launches it. (Nothing here imports torch: see compile_worker.py.)"""

from __future__ import annotations

import triton
import triton.language as tl

from fxfuse.kernels.device import round_to

STARTS = ["b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b9", "b10", "b11", "b12", "b13", "b14", "b15"]


@triton.jit(do_not_specialize=STARTS)
def cast_kernel(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
                d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15,
                b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15, BLOCK: tl.constexpr):  # fmt: skip
    """Instances b[k] to b[k + 1] - 1 write ``d[k]`` = ``s[k]`` in its own dtype, BLOCK numbers each; addresses are multiples of 16."""
    instance = tl.program_id(0)
    source, target, first = s0, d0, 0
    if instance >= b1:
        source, target, first = s1, d1, b1
    if instance >= b2:
        source, target, first = s2, d2, b2
    if instance >= b3:
        source, target, first = s3, d3, b3
    if instance >= b4:
        source, target, first = s4, d4, b4
    if instance >= b5:
        source, target, first = s5, d5, b5
    if instance >= b6:
        source, target, first = s6, d6, b6
    if instance >= b7:
        source, target, first = s7, d7, b7
    if instance >= b8:
        source, target, first = s8, d8, b8
    if instance >= b9:
        source, target, first = s9, d9, b9
    if instance >= b10:
        source, target, first = s10, d10, b10
    if instance >= b11:
        source, target, first = s11, d11, b11
    if instance >= b12:
        source, target, first = s12, d12, b12
    if instance >= b13:
        source, target, first = s13, d13, b13
    if instance >= b14:
        source, target, first = s14, d14, b14
    if instance >= b15:
        source, target, first = s15, d15, b15
    place = (instance - first) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(tl.multiple_of(source, 16) + place)
    tl.store(tl.multiple_of(target, 16) + place, round_to(numbers, target.dtype.element_ty))
