"""How each contender runs a case's function: fxfuse, eager, Inductor, Liger-Kernel and Unsloth.

`build(name, case)` gives a callable with the arguments of `case.fn`, or None where the peer has no such op.
The peers' ops are called as their own model patches call them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.kernel_cases import EPS, Case

Fn = Callable[..., Any]
NAMES = ("eager", "fxfuse", "inductor", "liger", "unsloth")  # and "fxfuse.fuse", when asked for


class Ours:
    """A function as a captured block runs it: our torch.compile backend, generic in the rows and with the columns that a model's
    weights fix, with its records."""

    def __init__(self, function: Fn) -> None:
        from fxfuse.backend import Backend

        self.module = torch.nn.Module()  # what the records hang on
        self.kind = SimpleNamespace(role="block")
        self.compiled = torch.compile(function, backend=Backend(), dynamic=True)

    def before_compiling(self) -> None:
        """Nothing is to be prepared."""

    def over_limit(self) -> None:
        raise RuntimeError("Dynamo's recompile limit is reached: this would be timed eager")

    def __call__(self, *args: torch.Tensor) -> Any:
        from fxfuse.capture import context

        for arg in args:
            if arg.dim() > 1:
                torch._dynamo.mark_static(arg, arg.dim() - 1)
        context.enter(self)  # type: ignore[arg-type]  # a kind that has a role and nothing else
        try:
            return self.compiled(*args)
        finally:
            context.leave()

    def sites(self) -> dict[str, Any]:
        """For the result row: fused sites by rule, what runs them, and why others were declined."""
        from fxfuse.reporting.records import Report

        report = Report.of(self.module)
        fused = [site for site in report.sites if site.status == "fused"]
        declined = sorted({f"{s.rule}: {s.reason}" for s in report.sites if s.status == "declined"})
        return dict(
            fused={
                rule: sum(s.count for s in fused if s.rule == rule)
                for rule in sorted({s.rule for s in fused})
            },
            implementation="+".join(sorted({s.implementation for s in fused})) or "not fused",
            **({"declined": declined + report.errors} if declined or report.errors else {}),
        )


def _fxfuse(case: Case) -> Fn:
    return Ours(case.fn)


def _fuse(case: Case) -> Fn | None:
    """`fxfuse.fuse` takes one row program; q and k have different rows."""
    import fxfuse

    return None if "rope" in case.op else fxfuse.fuse(case.fn)


def viewed_back(pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, S, d] as the case wants it: [B, S, H, d]."""
    q, k = pair[:2]
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger(case: Case) -> Fn | None:
    from liger_kernel import ops

    rope = ops.LigerRopeFunction.apply
    norm = ops.LigerRMSNormFunction.apply

    def qk_norm_rope(q, k, wq, wk, cos, sin):
        # in_place off, as its Qwen3 patch has it for per-head norms
        q, k = norm(q, wq, EPS, 0.0, "llama", False), norm(k, wk, EPS, 0.0, "llama", False)
        return viewed_back(rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1))

    def packed_swiglu(gate_up):  # its backward gives a matrix, so it must be given one
        return ops.LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, 1)).unflatten(0, gate_up.shape[:2])

    table: dict[str, Fn] = {
        "rms_norm": lambda x, w: norm(x, w, EPS, 0.0, "llama", True),  # in place, as its Llama patch has it
        "layer_norm": lambda x, w, b: ops.LigerLayerNormFunction.apply(x, w, b, EPS),
        "residual_norm": lambda x, r, w: ops.LigerFusedAddRMSNormFunction.apply(
            x, r, w, EPS, 0.0, "llama", False
        ),
        "softmax": lambda x: ops.LigerSoftmaxFunction.apply(x),
        "rope": lambda q, k, cos, sin: viewed_back(rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1)),
        "qk_norm_rope": qk_norm_rope,
        "gated_activation[silu]": lambda g, u: ops.LigerSiLUMulFunction.apply(g, u),
        "gated_activation[gelu_tanh]": lambda g, u: ops.LigerGELUMulFunction.apply(g, u),
        "gated_activation[silu, packed]": packed_swiglu,
        "activation[relu2]": lambda x: ops.LigerReLUSquaredFunction.apply(x),
        # it writes the gradient over its input: the copy that keeps the input whole is part of using it here
        "cross_entropy": lambda z, labels: ops.LigerCrossEntropyFunction.apply(
            z * 1 if z.requires_grad else z, labels, None, -100
        )[0],
    }
    return table.get(case.op)


class _Norm:
    """What Unsloth's fast_* functions read of a norm module."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.variance_epsilon, self.eps = weight, EPS, EPS


def _unsloth(case: Case) -> Fn | None:
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss
    from unsloth.kernels.layernorm import Fast_Layernorm
    from unsloth.kernels.qk_norm_rope import fast_qk_norm_rope
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm
    from unsloth.kernels.rope_embedding import fast_rope_embedding
    from unsloth.kernels.swiglu import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

    def add_then_norm(x, r, w):
        s = r + x
        return Fast_RMS_Layernorm.apply(s, w, EPS, False), s

    class SwiGLU(torch.autograd.Function):
        """Its two kernels as its LoRA MLP calls them; the backward writes over gate, up and the cotangent."""

        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return swiglu_fg_kernel(gate, up)

        @staticmethod
        def backward(ctx, gy):
            gate, up = ctx.saved_tensors
            n = gate.shape[-1]
            _, gup, ggate = swiglu_DWf_DW_dfg_kernel(
                gy.reshape(-1, n), gate.reshape(-1, n), up.reshape(-1, n)
            )
            return ggate.view_as(gate), gup.view_as(up)

    table: dict[str, Fn] = {
        "rms_norm": lambda x, w: Fast_RMS_Layernorm.apply(x, w, EPS, False),
        "layer_norm": lambda x, w, b: Fast_Layernorm.apply(x, w, b, EPS),
        "residual_norm": add_then_norm,
        "rope": lambda q, k, cos, sin: viewed_back(
            fast_rope_embedding(q.transpose(1, 2), k.transpose(1, 2), cos[0], sin[0])
        ),
        "qk_norm_rope": lambda q, k, wq, wk, cos, sin: viewed_back(
            fast_qk_norm_rope(_Norm(wq), _Norm(wk), q, k, cos, sin)
        ),
        "gated_activation[silu]": SwiGLU.apply,
        "cross_entropy": lambda z, labels: fast_cross_entropy_loss(z[None], labels[None]),
    }
    return table.get(case.op)


def build(name: str, case: Case) -> Fn | None:
    if name == "eager":
        return case.fn
    if name == "inductor":
        return torch.compile(case.fn, dynamic=False)
    return {"fxfuse": _fxfuse, "fxfuse.fuse": _fuse, "liger": _liger, "unsloth": _unsloth}[name](case)
