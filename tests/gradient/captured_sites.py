"""Sites for tests of validation: functions as people write them, captured and planned as the backend does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfuse.canonical import canonicalize
from fxfuse.program import Program
from fxfuse.regions import Region, find_regions
from fxfuse.residuals import plan_residuals
from fxfuse.rewriting import differentiable_nodes
from fxfuse.validation import Verdict, forget_verdicts, validate

CPU = torch.device("cpu")


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b, 1e-5)


def gate(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh") * 1.5


def residual_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return h, rms_norm(h, w)


def rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = q.chunk(2, -1)
    return q * cos + torch.cat((-second, first), -1) * sin


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def softcap(x: Tensor) -> Tensor:
    return torch.tanh(x / 30.0) * 30.0


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square() * 2


class Captured(NamedTuple):
    region: Region
    program: Program
    differentiable: set[fx.Node]

    def judge(self, program: Program | None = None, mode: str = "fast") -> Verdict:
        forget_verdicts()
        return validate(self.region, program or self.program, self.differentiable, CPU, mode)


def capture(function: Callable[..., object], *inputs: Tensor) -> Captured:
    """The one region of a function, as the backend sees it."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        canonicalize(gm)
        (region, *more), _declined = find_regions(gm)
        assert not more, "one region is expected"
        differentiable = differentiable_nodes(gm.graph)
        wanted = tuple(a.name for view, a in zip(region.arguments, region.program.arguments, strict=True)
                       if view.node in differentiable and a.kind == "real")
        found.append(Captured(region, plan_residuals(region.program, wanted), differentiable))
        return gm.forward

    for tensor in inputs:
        for dim, size in enumerate(tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape):
            if size > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def data(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


SITES: dict[str, Callable[[], Captured]] = {
    "rms_norm": lambda: capture(rms_norm, data(2, 5, 48), data(48)),
    "rms_norm in float32": lambda: capture(rms_norm, data(2, 5, 48, dtype=torch.float32), data(48, dtype=torch.float32)),
    "layer_norm": lambda: capture(layer_norm, data(2, 5, 48), data(48), data(48)),
    "gate": lambda: capture(gate, data(2, 5, 48), data(2, 5, 48)),
    "gelu_tanh": lambda: capture(gelu_tanh, data(2, 5, 48)),
    "residual_norm": lambda: capture(residual_norm, data(2, 5, 48), data(2, 5, 48), data(48)),
    "rope": lambda: capture(rope, data(2, 3, 5, 32), data(2, 1, 5, 32, grad=False), data(2, 1, 5, 32, grad=False)),
    "loss": lambda: capture(loss, data(7, 48), torch.randint(0, 48, (7,))),
    "softcap": lambda: capture(softcap, data(2, 5, 48)),
    "relu_squared": lambda: capture(relu_squared, data(2, 5, 48)),
}
