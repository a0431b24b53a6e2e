"""The row kernels of written-out attention compile for GPUs that are not here, and on NVIDIA spill no registers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fxfuse import reference
from fxfuse.attention.programs import backward_program, cotangent_of, with_statistics
from fxfuse.kernels.offline import compile_offline
from fxfuse.pattern_trace import pattern_program
from fxfuse.program import Program

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")


def capped(s: Tensor, mask: Tensor) -> Tensor:
    return F.softmax(torch.tanh(s * 0.0625 / 50.0) * 50.0 + mask, dim=-1, dtype=torch.float32).to(torch.bfloat16)


def of_a_chunk(program: Program, keys: int) -> list[Tensor]:
    """Two sequences, eight heads, 512 queries of 4096, and the keys that they see."""
    tensors = []
    for argument in program.arguments:
        heads = 8 if argument.rows[1] else 1
        columns = 4096 if argument.name == "mask" else keys if argument.columns else 1
        rows = 512 if argument.columns and argument.name != "mask" else 4096
        whole = torch.empty(2, heads, rows, columns, dtype=reference.torch_dtype(argument.dtype), device="meta")
        tensors.append(whole[:, :, :512, : keys if argument.columns else 1])
    return tensors


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow),
                                    pytest.param("gfx942", marks=pytest.mark.slow)])
@pytest.mark.parametrize("keys", [2560, 4096])
def test_row_kernels_of_a_chunk(target: str, keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    examples = {"s": torch.empty(2, 8, 4, 12, dtype=torch.bfloat16), "mask": torch.empty(2, 1, 4, 12, dtype=torch.bfloat16)}
    program = pattern_program(capped, examples, {})
    program = replace(program, axes=tuple((name, None) for name, _ in program.axes))  # any number of keys
    forward = with_statistics(program, "s")
    backward = backward_program(forward, "s")
    assert cotangent_of(forward) in {argument.name for argument in backward.arguments}
    for each in (forward, backward):
        compiled = compile_offline(each, of_a_chunk(each, keys), target)
        if target.startswith("sm_"):
            assert compiled.spilled == 0
