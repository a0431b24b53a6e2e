"""Output heads with adapters: the logits are a sum, and every term has its gradients, in every mode, to float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.linear_loss import chunks, execution
from fxfuse.validation import LIMITS, error_ratio
from tests.gradient import loss_heads
from tests.gradient.loss_heads import CLASSES, WIDTH, compiled, recorded_plans

RANK = 5


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """202 rows in two chunks."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)


class Adapted(nn.Module):
    """A linear with low-rank adapters; what is not listed as trained is frozen."""

    def __init__(self, loss: Callable[..., Tensor], trained: str = "ab", adapters: int = 1, biased: bool = False,
                 dtype: torch.dtype = torch.float32, scale: float = 1.0, wide: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.loss = loss
        self.linear = nn.Linear(WIDTH, CLASSES, bias=biased).to(dtype).requires_grad_("w" in trained)
        make = lambda *shape: nn.Parameter((0.3 * torch.randn(*shape)).to(torch.float32 if wide else dtype))  # noqa: E731
        self.down = nn.ParameterList(make(RANK + k, WIDTH).requires_grad_("a" in trained) for k in range(adapters))
        self.up = nn.ParameterList(make(CLASSES, RANK + k).requires_grad_("b" in trained) for k in range(adapters))
        self.register_buffer("hidden", (scale * torch.randn(2, 101, WIDTH)).to(dtype))
        labels = torch.randint(0, CLASSES, (2, 101))
        labels[torch.rand(2, 101) < 0.3] = -100
        self.register_buffer("labels", labels)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        z = self.linear(hidden)
        for k, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            z = z + F.linear(F.linear(hidden.to(down.dtype), down), up) * (2.0, -0.7)[k]
        z = z.to(hidden.dtype)
        return self.loss(z, labels)

    def results(self, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
        hidden = self.hidden.detach().requires_grad_()
        out = (self if run is None else run)(hidden, self.labels)
        cotangent = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, [hidden, *(p for p in self.parameters() if p.requires_grad)], cotangent)]


def worst_ratio(**options: object) -> tuple[float, str]:
    """How much further from float64 the fused head is than eager (allowed: 1), and its mode."""
    truth, module = Adapted(**options).double().results(), Adapted(**options)  # type: ignore[arg-type]
    with recorded_plans() as plans:
        eager, ours = module.results(), module.results(compiled(module))
    assert all(a.dtype == b.dtype for a, b in zip(ours, eager, strict=True))
    plan, = plans
    return max(error_ratio(a, b, t) / LIMITS[a.dtype] for a, b, t in zip(ours, eager, truth, strict=True)), plan.mode


def by_row(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*loss_heads.flat(z.float(), labels), reduction="none")


@pytest.mark.parametrize(("loss", "trained", "mode"), [
    (loss_heads.mean, "ab", "total"), (loss_heads.mean, "wab", "total"), (loss_heads.sliced, "ab", "total"),
    (loss_heads.masked_mean, "b", "total"), (loss_heads.shifted, "a", "total"), (loss_heads.with_z_loss, "ab", "recompute"),
    (by_row, "ab", "recompute"), (by_row, "a", "rows"), (loss_heads.by_sequence, "wab", "recompute"),
])
def test_every_factor_has_its_gradient(loss: Callable[..., Tensor], trained: str, mode: str) -> None:
    ratio, found = worst_ratio(loss=loss, trained=trained)
    assert ratio <= 1
    assert found == mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Losses by row: of one sum over rounded logits, the error is a matter of luck, eager's too."""
    assert worst_ratio(loss=by_row, dtype=dtype)[0] <= 1


def test_float32_adapters_on_a_bfloat16_head() -> None:
    """As adapters are kept by default, where no autocast narrows them: the gradients of float32 parameters are float32's."""
    ratio, mode = worst_ratio(loss=loss_heads.mean, dtype=torch.bfloat16, wide=True)
    assert ratio <= 1
    assert mode == "total"


@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_small_and_large_hidden_states(scale: float) -> None:
    assert worst_ratio(loss=loss_heads.capped, scale=scale)[0] <= 1


def test_several_adapters_and_a_bias() -> None:
    assert worst_ratio(loss=loss_heads.mean, adapters=2, biased=True)[0] <= 1


def lost_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    original = execution.Factors.__new__
    monkeypatch.setattr(execution.Factors, "__new__", lambda cls, left, right, factor: original(cls, left, right, 1.0))


def last_chunk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = execution.accumulate
    monkeypatch.setattr(execution, "accumulate", lambda product, a, b, into, first: original(product, a, b, into, True))


def terms_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "add_term", lambda z, left, term: None)


@pytest.mark.parametrize("fault", [lost_factor, last_chunk_alone, terms_left_out])
def test_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert worst_ratio(loss=loss_heads.mean)[0] > 1
