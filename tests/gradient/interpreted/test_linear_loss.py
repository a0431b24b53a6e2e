"""The loss head over Triton kernels, interpreted: gradients of logits written in their place, in rows that are padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxfuse.linear_loss import adjoint, chunks
from fxfuse.linear_loss.op import linear_loss
from fxfuse.regions.trace import trace_region
from fxfuse.residuals import plan_residuals
from fxfuse.validation import LIMITS, error_ratio

ROWS, WIDTH, CLASSES = 131, 16, 97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.1])
@pytest.mark.parametrize("mode", ["total", "recompute"])
def test_in_place(dtype: torch.dtype, smoothing: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[::5] = -100

    def losses(z: torch.Tensor, labels: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(5 * torch.tanh(wide / 5), labels, reduction=reduction, label_smoothing=smoothing)

    program = trace_region(losses, torch.zeros(6, CLASSES, dtype=dtype), labels[:6])[1].program
    logits = next(a.name for a in program.arguments if a.kind == "real")
    assert adjoint.in_place(adjoint.loss_and_gradient(program, logits, False), logits)
    text = str(plan_residuals(program, (logits,)) if mode == "recompute" else program)
    hidden, weight, bias = (torch.randn(*s).to(dtype).requires_grad_() for s in ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)))
    outputs = linear_loss(hidden, weight, bias, [labels[:, None]], None, text, logits, mode, ["hidden", "weight", "bias"],
                          [], [], [])
    ours = outputs[1] if mode == "total" else outputs[0].sum()
    results = [torch.autograd.grad(0.37 * ours, [hidden, weight, bias])]
    for wanted in (dtype, torch.float64):
        leaves = [t.detach().to(wanted).requires_grad_() for t in (hidden, weight, bias)]
        results.append(torch.autograd.grad(0.37 * losses(F.linear(*leaves), labels, "sum"), leaves))
    for a, b, t in zip(*results, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[dtype]
