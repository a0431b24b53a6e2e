"""The loss head over Triton kernels, interpreted: gradients of logits written in their place, in rows that are padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxfuse import reference
from fxfuse.chunk_kernels import run_into
from fxfuse.kernels import launch
from fxfuse.linear_loss import adjoint, chunks
from fxfuse.linear_loss.op import linear_loss
from fxfuse.linear_loss.reading import guarded
from fxfuse.program import parse
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


@pytest.mark.parametrize("columns", [8192, 4100])
def test_a_row_that_does_not_read_its_logits_does_not_load_them(columns: int) -> None:
    """What lies in their place is undefined: the kernel masks the loads by the label."""
    z, labels = torch.randn(4, columns, dtype=torch.bfloat16), torch.tensor([7, columns - 1, -100, 0])
    each = lambda z, y: F.cross_entropy(z.float(), y, label_smoothing=0.1, reduction="none")  # noqa: E731
    program = trace_region(each, z, labels)[1].program
    logits = next(a.name for a in program.arguments if a.kind == "real")
    joint = adjoint.loss_and_gradient(guarded(program, logits), logits, False)
    place = [a.name for a in joint.arguments].index(logits)
    expected = reference.execute(joint, [z if i == place else labels[:, None] for i in range(2)])
    undefined = z.clone()
    undefined[2] = float("nan")
    outputs = [torch.empty_like(t) for t in expected[:-1]] + [undefined]
    run_into(joint, [undefined if i == place else labels[:, None] for i in range(2)], outputs)
    for ours, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, right)
    assert not undefined[2].any()


def test_a_mean_of_the_row_needs_no_second_buffer() -> None:
    """Label smoothing sums a row in the walk that overwrites it; a program that reads the row once more is run elsewhere."""
    late = parse(
        "program rank=1 math=float32\naxis a = 4096\narg z : float32[r|a]\n%0 = load z a 0 1\n%1 = max a %0\n%2 = sub %0 %1\n"
        "%3 = square %2\n%4 = sum a %3\n%5 = sub %0 %4\n%6 = square %5\n%7 = sum a %6\nout y : float32[r|] = %7\n"
        "out d_z : float32[r|a] = %2 @ a 0 1"
    )
    z, labels = torch.randn(3, 4096), torch.tensor([[1], [2], [3]])
    smoothed = trace_region(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"), z, labels[:, 0])[1].program
    logits = next(a.name for a in smoothed.arguments if a.kind == "real")
    joint = adjoint.loss_and_gradient(guarded(smoothed, logits), logits, False)
    arguments = [z if a.name == logits else labels for a in joint.arguments]
    assert not launch._overwrites(joint, [torch.empty(3, 1), z], arguments)
    assert launch._overwrites(late, [torch.empty(3, 1), z], [z])
