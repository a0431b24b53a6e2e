"""The file around a kernel: its header (the program it computes), imports, decorator and parameter list."""

from __future__ import annotations

from fxfuse.emit import Schedule, tensors_of
from fxfuse.program import Output, Program

HEADER = '''"""{title}

Written by fxfuse: schedule "{kind}" ({reading}), for the row program

{program}
"""
{interpreted}
import triton
import triton.language as tl

from fxfuse.kernels import device
'''

READING = {
    "rows": "a program instance holds whole rows in registers",
    "tiled": "a program instance maps a block of columns of some rows",
    "looped": "a program instance walks one row in blocks, once for each reduction that waits for another",
}


def columns_text(program: Program, output: Output) -> str:
    """The number of columns of an output, as it stands in a kernel."""
    if output.columns is None:
        return "1"
    return f"W_{output.columns}" if isinstance(output.columns, str) else str(output.columns)


def summed_outputs(program: Program) -> list[Output]:
    return [output for output in program.outputs if output.sums_rows]


def stride_names(program: Program, schedule: Schedule) -> list[tuple[str, int, str]]:
    """Stride parameters: (name, index of the tensor among arguments then outputs, "0", "1", ... or "c")."""
    names = []
    for k, (tensor, access) in enumerate(zip(tensors_of(program), schedule.accesses, strict=True)):
        if k >= len(program.arguments) and program.outputs[k - len(program.arguments)].sums_rows:
            continue
        dims = [str(d) for d, varies in enumerate(access.dims) if varies] + (["c"] if access.strided else [])
        names += [(f"s_{tensor.name}_{d}", k, d) for d in dims]
    return names


def size_names(schedule: Schedule) -> list[str]:
    return ["n_rows", *(f"n_{d}" for d in range(1, schedule.rank))] if schedule.rank else []


def parameters(program: Program, schedule: Schedule) -> list[str]:
    """Parameters in the order in which ``kernels.launch`` passes them."""
    pointers = [f"p_{t.name}" for t in tensors_of(program) if not (isinstance(t, Output) and t.sums_rows)]
    partials = ["p_partials"] if summed_outputs(program) else []
    strides = [name for name, _, _ in stride_names(program, schedule)]
    widths = [f"W_{axis}" + ("" if width is None else ": tl.constexpr") for axis, width in program.axes]
    blocks = [f"B_{axis}: tl.constexpr" for axis, _ in program.axes]
    constants = ["ROWS: tl.constexpr", "STAGES: tl.constexpr", *(["EARLY: tl.constexpr"] if partials else [])]
    return [*pointers, *partials, *strides, *size_names(schedule), *widths, *blocks, *constants]


def unspecialized(program: Program, schedule: Schedule) -> list[str]:
    """Integers that change with the batch and the sequence length: no kernel is compiled anew for their values.

    Sizes of leading dimensions, and strides of tensors without columns. (Strides of tensors with columns are multiples of a width;
    that they are multiples of 16 is what lets loads be wide.)
    """
    tensors = tensors_of(program)
    strides = [name for name, k, d in stride_names(program, schedule) if tensors[k].columns is None]
    return [*size_names(schedule), *strides]


def document(program: Program, schedule: Schedule, title: str, body: list[str], finish: list[str]) -> str:
    """The whole file. ``body``: lines of the kernel; ``finish``: the second kernel of a schedule with sums over rows, or nothing."""
    names = ", ".join(f'"{name}"' for name in unspecialized(program, schedule))
    header = HEADER.format(title=title, kind=schedule.kind, reading=READING[schedule.kind], interpreted="",
                           program="\n".join(f"    {line}" for line in str(program).splitlines()))
    lines = [header, "", f"@triton.jit(do_not_specialize=[{names}])", "def kernel(",
             *wrapped(parameters(program, schedule)), "):", *body]
    return "\n".join([*lines, *(["", "", *finish] if finish else []), ""])


def wrapped(names: list[str]) -> list[str]:
    """A parameter list, a few to a line."""
    lines, line = [], "   "
    for name in names:
        if len(line) + len(name) > 108:
            lines.append(line)
            line = "   "
        line += f" {name},"
    return [*lines, line]
