"""One call of a contender, and the judgement of it: outputs and gradients against float64, beside eager's own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import oracle
from benchmarks.kernel_cases import Case, Inputs

OURS = ("fxfuse", "fxfuse.fuse")
PEER_LIMIT = 0.02  # relative error over which a peer is not timed: it would be timed on another function


def fresh(inputs: Inputs, grad: bool) -> Inputs:
    """Copies: some peers write over their inputs."""
    args = [a.clone() for a in inputs.args]
    for i in inputs.wrt:
        args[i].requires_grad_(grad)
    return Inputs(args, inputs.wrt, inputs.cotangents and [c.clone() for c in inputs.cotangents])


def forward(fn: Callable[..., Any], inputs: Inputs) -> list[torch.Tensor]:
    out = fn(*inputs.args)
    return [out] if isinstance(out, torch.Tensor) else [t for t in out if t is not None]


def both(fn: Callable[..., Any], inputs: Inputs) -> list[torch.Tensor]:
    """Outputs, then the gradient of each trained input."""
    outputs = forward(fn, inputs)
    cotangents = inputs.cotangents if inputs.cotangents is not None else None
    return outputs + list(torch.autograd.grad(outputs, [inputs.args[i] for i in inputs.wrt], cotangents))


class Judge:
    """The float64 reference of one case, and eager's own error beside it."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(1)
        self.case, self.inputs = case, case.make(device)
        exact = fresh(self.inputs, grad=True)
        exact.args = [oracle.to64(a) for a in exact.args]
        exact.cotangents = oracle.to64(exact.cotangents) if exact.cotangents else None
        with oracle.InFloat64():
            self.reference = [t.detach() for t in both(case.fn, exact)]
        del exact
        self.eager = [t.detach() for t in both(case.fn, fresh(self.inputs, grad=True))]

    def errors(self, fn: Callable[..., Any]) -> dict[str, float]:
        """Worst ratio to eager's error, and worst relative error, over outputs and gradients."""
        got = both(fn, fresh(self.inputs, grad=True))
        if len(got) != len(self.reference):
            raise ValueError(f"{len(got)} outputs and gradients, {len(self.reference)} expected")
        ratios, relative = [], []
        for ours, eager, ref in zip(got, self.eager, self.reference, strict=True):
            ours = ours.reshape(ref.shape)
            ratios.append(
                oracle.ratio(ours, eager, ref, torch.bfloat16 if eager.numel() > 1 else torch.float32)
            )
            relative.append(oracle.rmse(ours, ref) / max(ref.pow(2).mean().sqrt().item(), 1e-30))
        return dict(error_ratio=round(max(ratios), 3), relative_error=float(f"{max(relative):.3g}"))


def wrong(contender: str, errors: dict[str, float]) -> str:
    """Why a contender must not be timed, or ''. Not-a-number is wrong."""
    if contender in OURS and not errors["error_ratio"] <= oracle.LIMIT[torch.bfloat16]:
        return f"error {errors['error_ratio']} times eager's against float64"
    if not errors["relative_error"] <= PEER_LIMIT:
        return f"relative error {errors['relative_error']}"
    return ""
