"""The functions that benchmarks/kernels.py times: they run, are judged, and the lists that a GPU run takes can be made."""

from __future__ import annotations

import pytest
import torch

from benchmarks.judge import Judge, wrong
from benchmarks.kernel_cases import Case, binding_cases, sweep_cases
from benchmarks.kernels import closures
from benchmarks.tables import TABLES, regenerate
from benchmarks.timing import sets_for

DRY = binding_cases(dry=True)


def test_the_lists_of_a_gpu_run() -> None:
    names = [case.name for case in binding_cases()]
    assert len(set(names)) == len(names)
    assert {c.op.split("[")[0] for c in binding_cases()} == {c.op.split("[")[0] for c in DRY}
    assert {c.shape for c in sweep_cases()} >= {"512x1024", "32768x16384"}


@pytest.mark.parametrize("case", DRY, ids=lambda case: case.name)
def test_eager_is_as_right_as_eager_and_a_wrong_gradient_is_refused(case: Case) -> None:
    judge = Judge(case, "cpu")
    assert not wrong("fxfuse", judge.errors(case.fn))
    for one in closures(case, case.fn, backward=True, device="cpu"):
        one()

    def spoiled(*args: torch.Tensor) -> object:
        out = case.fn(*args)
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(o + 0.05 * (o - o.detach()) for o in outputs)  # values right, gradients 5% too large

    assert wrong("fxfuse", judge.errors(spoiled))
    assert wrong("liger", judge.errors(spoiled))


def test_inputs_rotate_over_more_than_the_cache() -> None:
    assert sets_for(64 * 2**20) * 64 * 2**20 >= 3 * 60 * 2**20
    assert sets_for(1) == 64


def test_every_table_can_be_made_from_no_rows(tmp_path) -> None:
    for name in TABLES:
        assert regenerate(f"<!-- table:{name} -->\nold\n<!-- /table -->", tmp_path) != "old"
