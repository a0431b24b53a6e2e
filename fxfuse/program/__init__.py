"""The row program: the intermediate representation of a fusible region.

A program's domain is *rows x columns*. Rows are the leading dimensions (``rank`` of them, sizes known at run time only);
columns are the last dimension, cut into named *axes*. An axis is a run of columns that is worked on together: the whole last
dimension of a norm, or each half of a rotary head. A *lane* says where an axis lies in a tensor's last dimension: ``offset +
stride * i``. So ``rotate_half``, interleaved and partial rotary, and packed ``gate_up`` are pointwise over lanes, and copy nothing.

Values are in static single assignment. Each has a kind (real, int, bool) and an *extent*: does it vary over rows, and over which
axis, if any. Real arithmetic happens in the program's ``math`` dtype (float32, or float64 when an argument is float64); rounding
happens at ``cast`` and when an output is stored, nowhere else.

    program rank=2 math=float32
    axis a = ?
    arg x : bfloat16[r,r|a]
    arg w : bfloat16[1,1|a]
    %0 = load x a 0 1
    %1 = square %0
    %2 = sum a %1
    %3 = width a
    %4 = div %2 %3
    ...
    out y : bfloat16[r,r|a] = %9 @ a 0 1

The text is canonical: ``parse(str(p)) == p``, and it is what the fused op carries.
"""

from .builder import ProgramBuilder
from .parts import INT_DTYPES, REAL_DTYPES, REDUCTIONS, Argument, Extent, Lane, Node, Output, ProgramError
from .text import parse
from .whole import Program

__all__ = ["INT_DTYPES", "REAL_DTYPES", "REDUCTIONS", "Argument", "Extent", "Lane", "Node", "Output", "Program", "ProgramBuilder",
           "ProgramError", "parse"]
