"""How the tensors of a launch lie in memory: leading dimensions reordered, merged and dropped until few are left.

A kernel walks rows; which leading dimensions make them up does not matter to it, as long as every tensor's rows can be found. So
dimensions of size 1 are dropped, the rest is ordered as the largest tensor lies in memory (a transposed query is walked as it was
projected), and neighbours that are contiguous in every tensor become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from fxfuse.dataflow import Dataflow
from fxfuse.emit import Access, tensors_of
from fxfuse.program import Lane, Program

INT32_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """sizes: of the coalesced leading dimensions, outermost first. strides[t][d]: of tensor t (arguments, then outputs; 0 where it
    does not vary). columns[t]: stride of its last dimension. widths: of the axes."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    widths: tuple[tuple[str, int], ...]

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.sizes:
            rows *= size
        return rows

    @property
    def accesses(self) -> tuple[Access, ...]:
        return tuple(Access(tuple(s != 0 for s in strides), column != 1)
                     for strides, column in zip(self.strides, self.columns, strict=True))


def coalesce(sizes: Sequence[int], strides: Sequence[Sequence[int]], leader: int) -> tuple[list[int], list[list[int]]]:
    """Leading dimensions in memory order of tensor ``leader``, merged where all tensors allow; stride 0: broadcast."""
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -strides[leader][d])
    merged: list[int] = []
    result: list[list[int]] = [[] for _ in strides]
    for d in order:
        if merged and all(r[-1] == s[d] * sizes[d] for r, s in zip(result, strides, strict=True)):
            merged[-1] *= sizes[d]
            for r, s in zip(result, strides, strict=True):
                r[-1] = s[d]
            continue
        merged.append(sizes[d])
        for r, s in zip(result, strides, strict=True):
            r.append(s[d])
    return merged, result


def layout_of(program: Program, tensors: Sequence[Tensor], outputs: Sequence[Tensor], widths: dict[str, int],
              leading: Sequence[int]) -> Layout:
    """The layout of a launch. ``tensors`` and ``outputs`` have dimension rank + 1; a summed output has no rows."""
    strides, columns = [], []
    for tensor in (*tensors, *outputs):
        strides.append([0 if tensor.shape[d] == 1 else tensor.stride(d) for d in range(program.rank)])
        columns.append(tensor.stride(-1) if tensor.shape[-1] != 1 else 1)
    everything = [*tensors, *outputs]
    leader = max(range(len(everything)), key=lambda k: (_rows_of(strides[k], leading), everything[k].numel(), k))
    sizes, merged = coalesce(leading, strides, leader)
    return Layout(tuple(sizes), tuple(map(tuple, merged)), tuple(columns), tuple(widths.items()))


def shares_columns(program: Program, layout: Layout) -> bool:
    """Whether rows that differ in the last leading dimension only share columns of some tensor that other rows do not share."""
    return any(tensor.columns is not None and any(strides[:-1]) and not strides[-1]
               for tensor, strides in zip(tensors_of(program), layout.strides, strict=True) if strides)


def _rows_of(strides: Sequence[int], leading: Sequence[int]) -> int:
    return sum(1 for stride, size in zip(strides, leading, strict=True) if stride != 0 and size != 1)


def flattened(program: Program, layout: Layout) -> Layout | None:
    """The same launch as one long row, if the program is a map and every tensor is dense; else None."""
    if not is_map(program) or len(layout.sizes) > 1 or any(column != 1 for column in layout.columns):
        return None
    (axis, width), = layout.widths
    for tensor, strides in zip(tensors_of(program), layout.strides, strict=True):
        scalar = tensor.columns is None and not any(strides)
        dense = tensor.columns == axis and (not strides or strides == (width,))
        if not (dense or scalar):
            return None
    if any(output.columns is None for output in program.outputs):
        return None
    return Layout((), tuple(() for _ in layout.strides), layout.columns, ((axis, layout.rows * width),))


@lru_cache(maxsize=4096)
def is_map(program: Program) -> bool:
    """Each element of the outputs depends on the same element of the arguments, wherever it lies."""
    flow = Dataflow(program)
    if len(program.axes) != 1 or flow.has_reductions or flow.gathers or any(o.sums_rows for o in program.outputs):
        return False
    (axis, _), = program.axes
    nodes = [program.nodes[v] for v in flow.live]
    lanes = [n.attributes[1] for n in nodes if n.op == "load"] + [lane for o in program.outputs for _, lane in o.stores]
    return (all(lane in (None, Lane(axis)) for lane in lanes)
            and not any(n.op in ("iota", "width", "check_index") for n in nodes))


def is_wide(program: Program, layout: Layout) -> bool:
    """Whether some offset of this launch does not fit 32 bits, padding of tiles included."""
    widths = dict(layout.widths)
    slack = 2 * 65536  # the last tile of rows and the last block of columns may reach past the end
    if layout.rows + slack > INT32_ELEMENTS:
        return True
    for tensor, strides, column in zip(tensors_of(program), layout.strides, layout.columns, strict=True):
        columns = tensor.columns if isinstance(tensor.columns, int) else widths.get(tensor.columns or "", 1)
        # Rows of padding, 512 at most: beyond the last dimension (nested), or as many steps of the first as they fill.
        extent = sum(abs(s) * n for s, n in zip(strides, layout.sizes, strict=True))
        if strides:
            extent += 512 * abs(strides[-1]) + abs(strides[0]) * -(-512 * layout.sizes[0] // layout.rows)
        if extent + abs(column) * (columns + slack) > INT32_ELEMENTS:
            return True
    return False
