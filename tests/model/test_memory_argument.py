"""What ``memory=`` accepts, and what it says of anything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.backend import Backend
from fxfuse.memory.budget import Budget, parse_budget
from fxfuse.memory.plan import Choice


@pytest.mark.parametrize(("given", "found"), [
    ("22GiB", Budget(bytes=22 << 30)), ("500MB", Budget(bytes=500_000_000)), (" 1.5 gib ", Budget(bytes=3 << 29)),
    ("64B", Budget(bytes=64)), (123456, Budget(bytes=123456)), (0.5, Budget(fraction=0.5)), (1.0, Budget(fraction=1.0)),
    ("auto", Budget(auto=True)), (None, None),
])  # fmt: skip
def test_budgets(given: object, found: Budget | None) -> None:
    assert parse_budget(given) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [0, -1, 1, 0.0, 1.5, -0.5, float("nan"), float("inf"), "", "22", "GiB", "22 XB", "-3GiB", "0GiB",
                                   "all"])  # fmt: skip
def test_other_values_are_refused_with_what_is_accepted(given: object) -> None:
    with pytest.raises(ValueError, match="memory"):
        fxfuse.optimize(nn.Linear(2, 2), memory=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [True, [1], b"1GiB", torch.tensor(3), {}])
def test_other_types_are_refused(given: object) -> None:
    with pytest.raises(TypeError, match="a fraction of the device"):
        fxfuse.optimize(nn.Linear(2, 2), memory=given)  # type: ignore[arg-type]


def test_a_budget_above_the_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.memory.budget.device_bytes", lambda device: 80 << 30)
    device = torch.device("cuda", 0)
    assert Budget(bytes=80 << 30).resolve(device) == 80 << 30
    assert Budget(fraction=0.5).resolve(device) == 40 << 30
    with pytest.raises(ValueError, match=r"81\.00 GiB is more than cuda:0 has"):
        Budget(bytes=81 << 30).resolve(device)


def test_a_plan_is_text_in_normal_form() -> None:
    for text in ("recompute:mm,mm_2;offload:primals_1;tiles:4", "keep:getitem,getitem_2"):
        assert str(Choice.parse(text)) == text
    assert Choice.parse("keep") == Choice()
    for wrong in ("recompute:", "tiles:x", "tiles:1", "offload:a;recompute:b", "keep:", "anything", "recompute:a;"):
        with pytest.raises(ValueError, match="plan"):
            Backend(plan=wrong)


def test_inductor_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="needs remainder='auto' or 'eager'"):
        fxfuse.optimize(nn.Linear(2, 2), memory="1GiB", remainder="inductor")
