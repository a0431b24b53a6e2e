"""What a row program is made of: arguments, lanes, nodes and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import FxfuseError
from ..functions import Kind

REDUCTIONS = ("sum", "max", "logsumexp")
REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")
INT_DTYPES = ("int32", "int64")
# Operations that are neither a table function nor a reduction, with what follows the name in the text.
STRUCTURAL = ("load", "const", "cast", "iota", "width", "check_index")


class ProgramError(FxfuseError):
    """A row program breaks a rule of the representation; the message names the value."""


class Lane(NamedTuple):
    """Columns ``offset + stride * i`` of a tensor's last dimension, i running over ``axis``."""

    axis: str
    offset: int = 0
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.axis} {self.offset} {self.stride}"


class Extent(NamedTuple):
    """Does a value vary over rows; over which column axis (None: over none)."""

    row: bool
    axis: str | None

    def join(self, other: Extent) -> Extent:
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            raise ProgramError(f"a pointwise operation mixes the axes {self.axis!r} and {other.axis!r}")
        return Extent(self.row or other.row, self.axis or other.axis)


@dataclass(frozen=True)
class Argument:
    """A tensor argument. ``rows[d]`` is False where leading dimension d has size 1 and is broadcast.

    ``columns`` is the size of the last dimension: an axis name (the axis covers it), an int (several lanes), or None for a tensor
    without columns, whose last dimension has size 1.
    """

    name: str
    dtype: str
    rows: tuple[bool, ...]
    columns: int | str | None

    @property
    def kind(self) -> Kind:
        return "real" if self.dtype in REAL_DTYPES else "bool" if self.dtype == "bool" else "int"

    def __str__(self) -> str:
        return f"{self.name} : {self.dtype}[{_shape_text(self.rows, self.columns)}]"


@dataclass(frozen=True)
class Output:
    """A tensor result: ``stores`` place values at lanes (lane None: a value without columns, stored in a last dimension of size 1).

    Where ``rows[d]`` is False the value is summed over leading dimension d (the gradient of a broadcast operand).
    """

    name: str
    dtype: str
    rows: tuple[bool, ...]
    columns: int | str | None
    stores: tuple[tuple[int, Lane | None], ...]

    @property
    def sums_rows(self) -> bool:
        return not all(self.rows)

    def __str__(self) -> str:
        stores = ", ".join(
            f"%{value}" if lane is None else f"%{value} @ {lane}" for value, lane in self.stores
        )
        return f"{self.name} : {self.dtype}[{_shape_text(self.rows, self.columns)}] = {stores}"


@dataclass(frozen=True)
class Node:
    """One value: ``op`` applied to earlier values. ``attributes``:

    load (argument name, Lane or None) | const (number,) | cast (dtype,) | iota, width, check_index (axis,) |
    sum, max, logsumexp (axis,) | a function of functions.FUNCTIONS: ().

    ``check_index`` returns its int operand and fails, as eager's loss does, unless 0 <= index < width.
    """

    op: str
    operands: tuple[int, ...] = ()
    attributes: tuple = ()

    def __str__(self) -> str:
        words = [self.op, *(_attribute_text(a) for a in self.attributes), *(f"%{v}" for v in self.operands)]
        return " ".join(words)


def _shape_text(rows: tuple[bool, ...], columns: int | str | None) -> str:
    return (
        ",".join("r" if varies else "1" for varies in rows) + "|" + ("" if columns is None else str(columns))
    )


def _attribute_text(attribute: object) -> str:
    return repr(attribute) if isinstance(attribute, float) else str(attribute)
