"""The fused loss head on a GPU: at real vocabularies, in place, in float32 accumulation, without waiting, in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.backend import Backend
from fxfuse.linear_loss import chunks, counted
from fxfuse.linear_loss.products import accumulate
from fxfuse.validation import LIMITS, error_ratio


class Head(nn.Module):
    def __init__(self, width: int, classes: int, dtype: torch.dtype, trained: bool, reduction: str, cap: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, classes, bias=False).to("cuda", dtype).requires_grad_(trained)
        self.reduction, self.cap = reduction, cap

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        z = self.linear(hidden).float() if not self.linear.weight.dtype == torch.float64 else self.linear(hidden)
        if self.cap:
            z = torch.tanh(z / self.cap) * self.cap
        return F.cross_entropy(z, labels, reduction=self.reduction)

    def results(self, hidden: Tensor, labels: Tensor, run: object = None) -> list[Tensor]:
        hidden = hidden.detach().requires_grad_()
        out = (self if run is None else run)(hidden, labels)  # type: ignore[operator]
        cotangent = torch.linspace(0.5, 1.5, out.numel(), device="cuda").reshape(out.shape).to(out.dtype)
        wanted = [hidden, *(p for p in self.parameters() if p.requires_grad)]
        return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def data(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    labels[::7] = -100
    return torch.randn(rows, width, device="cuda", dtype=dtype), labels


def fused(head: Head, **options: object) -> object:
    return torch.compile(head, backend=Backend(strict=True, rules=("linear_loss",), **options), dynamic=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("trained", "reduction"), [(False, "mean"), (True, "mean"), (False, "none"), (True, "none")])
@pytest.mark.parametrize(("classes", "cap"), [(50257, 0.0), (32000, 30.0)])
def test_as_exact_as_eager(dtype: torch.dtype, trained: bool, reduction: str, classes: int, cap: float,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks; a vocabulary that is a multiple of nothing, and a softcap."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1 << 22)
    head = Head(256, classes, dtype, trained, reduction, cap)
    hidden, labels = data(300, 256, classes, dtype)
    truth = Head(256, classes, torch.float64, trained, reduction, cap)
    truth.linear.weight.data.copy_(head.linear.weight)
    expected = truth.results(hidden.double(), labels)
    eager, ours = head.results(hidden, labels), head.results(hidden, labels, fused(head))
    for a, b, t in zip(ours, eager, expected, strict=True):
        assert a.dtype == b.dtype
        assert error_ratio(a, b, t) <= LIMITS[a.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_products_are_added_up_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 96, 512, device="cuda").to(dtype), torch.randn(64, 96, 256, device="cuda").to(dtype)
    total = torch.empty(512, 256, device="cuda")
    for k in range(64):
        accumulate("nv,nd->vd", left[k], right[k], total, first=k == 0)
    truth = torch.einsum("knv,knd->vd", left.double(), right.double())
    assert (total.double() - truth).norm() <= 1e-6 * truth.norm()


def test_the_extra_memory_is_within_its_budget() -> None:
    """At the measured sizes: 0.4 GiB beyond what came in, of logits that are 2 GiB."""
    head = Head(4096, 128256, torch.bfloat16, False, "mean")
    hidden, labels = data(8192, 4096, 128256, torch.bfloat16)
    run = fused(head, validate="off")
    for _ in range(2):
        head.results(hidden, labels, run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head.results(hidden, labels, run)
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 <= 0.4


def test_nothing_waits_for_the_device() -> None:
    head = Head(256, 32000, torch.bfloat16, True, "mean")
    hidden, labels = data(1000, 256, 32000, torch.bfloat16)
    run = fused(head)
    for _ in range(2):
        head.results(hidden, labels, run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head.results(hidden, labels, run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_are_the_same_bit_for_bit() -> None:
    head = Head(512, 50257, torch.bfloat16, True, "mean")
    hidden, labels = data(2000, 512, 50257, torch.bfloat16)
    run = fused(head)
    first = head.results(hidden, labels, run)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, head.results(hidden, labels, run), strict=True))


def half_ignored(rows: int, classes: int, share: float) -> Tensor:
    """Labels of which a share, at random places, count."""
    torch.manual_seed(2)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") >= share] = -100
    return labels


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.97), (0.97, 0.1), (0.5, 0.0)])
@pytest.mark.parametrize(("trained", "reduction"), [(False, "mean"), (True, "mean"), (False, "none"), (True, "none")])
@pytest.mark.parametrize("budget", [1 << 22, 1 << 30])
def test_ignored_rows_stay_out_of_the_products(trained: bool, reduction: str, shares: tuple[float, float], budget: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """After a batch of which one share counts comes another of which another does: what was expected is only an expectation."""
    torch.use_deterministic_algorithms(False)  # tests run in that mode, in which rows are not taken apart
    classes = 50257 if budget == 1 << 22 else 32000
    monkeypatch.setattr(chunks, "LOGITS_BYTES", budget)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)
    counted._KNOWN.clear()
    head = Head(256, classes, torch.bfloat16, trained, reduction)
    hidden = torch.randn(700, 256, device="cuda", dtype=torch.bfloat16)
    run = fused(head)
    for _ in range(3):
        head.results(hidden, half_ignored(700, classes, shares[0]), run)
        torch.cuda.synchronize()
    labels = half_ignored(700, classes, shares[1])
    asked: list[int] = []
    grouped = torch._grouped_mm

    def spoilt(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        """With NaN where the product leaves what was there."""
        asked.append(1)
        product = grouped(left, right, offs=offs)
        if product.ndim == 2:
            product[int(offs[-1]) :] = float("nan")
        return product

    monkeypatch.setattr(torch, "_grouped_mm", spoilt)
    ours, eager = head.results(hidden, labels, run), head.results(hidden, labels)
    assert bool(asked) == (shares[0] < 0.85)
    truth = Head(256, classes, torch.float64, trained, reduction)
    truth.linear.weight.data.copy_(head.linear.weight)
    for a, b, t in zip(ours, eager, truth.results(hidden.double(), labels), strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        assert not a.isfinite().all() or error_ratio(a, b, t) <= LIMITS[a.dtype]
    assert not ours[1][labels == -100].any()


def test_nothing_waits_where_rows_are_ignored() -> None:
    torch.use_deterministic_algorithms(False)
    counted._KNOWN.clear()
    head = Head(256, 32000, torch.bfloat16, False, "mean")
    hidden, labels = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16), half_ignored(1000, 32000, 0.4)
    run = fused(head)
    for _ in range(3):
        head.results(hidden, labels, run)
        torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head.results(hidden, labels, run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
