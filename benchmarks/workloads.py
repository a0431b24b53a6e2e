"""The training workloads W1 to W5, and one for long sequences: real architectures with random weights, built on the device.

Every weight is drawn from a generator seeded by the parameter's name and every token from a fixed seed, so all
contenders train the same model on the same text, and their losses and gradient norms can be compared. Nothing is
downloaded: the configurations are written down here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

LLAMA3_ROPE: dict[str, Any] = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_theta=500000.0,
)
QWEN_TOKENS: dict[str, int] = dict(bos_token_id=151643, eos_token_id=151645)
LLAMA_TOKENS: dict[str, int] = dict(bos_token_id=128000, eos_token_id=128009)

# name -> (transformers' model type, its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B": (
        "qwen2",
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
            tie_word_embeddings=False,
            use_sliding_window=False,
            **QWEN_TOKENS,
        ),
    ),
    "Llama-3.1-8B": (
        "llama",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters=LLAMA3_ROPE,
            tie_word_embeddings=False,
            **LLAMA_TOKENS,
        ),
    ),
    "Llama-3.2-1B": (
        "llama",
        dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters=dict(LLAMA3_ROPE, factor=32.0),
            tie_word_embeddings=True,
            **LLAMA_TOKENS,
        ),
    ),
    "Gemma-2-2B": (
        "gemma2",
        dict(
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=256000,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            tie_word_embeddings=True,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh",
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        ),
    ),
    "Qwen3-30B-A3B, 8 layers": (
        "qwen3_moe",
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=8,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
            tie_word_embeddings=False,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
            router_aux_loss_coef=0.001,
            **QWEN_TOKENS,
        ),
    ),
}

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION_LINEARS, "gate_proj", "up_proj", "down_proj")
Mode = Literal["qlora", "lora", "full"]


@dataclass(frozen=True)
class Workload:
    """One training setup. `qlora`: NF4 base and bf16 adapters; `lora`: bf16 base and fp32 adapters; `full`: bf16 weights."""

    name: str
    model: str
    mode: Mode
    batch: int
    length: int
    checkpointed: bool
    targets: tuple[str, ...] = ()
    attention: str = "sdpa"
    rank: int = 16  # of the adapters
    positions: int = 0  # as many as the configuration allows; 0: as the model has them
    layers: int = 0  # 0: as the model has them
    tiny: bool = False  # the same structure at widths a CPU can train

    @property
    def arch(self) -> str:
        return MODELS[self.model][0]

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def config(self) -> dict[str, Any]:
        config = dict(MODELS[self.model][1])
        if self.tiny:
            config |= _tiny(self.arch, config)
        if self.layers:
            config["num_hidden_layers"] = self.layers
        if self.positions:
            config["max_position_embeddings"] = self.positions
        return config

    def describe(self) -> str:
        what = {"qlora": f"QLoRA r{self.rank}", "lora": f"LoRA r{self.rank}", "full": "full fine-tune"}[self.mode]
        kept = "checkpointed" if self.checkpointed else "not checkpointed"
        cut = f", {self.layers} layers" if self.layers else ""
        return (
            f"{self.model} {what}, b{self.batch} s{self.length}, {kept}{cut}{', tiny' if self.tiny else ''}"
        )


def _tiny(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    head = 16
    small: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=128,
        vocab_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    if arch != "qwen2":
        small["head_dim"] = head
    if "num_experts" in config:
        small |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if "query_pre_attn_scalar" in config:
        small["query_pre_attn_scalar"] = head
    return small


_W2 = Workload("W2", "Llama-3.1-8B", "lora", 2, 4096, True, ALL_LINEARS)
WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("W1", "Qwen2.5-7B", "qlora", 2, 4096, True, ALL_LINEARS),
        _W2,
        replace(_W2, name="W2b", checkpointed=False),
        Workload("W3", "Llama-3.2-1B", "full", 4, 4096, False),
        # eager attention applies the softcap; without checkpointing its scores would not fit beside the logits
        Workload("W4", "Gemma-2-2B", "lora", 2, 4096, True, ALL_LINEARS, attention="eager"),
        Workload("W5", "Qwen3-30B-A3B, 8 layers", "lora", 2, 2048, False, ATTENTION_LINEARS),
    )
}
# Its length grows until it no longer trains (longest.py).
GROWING = Workload("long", "Llama-3.1-8B", "qlora", 1, 8192, True, ALL_LINEARS, rank=32, positions=2**20)


def named(name: str) -> Workload:
    return GROWING if name == GROWING.name else WORKLOADS[name]


def config_of(workload: Workload) -> Any:
    """A transformers configuration object."""
    from transformers import AutoConfig

    values = {k: dict(v) if isinstance(v, dict) else v for k, v in workload.config.items()}
    return AutoConfig.for_model(workload.arch, **values)


def build_base(workload: Workload, device: str, attention: str | None = None,
               quant_storage: torch.dtype = torch.uint8) -> torch.nn.Module:  # fmt: skip
    """The base model in bf16 on `device`, its weights drawn; with NF4 linears for `qlora`, their bytes seen as `quant_storage`."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config_of(workload), dtype=torch.bfloat16, attn_implementation=attention or workload.attention
        )
    draw_base(model, workload)
    model.config.use_cache = False
    if workload.mode == "qlora":
        quantize_nf4(model, quant_storage)
    return model


def _generator(key: str, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(key.encode()))
    return generator


@torch.no_grad()
def draw_base(model: torch.nn.Module, workload: Workload) -> None:
    """N(0, 0.02) weights; norms around the value at which they do nothing (Gemma's add one themselves)."""
    seen: set[int] = set()
    neutral = 0.0 if workload.arch == "gemma2" else 1.0
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen or not parameter.is_floating_point():
            continue
        seen.add(parameter.data_ptr())
        generator = _generator(name, parameter.device)
        if "norm" in name:
            noise = torch.randn(
                parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32
            )
            parameter.copy_(neutral + 0.1 * noise)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


@torch.no_grad()
def draw_adapters(model: torch.nn.Module) -> None:
    """A and B both non-zero, so that every adapter has a gradient from step 0; the same under any wrapper's prefix."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = _generator(name[name.index("layers.") :], parameter.device)
            noise = torch.randn(
                parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32
            )
            parameter.copy_(0.01 * noise)


def quantize_nf4(model: Any, quant_storage: torch.dtype = torch.uint8) -> None:
    """Every linear but the head becomes bitsandbytes NF4, double-quantized, as `load_in_4bit` makes it."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    stored: dict[str, Any] = dict(compress_statistics=True, quant_type="nf4", quant_storage=quant_storage)
    for name, linear in list(model.named_modules()):
        if type(linear) is not torch.nn.Linear or name.endswith("lm_head"):
            continue
        device = linear.weight.device
        with torch.device("meta"):
            new = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.bfloat16,
                **stored,
            )
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=new, **stored)
        new.weight = weight.to(device)
        if linear.bias is not None:
            new.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
        new.source_cls = torch.nn.Linear
        new.requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        linear.weight = None
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=quant_storage,
    )
    model.config.quantization_config = config
    model.is_loaded_in_4bit = model.is_4bit_serializable = model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.hf_quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(workload: Workload, device: str, count: int = 4) -> list[torch.Tensor]:
    """int64 [batch, length] each; labels are the ids themselves, nothing is masked."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(1234)
    vocabulary = workload.config["vocab_size"]
    low = min(1000, vocabulary // 4)
    shape = (workload.batch, workload.length)
    return [torch.randint(low, vocabulary - low, shape, generator=generator).to(device) for _ in range(count)]
