"""The emitted source, kept as files that a person reads: a change of the emitter shows as a difference here.

Regenerate with ``FXFUSE_REGENERATE=1 pytest tests/golden/test_emitted_source.py`` and read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fxfuse import reference
from fxfuse.kernels import configuration
from fxfuse.kernels.catalogue import choose_kind
from fxfuse.kernels.launch import plan
from fxfuse.kernels.single import variant
from fxfuse.program import Program
from tests.kernel_programs import BY_NAME, of_width

EXPECTED = Path(__file__).parent / "expected"

# Program, sizes of the leading dimensions, columns: the shapes of an 8-billion-parameter model, and a row held in three segments.
KERNELS = [
    ("rms_norm", (8192,), 4096), ("rms_norm_backward", (8192,), 4096),
    ("rotary", (2, 32, 4096), 16), ("swiglu_backward", (8192,), 14336),
    ("cross_entropy", (8192,), 128256), ("shifted_cross_entropy", (8192,), 128256), ("shifted_softmax", (8192,), 4096),
    ("cross_entropy_backward", (8192,), 128256), ("layer_norm_backward", (8192,), 12288),
]


def emitted(program: Program, leading: tuple[int, ...], columns: int) -> str:
    """The source that a launch on contiguous tensors of these sizes would use."""
    tensors = []
    for argument in program.arguments:
        shape = [n if varies else 1 for n, varies in zip(leading, argument.rows, strict=True)]
        width = argument.columns if isinstance(argument.columns, int) else columns if argument.columns else 1
        tensor = torch.empty(*shape, width, dtype=reference.torch_dtype(argument.dtype), device="meta")
        tensors.append(tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else tensor)
    kind = choose_kind(program, reference.axis_widths(program, tensors))
    assert kind is not None
    outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
    layout = plan(program, kind, tensors, outputs)
    return variant(program, kind, layout, configuration.default(program, kind, layout)).source


@pytest.mark.parametrize(("name", "leading", "columns"), KERNELS, ids=lambda value: value if isinstance(value, str) else "")
def test_emitted_source_is_the_golden_file(name: str, leading: tuple[int, ...], columns: int) -> None:
    program = BY_NAME[name].program("bfloat16")
    source = emitted(of_width(program, columns) if columns == 12288 else program, leading, columns)
    path = EXPECTED / f"{name}.py"
    if os.environ.get("FXFUSE_REGENERATE") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    assert source == path.read_text()


def test_offsets_past_2_to_the_31_are_int64_in_the_source() -> None:
    """40,000 x 128,256 logits are 5.1 billion elements: row indices are int64 before they meet a stride."""
    program = BY_NAME["cross_entropy"].program("bfloat16")
    assert "rows = tl.program_id(0).to(tl.int64)" in emitted(program, (40000,), 128256)
    assert "int64)\n    p_x_row" not in emitted(program, (8192,), 128256)
    backward = BY_NAME["swiglu_backward"].program("bfloat16")
    assert "start = (tl.program_id(0)).to(tl.int64) * B_a" in emitted(backward, (200000,), 14336)
    assert "int64" not in emitted(backward, (8192,), 14336).split('"""', 2)[2]


def test_the_source_does_not_depend_on_the_sequence_length() -> None:
    for name, leading, columns in KERNELS:
        program = BY_NAME[name].program("bfloat16")
        other = (*leading[:-1], leading[-1] // 2 + 3)
        assert emitted(program, leading, columns) == emitted(program, other, columns), name
