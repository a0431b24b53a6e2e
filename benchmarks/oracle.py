"""The judge of every benchmark: plain PyTorch in float64, written apart from fxfuse's own validation.

A model that says `.to(torch.float32)` inside would round its float64 run; `InFloat64` lifts each such cast.
An error is never judged alone, only beside the error that eager PyTorch itself makes:

    ratio = rmse(ours - ref) / max(rmse(eager - ref), ulp(dtype) * rms(ref) / 4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LOW = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1.5, torch.bfloat16: 2.0, torch.float16: 2.0}


class InFloat64(TorchFunctionMode):
    """Every floating dtype that the code under it names becomes float64, so that nothing in it rounds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        lift = lambda v: torch.float64 if isinstance(v, torch.dtype) and v in LOW else v  # noqa: E731
        return func(*[lift(a) for a in args], **{k: lift(v) for k, v in kwargs.items()})


def to64(value: Any) -> Any:
    """The same inputs in float64 (complex64 tables become complex128), leaves detached, requires_grad kept."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.detach().to(torch.complex128)
        if value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(to64(v) for v in value)
    return value


def rmse(a: torch.Tensor, ref: torch.Tensor) -> float:
    if ref.numel() == 0:
        return 0.0
    return (a.detach().double() - ref.double()).pow_(2).mean().sqrt().item()


def floor(ref: torch.Tensor, dtype: torch.dtype) -> float:
    """A quarter of a unit in the last place of the reference: no error under it is told from none."""
    if ref.numel() == 0:
        return 1.0
    return torch.finfo(dtype).eps * ref.double().pow(2).mean().sqrt().item() / 4 or torch.finfo(dtype).tiny


def ratio(
    ours: torch.Tensor, eager: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype | None = None
) -> float:
    """Our error over eager's (1 = as good as eager). NaN where ours is not finite and the reference is."""
    if ours.shape != ref.shape:
        raise ValueError(f"shape {tuple(ours.shape)} is not the reference's {tuple(ref.shape)}")
    ours_error = rmse(ours, ref)
    return ours_error / max(rmse(eager, ref), floor(ref, dtype or eager.dtype))
