"""Tiny configurations of transformers model types, for coverage.py: the architecture whole, the sizes small.

Each entry: configuration arguments that differ from the common ones of its family. `build` gives a seeded model in
training mode with a forward call that yields a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, LENGTH, BATCH = 96, 64, 4, 2, 16, 96, 2, 12, 2

DECODER: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2_STYLE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    n_embd=HIDDEN,
    n_layer=LAYERS,
    n_head=HEADS,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
LOCAL_EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
MLA: dict[str, Any] = dict(kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
DEEPSEEK: dict[str, Any] = dict(
    MLA,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    num_key_value_heads=HEADS,
)
DROPLESS: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@dataclass(frozen=True)
class Tiny:
    """`config` overrides; `head` is the auto class suffix (CausalLM, MaskedLM...) or a class name of the module."""

    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: DECODER)
    head: str = "CausalLM"
    config_type: str = ""  # where the text part has a model_type of its own


def _t(
    head: str = "CausalLM", base: dict[str, Any] | None = None, config_type: str = "", **config: Any
) -> Tiny:
    return Tiny(config, DECODER if base is None else base, head, config_type)


MODELS: dict[str, Tiny] = {
    "llama": _t(),
    "qwen2": _t(),
    "qwen3": _t(head_dim=HEAD_DIM),
    "qwen2_moe": _t(**EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": _t(**EXPERTS, head_dim=HEAD_DIM),
    "mistral": _t(sliding_window=8, head_dim=HEAD_DIM),
    "mixtral": _t(**LOCAL_EXPERTS),
    "gemma": _t(head_dim=HEAD_DIM),
    "gemma2": _t(head_dim=HEAD_DIM, query_pre_attn_scalar=16, sliding_window=8, attn_implementation="eager"),
    "gemma3": _t(
        config_type="gemma3_text",
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": _t(num_key_value_heads=HEADS, resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3": _t(resid_pdrop=0.0, embd_pdrop=0.0),
    "phimoe": _t(**LOCAL_EXPERTS, router_jitter_noise=0.0, input_jitter_noise=0.0),
    "deepseek_v2": _t(**{**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": _t(**DEEPSEEK),
    "olmo2": _t(),
    "olmoe": _t(num_experts=4, num_experts_per_tok=2, num_key_value_heads=HEADS),
    "granite": _t(
        embedding_multiplier=2.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1
    ),
    "cohere": _t(use_qk_norm=True),
    "cohere2": _t(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "glm4": _t(head_dim=HEAD_DIM),
    "gpt_oss": _t(
        **LOCAL_EXPERTS,
        head_dim=HEAD_DIM,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4": _t(
        config_type="llama4_text",
        **LOCAL_EXPERTS,
        head_dim=HEAD_DIM,
        intermediate_size_mlp=FFN,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=32,
    ),
    "smollm3": _t(no_rope_layers=[1, 0]),
    "starcoder2": _t(residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0),
    "stablelm": _t(qk_layernorm=True, partial_rotary_factor=0.5),
    "falcon": _t(
        alibi=False,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "gpt_neox": _t(hidden_dropout=0.0, attention_dropout=0.0),
    "gpt2": _t(base=GPT2_STYLE, **DROPLESS),
    "opt": _t(
        base=dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "nemotron": _t(head_dim=HEAD_DIM),
    "lfm2": _t(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "bert": _t("MaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": _t(
        "MaskedLM", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=8
    ),
    "t5": _t(
        "Seq2SeqLM",
        base=dict(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=HEAD_DIM,
            d_ff=FFN,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
    ),
    "vit": _t(
        "ImageClassification",
        base=dict(
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            image_size=16,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    "whisper": _t(
        "SpeechSeq2Seq",
        base=dict(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=FFN,
            decoder_ffn_dim=FFN,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    ),
    # and more, for breadth
    "exaone4": _t(
        sliding_window=8,
        sliding_window_pattern="LG",
        head_dim=HEAD_DIM,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "apertus": _t(),
    "helium": _t(head_dim=HEAD_DIM),
    "ernie4_5": _t(head_dim=HEAD_DIM),
    "seed_oss": _t(head_dim=HEAD_DIM, residual_dropout=0.0, attention_dropout=0.0),
    "olmo": _t(),
    "olmo3": _t(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "glm": _t(head_dim=HEAD_DIM, partial_rotary_factor=0.5),
    "minicpm3": _t(**{**MLA, "num_key_value_heads": HEADS}),
    "arcee": _t(head_dim=HEAD_DIM),
    "hunyuan_v1_dense": _t(head_dim=HEAD_DIM),
    "bitnet": _t(),
    "qwen3_next": _t(
        **EXPERTS,
        head_dim=HEAD_DIM,
        shared_expert_intermediate_size=48,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        partial_rotary_factor=0.5,
    ),
    "granitemoe": _t(**LOCAL_EXPERTS),
    "nanochat": _t(head_dim=HEAD_DIM),
    "ministral": _t(head_dim=HEAD_DIM, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "glm4_moe": _t(
        head_dim=HEAD_DIM,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    ),
    "gptj": _t(base=dict(GPT2_STYLE, rotary_dim=8), **DROPLESS),
    "bloom": _t(
        base=dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    ),
    "roberta": _t("MaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


def config_for(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    tiny = MODELS[name]
    arguments = {**tiny.base, **tiny.config}
    arguments.pop("attn_implementation", None)
    return CONFIG_MAPPING[tiny.config_type or name](**arguments)


def model_class(name: str, config: Any) -> type[torch.nn.Module]:
    import transformers

    mapping = {
        "CausalLM": "AutoModelForCausalLM",
        "MaskedLM": "AutoModelForMaskedLM",
        "Seq2SeqLM": "AutoModelForSeq2SeqLM",
        "ImageClassification": "AutoModelForImageClassification",
        "SpeechSeq2Seq": "AutoModelForSpeechSeq2Seq",
    }
    return getattr(transformers, mapping[MODELS[name].head])._model_mapping[type(config)]


def inputs_for(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, labels with a few ignored positions; images or log-mel features where the model takes them."""
    torch.manual_seed(1000 + seed)
    head = MODELS[name].head
    if head == "ImageClassification":
        return dict(pixel_values=torch.randn(BATCH, 3, 16, 16), labels=torch.randint(0, 5, (BATCH,)))
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    labels = torch.randint(3, VOCAB, (BATCH, LENGTH))
    labels[:, 2] = -100
    if head == "SpeechSeq2Seq":
        return dict(input_features=torch.randn(BATCH, 8, 32), labels=labels)
    if head == "CausalLM":
        return dict(input_ids=ids, labels=ids.masked_fill(labels == -100, -100), use_cache=False)  # type: ignore[dict-item]
    return dict(input_ids=ids, labels=labels)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Seeded weights that leave no parameter at 0 or 1, so that a dropped weight or bias shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 / parameter.shape[-1]) ** 0.5)


def build(
    name: str, dtype: torch.dtype = torch.float32, cls: Any = None, config: Any = None
) -> torch.nn.Module:
    """The seeded model in training mode; `cls` and `config` replace transformers' own (renaming.py)."""
    torch.manual_seed(0)
    config = config if config is not None else config_for(name)
    attention = MODELS[name].config.get("attn_implementation")
    config._attn_implementation = attention or "sdpa"
    cls = cls or model_class(name, config)
    try:
        model = cls(config)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error) and "sdpa" not in str(error):
            raise
        config._attn_implementation = "eager"  # gpt_oss: its sinks exist in eager and flex attention only
        model = cls(config)
    randomize(model)
    return model.to(dtype).train()
