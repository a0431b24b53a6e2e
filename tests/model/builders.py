"""Tiny random models: transformers configs, adapters, and plain modules written as people write them.

Hidden size 64, a few layers, vocabulary 96: small enough that a test is bound by capture, not by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 96
HIDDEN = 64
DECODER = dict(
    hidden_size=HIDDEN,
    intermediate_size=112,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def causal_lm(model_type: str, layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    """A causal language model of ``model_type`` in train mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**DECODER, "num_hidden_layers": layers, **changes})
    return AutoModelForCausalLM.from_config(config).train()


def llama(layers: int = 2, **changes: Any) -> nn.Module:
    return causal_lm("llama", layers, **changes)


def qwen3(layers: int = 2, **changes: Any) -> nn.Module:
    return causal_lm("qwen3", layers, head_dim=16, **changes)


def gemma2(layers: int = 2, **changes: Any) -> nn.Module:
    return causal_lm("gemma2", layers, head_dim=16, sliding_window=8, **changes)


def mixtral(layers: int = 2, **changes: Any) -> nn.Module:
    return causal_lm("mixtral", layers, num_local_experts=4, num_experts_per_tok=2, **changes)


def gpt2(layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = dict(n_embd=HIDDEN, n_head=4, n_layer=layers, vocab_size=VOCABULARY, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})).train()


def bert(layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=112, num_attention_heads=4, num_hidden_layers=layers)
    return BertForMaskedLM(BertConfig(**{**sizes, "vocab_size": VOCABULARY, **changes})).train()


def t5(layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    sizes = dict(d_model=HIDDEN, d_kv=16, d_ff=112, num_layers=layers, num_heads=4, vocab_size=VOCABULARY)
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **changes})).train()


def vit(layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=112, num_attention_heads=4, num_hidden_layers=layers)
    return ViTForImageClassification(
        # (a problem that is not named is written into the config by the first loss, which the second step's graph then reads)
        ViTConfig(**{**sizes, "image_size": 16, "patch_size": 4, "problem_type": "single_label_classification", **changes})
    ).train()


def with_lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """``model`` wrapped by PEFT: LoRA on the attention projections, B filled so that it matters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return wrapped.train()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with labels, as a causal or masked language model takes it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def images(batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of 16x16 pictures with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, (batch,), generator=generator)}


# ---- plain modules -------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Causal self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, causal)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class NanoGPT(nn.Module):
    """A GPT whose one forward embeds, runs the blocks, projects and takes the loss."""

    def __init__(self, layers: int = 2, width: int = HIDDEN, dropout: float = 0.0, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(VOCABULARY, width),
                wpe=nn.Embedding(128, width),
                h=nn.ModuleList([Block(width, 4, dropout=dropout) for _ in range(layers)]),
                ln_f=nn.LayerNorm(width),
            )
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if labels is None:
            return {"logits": logits}
        shifted = logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
        return {"loss": F.cross_entropy(*shifted, ignore_index=-100), "logits": logits}


class PlainViT(nn.Module):
    """A vision transformer with its blocks in a Sequential, as timm has them."""

    def __init__(self, layers: int = 2, width: int = HIDDEN) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 2)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.blocks(self.patches(pixel_values).flatten(2).transpose(1, 2))).mean(1)
        logits = self.classify(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class DiTBlock(nn.Module):
    """A diffusion transformer's block: shifts, scales and gates from a condition vector (adaLN-Zero)."""

    def __init__(self, width: int = HIDDEN, heads: int = 4) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, heads, causal=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1)
        hidden = F.gelu(self.up(self.norm_2(x) * (1 + scale_2) + shift_2), approximate="tanh")
        return x + gate_2 * self.down(hidden)


# ---- counting and comparing ----------------------------------------------------------------------------------


class Graphs(list):
    """The graphs that a backend was given, each as the names of what it calls."""

    def calling(self, name: str) -> int:
        """How many graphs call something of that name."""
        return sum(any(name in target for target in graph) for graph in self)


@dataclass(frozen=True)
class PassThrough:
    """A backend that runs each graph unchanged and keeps what it calls; compared by ``name`` alone."""

    name: str = ""

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        CAPTURED.setdefault(self.name, Graphs()).append(
            [
                str(node.target)
                for node in gm.graph.nodes
                if node.op in ("call_function", "call_method", "call_module")
            ]
        )
        return gm.forward


CAPTURED: dict[str, Graphs] = {}


def loss_of(output: Any) -> torch.Tensor:
    """The loss of a model output, or the mean of a plain tensor."""
    if isinstance(output, torch.Tensor):
        return output.float().square().mean()
    return output["loss"]


def step(model: nn.Module, batch: dict[str, Any], seed: int = 7, **kwargs: Any) -> dict[str, torch.Tensor]:
    """One forward and backward: the loss and every gradient, by name. Gradients are cleared."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = loss_of(model(**batch, **kwargs))
    loss.backward()
    results = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad.clone()
    model.zero_grad(set_to_none=True)
    return results


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names whose values differ in any bit, or are missing on one side."""
    return [
        name
        for name in sorted(set(ours) | set(theirs))
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]
