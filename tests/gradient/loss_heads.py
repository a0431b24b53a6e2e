"""Heads of models with their losses, as people write them, and a judge of values and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.backend import Backend
from fxfuse.linear_loss import fuse
from fxfuse.linear_loss.surgery import Plan
from fxfuse.validation import LIMITS, error_ratio

CLASSES, WIDTH, BATCH, LENGTH = 61, 24, 3, 101
Loss = Callable[[Tensor, Tensor], Tensor]


def flat(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return z.view(-1, z.shape[-1]), labels.view(-1)


def mean(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(z.float(), labels))


def total_by_items(z: Tensor, labels: Tensor) -> Tensor:
    """``num_items_in_batch``: the sum over the rows, divided by a number that the trainer knows."""
    return F.cross_entropy(*flat(z.float(), labels), reduction="sum") / 77.0


def shifted(z: Tensor, labels: Tensor) -> Tensor:
    """Labels padded and moved to the left, as transformers does it."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return mean(z, labels)


def sliced(z: Tensor, labels: Tensor) -> Tensor:
    """Logits without the last, labels without the first, as older code does it."""
    return F.cross_entropy(*flat(z[..., :-1, :].contiguous().float(), labels[..., 1:].contiguous()))


def smoothed(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(z.float(), labels), label_smoothing=0.1)


def other_ignored(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(z.float(), labels.clamp(min=0)), ignore_index=0)


def capped(z: Tensor, labels: Tensor) -> Tensor:
    return mean(torch.tanh(z / 5.0) * 5.0, labels)


def scaled(z: Tensor, labels: Tensor) -> Tensor:
    return mean(z * 0.125, labels)


def divided(z: Tensor, labels: Tensor) -> Tensor:
    return mean(z / 3.0, labels)


def masked_mean(z: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(*flat(z.float(), labels), reduction="none").view(labels.shape)
    mask = (labels % 2 == 0).float()
    return (losses * mask).sum() / mask.sum()


def with_z_loss(z: Tensor, labels: Tensor) -> Tensor:
    z, labels = flat(z.float(), labels)
    return F.cross_entropy(z, labels) + 0.1 * torch.logsumexp(z, -1).square().mean()


def log_probabilities(z: Tensor, labels: Tensor) -> Tensor:
    return torch.gather(z.float().log_softmax(-1), -1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def selected(z: Tensor, labels: Tensor) -> Tensor:
    """The same without the full row of logarithms."""
    z = z.float()
    return torch.gather(z, -1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, -1)


def policy(z: Tensor, labels: Tensor) -> Tensor:
    mask = labels >= 0
    return -(log_probabilities(z, labels) * mask).sum() / mask.sum()


def by_sequence(z: Tensor, labels: Tensor) -> Tensor:
    """Sums for each sequence, and then something that is not linear: every row has a cotangent of its own."""
    return F.logsigmoid(0.1 * log_probabilities(z, labels).sum(-1)).mean()


def teacher(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Fixed logits [..., CLASSES] of another model."""
    table = torch.arange(CLASSES * CLASSES, device=labels.device).view(CLASSES, CLASSES)
    return torch.sin(0.37 * table)[labels.clamp(min=0)].to(dtype)


def divergence(z: Tensor, labels: Tensor) -> Tensor:
    """From teacher logits, at a temperature, over all rows."""
    z = z.float()
    target = F.softmax(teacher(labels, z.dtype) / 2, -1)
    return F.kl_div(F.log_softmax(z / 2, -1).view(-1, CLASSES), target.view(-1, CLASSES), reduction="batchmean")


def divergence_by_row(z: Tensor, labels: Tensor) -> Tensor:
    """Written out, of the rows that count."""
    z = z.float()
    target = F.log_softmax(teacher(labels, z.dtype), -1)
    rows = (target.exp() * (target - F.log_softmax(z, -1))).sum(-1)
    mask = (labels >= 0).float()
    return (rows * mask).sum() / mask.sum()


@dataclass(frozen=True)
class Head:
    """A linear and its loss; which parameters there are and are trained."""

    loss: Loss
    dtype: torch.dtype = torch.float32
    trained: bool = True
    biased: bool = False

    def module(self, scale: float = 1.0, batch: int = BATCH, length: int = LENGTH) -> Module:
        return Module(self, scale, batch, length)


class Module(nn.Module):
    """The head with inputs of a scale: hidden states [batch, length, WIDTH], labels of which a fifth are ignored."""

    def __init__(self, head: Head, scale: float, batch: int, length: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.loss = head.loss
        self.linear = nn.Linear(WIDTH, CLASSES, bias=head.biased).to(head.dtype).requires_grad_(head.trained)
        hidden = torch.randn(batch, length, WIDTH) * scale
        self.register_buffer("hidden", hidden.to(head.dtype))
        labels = torch.randint(0, CLASSES, (batch, length))
        labels[torch.rand(batch, length) < 0.2] = -100
        self.register_buffer("labels", labels)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.linear(hidden), labels)

    def results(self, run: Callable[..., Tensor] | None = None, factor: float = 1.0) -> list[Tensor]:
        """Value and gradients, for a cotangent of the right shape; ``run`` is the forward, compiled perhaps."""
        hidden = self.hidden.detach().requires_grad_()
        out = (self if run is None else run)(hidden, self.labels)
        generator = torch.Generator().manual_seed(5)
        cotangent = torch.randn(out.shape, generator=generator).to(out.dtype) if out.dim() else torch.ones_like(out)
        wanted = [hidden, *(p for p in self.parameters() if p.requires_grad)]
        return [out.detach(), *torch.autograd.grad(out * factor, wanted, cotangent)]


def compiled(module: nn.Module, **options: object) -> Callable[..., Tensor]:
    settings = {"validate": "off", "strict": True, "remainder": "eager", **options}
    return torch.compile(module, backend=Backend(**settings), dynamic=True)  # type: ignore[arg-type]


def worst_ratio(head: Head, scale: float = 1.0, factor: float = 1.0, **sizes: int) -> float:
    """How much further from float64 the fused head is than eager, as a share of what is allowed: at most 1."""
    truth = Module(head, scale, **{"batch": BATCH, "length": LENGTH, **sizes}).double().results(factor=factor)
    module = Module(head, scale, **{"batch": BATCH, "length": LENGTH, **sizes})
    eager, ours = module.results(factor=factor), module.results(compiled(module), factor)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
    return max(error_ratio(a, b, t) / LIMITS[a.dtype] for a, b, t in zip(ours, eager, truth, strict=True))


@contextmanager
def recorded_plans() -> Iterator[list[Plan]]:
    """The plans by which linears and losses are replaced meanwhile."""
    plans: list[Plan] = []
    original = fuse.replace_linear_loss

    def record(graph: torch.fx.Graph, found: object, plan: Plan) -> object:
        plans.append(plan)
        return original(graph, found, plan)  # type: ignore[arg-type]

    fuse.replace_linear_loss = record  # type: ignore[assignment]
    try:
        yield plans
    finally:
        fuse.replace_linear_loss = original
