"""An architecture that exists in no library: its norm, rotation, gate and loss are fused on sight, with right gradients."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio

WIDTH, HEADS, HEAD, HIDDEN, VOCABULARY = 32, 4, 12, 48, 96


class BentNorm(nn.Module):
    """A centred norm by the mean absolute value and the mean square together, with a bent weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bend = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        size = x.abs().mean(-1, keepdim=True) + x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        return x / size * (1.0 + torch.tanh(self.bend))


def thirds_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first third of a head is rotated against its last third; the middle one is scaled by the cosine."""
    third = x.shape[-1] // 3
    a, b, c = x[..., :third], x[..., third : 2 * third], x[..., 2 * third :]
    return torch.cat([a * cos - c * sin, b * cos, c * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], HEADS, HEAD)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = thirds_rotated(q, cos, sin), thirds_rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], HEADS * HEAD))


class Gate(nn.Module):
    """softplus(gate) * tanh(up) * up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.softplus(self.gate(x)) * torch.tanh(up) * up)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Gate()
        self.before, self.after = BentNorm(WIDTH), BentNorm(WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), cos, sin)
        return x + self.mlp(self.after(x))


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = BentNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        angle = torch.arange(ids.shape[1], dtype=self.head.weight.dtype)[:, None] * torch.linspace(1.0, 0.1, HEAD // 3,
                                                                                                   dtype=self.head.weight.dtype)
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(self.head(self.norm(x))[:, :-1], ids[:, 1:])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of softsign-capped logits with smoothing, plus the square of the log-normaliser."""
        capped = logits / (1.0 + logits.abs() / 20.0)
        capped, labels = capped.reshape(-1, VOCABULARY), labels.reshape(-1)
        z = torch.logsumexp(capped, -1)
        return F.cross_entropy(capped, labels, label_smoothing=0.1) + 1e-3 * z.pow(2).mean()


def test_it_is_fused_on_sight_with_right_gradients() -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(0, VOCABULARY, (3, 17))
    twins = {"eager": copy.deepcopy(model), "exact": copy.deepcopy(model).double(), "fused": fxfuse.optimize(model)}
    losses = {name: twin(ids) for name, twin in twins.items()}
    for loss in losses.values():
        loss.backward()
    report = fxfuse.report(model)
    assert not report.errors
    fused = [site for site in report.sites if site.status == "fused"]
    assert [site for site in report.sites if site.status != "fused"] == []
    where = " ".join(site.module for site in fused)
    assert all(part in where for part in ("before", "after", "attention", "mlp", "norm"))
    report.assert_fused("unnamed", min=4)
    assert error_ratio(*(losses[name].detach() for name in ("fused", "eager", "exact"))) <= 1.5
    gradients = {name: {n: p.grad for n, p in twin.named_parameters()} for name, twin in twins.items()}
    for name, exact in gradients["exact"].items():
        ratio = error_ratio(gradients["fused"][name], gradients["eager"][name], exact)
        assert ratio <= 1.5, f"{name}: {ratio:.2f}"
