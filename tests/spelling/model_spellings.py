"""The spellings of real models (research/capture_survey.md, section 5), each with the rule that it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.rules import Shape

X = Shape((2, 3, 5, 16), torch.bfloat16)
W = Shape((16,), torch.bfloat16)
W32 = Shape((16,))
ANGLES = Shape((2, 1, 5, 16), torch.bfloat16)
HALF_ANGLES = Shape((2, 1, 5, 8), torch.bfloat16)
SCALAR = Shape((1,), torch.bfloat16)
LOGITS, LABELS = Shape((6, 40), torch.bfloat16), Shape((6,), torch.int64)


def llama(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def olmo2(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    return (w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5))).to(torch.bfloat16)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def gemma3n(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.pow(x32.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * w.float()).type_as(x)


def t5(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)


def divided_by_root(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def one_over_root(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * (1.0 / (x.square().sum(-1, keepdim=True) / 16 + 1e-6).sqrt()))


def no_weight(x: Tensor) -> Tensor:
    return F.rms_norm(x, (16,), None, 1e-6)


def torch_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (16,), w, 1e-6)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (16,), w, b, 1e-5)


def layer_norm_without_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (16,), w, None, 1e-5)


def layer_norm_plain(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (16,), None, None, 1e-5).to(torch.bfloat16)


def nemotron(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (16,), w + 1.0, b, 1e-5)


def cohere(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    mean = x32.mean(-1, keepdim=True)
    variance = (x32 - mean).pow(2).mean(-1, keepdim=True)
    return (w.to(torch.float32) * ((x32 - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


def l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def qwen3_next(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return (llama(x, w) * F.silu(gate.to(torch.float32))).to(torch.bfloat16)


def mamba2(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    x32 = x.to(torch.float32) * F.silu(gate.to(torch.float32))
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)


def pre_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = r + x
    return llama(h, w), h


def granite(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = r + x * 0.22
    return h, llama(h, w)


def phi(x: Tensor, z: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = (x + z) + r
    return h, layer_norm(h, w, b)


def bert(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return layer_norm(x + r, w, b)


def bert_embeddings(x: Tensor, z: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return layer_norm(x + z + r, w, b)


def olmo2_residual(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return r + olmo2(x, w)


def gemma2(x: Tensor, r: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    h = r + gemma(x, w)
    return h, gemma(h, u)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 8:], x[..., :8]), -1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def rope32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope(x, cos.float(), sin.float()).to(torch.bfloat16)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :8], x[..., 8:]
    half = torch.cat((-turned[..., 4:], turned[..., :4]), -1)
    return torch.cat((turned * cos + half * sin, rest), -1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def deepseek(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def gpt_oss_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def nanochat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., :8], x[..., 8:]
    return torch.cat((a * cos + b * sin, a * (-sin) + b * cos), -1)


def qwen3(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope(llama(x, w), cos, sin)


def hunyuan(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(rope(x, cos, sin), w)


def llama4(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = rope(x, cos, sin)
    return (turned.float() * torch.rsqrt(turned.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_by_hand(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate / (1.0 + torch.exp(-gate)))


def swiglu_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def packed(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return up * F.silu(gate)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def falcon_h1(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.silu(gate * 0.8) * 1.5


def cohere_qk(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return interleaved(cohere(x, w), cos, sin)


def gpt_oss(x: Tensor) -> Tensor:
    gate, up = x[..., ::2], x[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def shared_expert(x: Tensor, gate: Tensor) -> Tensor:
    return torch.sigmoid(gate) * x


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_python(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def relu_squared(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def softcap(x: Tensor) -> Tensor:
    return torch.tanh(x / 50.0) * 50.0


def loss(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), y, ignore_index=-100, reduction="mean")


def loss_ignoring_zero(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), y, ignore_index=0, reduction="sum")


def loss_capped(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(x / 30.0) * 30.0, y, reduction="none")


def loss_scaled(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((x / 8.0).float(), y, label_smoothing=0.2)


def scores(x: Tensor) -> Tensor:
    return F.softmax(x * 0.25, dim=-1, dtype=torch.float32).to(torch.bfloat16)


def masked_scores(x: Tensor, mask: Tensor) -> Tensor:
    return F.softmax(x * 0.25 + mask, dim=-1)


def softmax_by_hand(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


SPELLINGS: list[tuple[str, Callable[..., Any], tuple[Shape, ...]]] = [
    *[("rms_norm", f, (X, W)) for f in (llama, olmo2, gemma, gemma3n, t5, divided_by_root, one_over_root, torch_rms_norm)],
    ("rms_norm", llama, (X, W32)),
    ("rms_norm", no_weight, (X,)),
    *[("layer_norm", f, (X, W, W)) for f in (layer_norm, nemotron)],
    *[("layer_norm", f, (X, W)) for f in (layer_norm_without_bias, cohere)],
    ("layer_norm", layer_norm_plain, (X,)),
    ("l2_norm", l2, (X,)),
    ("l2_norm", lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12), (X,)),
    ("gated_norm", qwen3_next, (X, X, W)),
    ("gated_norm", mamba2, (X, X, W)),
    *[("residual_norm", f, (X, X, W)) for f in (pre_norm, granite, olmo2_residual)],
    ("residual_norm", phi, (X, X, X, W, W)),
    *[("residual_norm", bert, (X, r, W, W)) for r in (X, Shape((2, 1, 5, 16), torch.bfloat16))],
    ("residual_norm", bert_embeddings, (X, X, Shape((1, 3, 5, 16), torch.bfloat16), W, W)),
    ("residual_norm", gemma2, (X, X, W, W)),
    *[("rope", f, (X, a, a)) for f in (rope, rope32, interleaved) for a in (ANGLES, X)],
    *[("rope", f, (X, a, a)) for f in (deepseek, gpt_oss_rope, nanochat) for a in (HALF_ANGLES,)],
    ("rope", partial, (X, HALF_ANGLES, HALF_ANGLES)),
    *[("qk_norm_rope", f, (X, W, a, a)) for f in (qwen3, hunyuan, cohere_qk) for a in (ANGLES, X)],
    ("qk_norm_rope", llama4, (X, ANGLES, ANGLES)),
    *[("gated_activation", f, (X, X)) for f in (swiglu, swiglu_by_hand, swiglu_sigmoid, geglu, falcon_h1)],
    ("gated_activation", packed, (X,)),
    ("gated_activation", gpt_oss, (X,)),
    ("gated_activation", shared_expert, (X, Shape((2, 3, 5, 1), torch.bfloat16))),
    *[("activation", f, (X,)) for f in (gelu_new, gelu_fast, gelu_python, relu_squared, softcap, F.silu, F.gelu)],
    *[("cross_entropy", f, (LOGITS, LABELS)) for f in (loss, loss_ignoring_zero, loss_capped, loss_scaled)],
    *[("softmax", f, (X,)) for f in (scores, softmax_by_hand, lambda x: torch.softmax(x, -1))],
    ("softmax", masked_scores, (X, Shape((2, 1, 5, 16), torch.bfloat16))),
]
