"""Graphs of real architectures, canonical: the same outputs and gradients bit for bit,
and nothing fusible left in another spelling."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxfuse.canonical.facts import dtype_of, shape_of

transformers = pytest.importorskip("transformers")

_CHECKS = Path(__file__).parents[1] / "spelling" / "canonical_checks.py"
_spec = importlib.util.spec_from_file_location("canonical_checks", _CHECKS)
checks: Any = importlib.util.module_from_spec(_spec)  # type: ignore[arg-type]
_spec.loader.exec_module(checks)  # type: ignore[union-attr]

COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "vocab_size": 64, "max_position_embeddings": 32, "head_dim": 8, "pad_token_id": None, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {}, "cohere": {}, "glm4": {}, "phi3": {}, "olmo2": {}, "gpt_oss": EXPERTS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "falcon": {}, "bert": {},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "deepseek_v2": {**EXPERTS, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                    "v_head_dim": 8, "n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_shared_experts": 1},
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
WITHOUT_COMMON = ("gpt2", "t5", "falcon", "bert")


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    settings = {**({} if kind in WITHOUT_COMMON else COMMON), **OWN[kind]}
    if kind in ("falcon", "bert"):
        settings |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(kind, **{**settings, "vocab_size": 64})
    config.use_cache = False
    auto = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModelForMaskedLM}.get(kind,
            transformers.AutoModelForCausalLM)
    return auto.from_config(config).train()


def graphs_of(model: nn.Module, whole: bool, dynamic: bool | None) -> list[tuple[fx.GraphModule, list[Any]]]:
    """The graphs of one forward pass: of the whole model, or of each kind of layer."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, inputs))
        return fx.GraphModule(gm, checks.copied(gm)).forward

    layers = [m for m in model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)]
    for module in [model] if whole else layers:
        module.compile(backend=backend, dynamic=dynamic)
    ids = torch.randint(3, 64, (2, 16))
    model(input_ids=ids, labels=ids)
    return graphs


FUSIBLE = {"to", "float", "pow", "mean", "rsqrt", "silu", "gelu", "tanh", "sigmoid", "softmax", "cat", "chunk", "split", "view",
           "reshape",
           "transpose", "unsqueeze", "expand", "flatten", "cross_entropy", "layer_norm", "rms_norm", "truediv", "contiguous",
           "view_as_complex", "iadd", "imul", "itruediv", "type_as", "clamp", "repeat_interleave"}  # fmt: skip


def left_in_other_words(gm: fx.GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op.startswith("call_") and name in FUSIBLE and dtype_of(node) is not None and shape_of(node):
            yield node.format_node() or name


# Complex products are computed with a fused multiply-add on some machines, real ones without: equal to an ulp only in float32.
ONE_ULP = ("deepseek_v2",)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", OWN)
def test_layers(kind: str, mode: str) -> None:
    if kind in ONE_ULP and mode == "float32":
        pytest.skip("covered by test_a_complex_rotation_becomes_real_lanes")
    model = build(kind).to(torch.bfloat16 if mode == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for gm, inputs in graphs_of(model, whole=False, dynamic=None):
            checks.assert_canonicalization_changes_nothing(gm, inputs)
            assert list(left_in_other_words(gm)) == []


QUICK = ("llama", "gemma2")
WHOLE = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in OWN if kind not in ONE_ULP]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_models_of_symbolic_sizes(kind: str) -> None:
    for gm, inputs in graphs_of(build(kind), whole=True, dynamic=True):
        checks.assert_canonicalization_changes_nothing(gm, inputs)
