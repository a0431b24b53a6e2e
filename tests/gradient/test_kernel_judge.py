"""The judge of kernels: what is merely unlucky passes, what is wrong does not, also where a result is a single number."""

from __future__ import annotations

import pytest
import torch

from fxfuse import reference
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME


@pytest.mark.parametrize("seed", range(6))
def test_a_sum_of_terms_that_cancel_is_judged_by_what_such_sums_are_off(seed: int) -> None:
    """d_scale is one number, the sum of thirty products; eager's own error there may be next to nothing."""
    case = BY_NAME["bias_gradient"]
    program = case.program("float32")
    torch.manual_seed(seed)
    tensors = case.inputs(program, (5,), 6, 1e-3)
    index = [output.name for output in program.outputs].index("d_scale")
    right = reference.execute(program, tensors)

    def off_by(part: float) -> list[str]:
        return failures(program, tensors, [result * (1 + part * (i == index)) for i, result in enumerate(right)])

    assert not off_by(0.0)
    for part in (1e-3, -1e-2, -1.0):
        assert any("d_scale" in sentence for sentence in off_by(part)), part
