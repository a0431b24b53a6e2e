"""Cutting the last dimension into lanes.

A *cut* labels every column of a tensor with the piece it belongs to (a numpy array of ints; None means one piece). Slices,
joins and interleavings act on cuts as they act on tensors, two cuts meet in their common refinement, and in the end each piece must be
an arithmetic progression of columns: a lane.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Cut = np.ndarray | None


class Columns(NamedTuple):
    """A run of columns ``offset + stride * i`` for i < width; width None: all of a last dimension whose size is symbolic."""

    offset: int
    stride: int
    width: int | None

    def within(self, other: Columns) -> Columns:
        """These columns, counted inside ``other``, as columns of other's tensor."""
        return Columns(other.offset + other.stride * self.offset, other.stride * self.stride, self.width)


class NotLanes(Exception):
    """A piece of a cut is no arithmetic progression, or a symbolic width would have to be cut."""


def whole(width: int | None) -> Columns:
    return Columns(0, 1, width)


def refine(a: Cut, b: Cut) -> Cut:
    """The coarsest cut that both refine to."""
    if a is None or b is None:
        return b if a is None else a
    _, labels = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
    return labels.reshape(-1)


def join(parts: list[tuple[Cut, int]]) -> Cut:
    """The cut of a concatenation of tensors with these cuts and widths."""
    labels, next_label = [], 0
    for cut, width in parts:
        own = np.zeros(width, dtype=np.int64) if cut is None else cut
        labels.append(own + next_label)
        next_label += int(own.max(initial=0)) + 1
    return np.concatenate(labels)


def interleave(parts: list[tuple[Cut, int]]) -> Cut:
    """The cut of ``stack(parts, -1).flatten(-2)``: column ``k * i + p`` comes from column i of part p."""
    joined = join(parts)
    assert joined is not None
    return joined.reshape(len(parts), -1).T.reshape(-1)


def restrict(cut: Cut, columns: Columns) -> Cut:
    """The cut of a slice of a tensor with this cut."""
    if cut is None or columns.width is None:
        return None
    return cut[columns.offset : columns.offset + columns.stride * columns.width : columns.stride]


def pieces(cut: Cut, width: int | None) -> list[Columns]:
    """The lanes of a cut, in order of their first column."""
    if cut is None or width is None:
        return [whole(width)]
    found = []
    for label in dict.fromkeys(cut.tolist()):
        positions = np.flatnonzero(cut == label)
        steps = np.unique(np.diff(positions))
        if len(steps) > 1:
            raise NotLanes("the columns are taken apart in a way that is no regular lane")
        found.append(Columns(int(positions[0]), int(steps[0]) if len(steps) else 1, len(positions)))
    return found


def cut_of(lanes: set[Columns], width: int) -> Cut:
    """The coarsest cut of ``width`` columns in which each of these lanes is a union of pieces."""
    cut: Cut = None
    for lane in sorted(lanes, key=lambda lane: (lane.offset, lane.stride, lane.width or 0)):
        mark = np.zeros(width, dtype=np.int64)
        mark[lane.offset : lane.offset + lane.stride * (lane.width or width) : lane.stride] = 1
        cut = refine(cut, mark)
    if cut is None or len(np.unique(cut)) == 1:
        return None
    return cut
