"""Row program -> Triton: how values, tensors and rows are written. The skeletons they are poured into are in ``kernels/``.

Everything in a kernel is two-dimensional, rows x columns: a full value is a block [R, B], a row value [R, 1], a column value [1, B],
a scalar [1, 1]; so pointwise operations are plain broadcasting and reductions keep their axis. Names, as they appear in the source:

    p_x          pointer argument                 s_x_0, s_x_c     its strides (leading dimension 0, columns)
    p_x_row      pointer to the rows of the tile  b_x              what was loaded
    v7           value %7 of the program          a, a_ok          column index of axis a, and its mask
    W_a, B_a     width of axis a, block of it     rows, row_ok     row index of the tile [R, 1], and its mask
"""

from .schedule import Access, Schedule, Scope, tensors_of
from .stores import Writer
from .values import rounded

__all__ = ["Access", "Schedule", "Scope", "Writer", "rounded", "tensors_of"]
