"""How each contender is applied to a workload.

hf            transformers and peft, SDPA, set up as TRL 1.15's SFTTrainer does: adapters bf16 for QLoRA and fp32 for
              a bf16 base, the forward under bf16 autocast, checkpointing with use_reentrant=False
hf-exact      the same weights in float32 throughout, no autocast: what --parity judges the others' errors against
hf+compile    the same model through torch.compile, default mode
hf+regional   the same model, each decoder layer compiled on its own; loss and embedding eager
liger         apply_liger_kernel_to_* before the build: rope, norms, gate, fused linear cross-entropy
liger-flce    only the fused linear cross-entropy of it (with +regional: the best mix of today's parts)
unsloth       FastLanguageModel.from_pretrained and get_peft_model as its notebooks do; only the disk read is
              replaced (AutoModelForCausalLM.from_pretrained gives the workload's model)
fxfuse        the model of `hf`, then fxfuse.optimize(model)
"""

from __future__ import annotations

import importlib
import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import Contender
from benchmarks.workloads import Workload, build_base, config_of, draw_adapters


@dataclass
class Prepared:
    """A model ready to train: `autocast` to bf16 around its forward or not."""

    model: torch.nn.Module
    autocast: bool
    optimize_s: float | None = None


def preimport(contender: Contender, workload: Workload) -> None:
    """The slow imports, made before the GPU is taken."""
    if contender.needs_unsloth:
        importlib.import_module("unsloth")  # must come before transformers and peft
    modules = ["transformers", "transformers.modeling_utils", "peft"]
    modules.append(f"transformers.models.{workload.arch}.modeling_{workload.arch}")
    if workload.mode == "qlora":
        modules.append("bitsandbytes")
    if contender.base.startswith("liger"):
        modules.append("liger_kernel.transformers")
    if contender.base == "fxfuse":
        modules.append("fxfuse")
    for module in modules:
        importlib.import_module(module)


def prepare(contender: Contender, workload: Workload, device: str, scratch: Path) -> Prepared:
    if contender.needs_unsloth:
        return _unsloth(workload, device, scratch, contender.checkpointing)
    if contender.base.startswith("liger"):
        _patch_with_liger(workload, only_loss=contender.base == "liger-flce")
    model: Any = build_base(workload, device, attention=contender.attention)
    exact = contender.base == "hf-exact"
    if exact:
        lift(model)
    if workload.mode != "full":
        model = with_adapters(model, workload, round_adapters=not exact)
        draw_adapters(model)
        if exact and workload.mode == "qlora":
            for parameter in model.parameters():
                parameter.data.copy_(
                    parameter.data.to(torch.bfloat16)
                )  # the values that the others start from
    elif workload.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    prepared = Prepared(model, autocast=workload.mode != "full" and not exact)
    if contender.base == "fxfuse":
        import fxfuse

        start = time.perf_counter()
        prepared.model = fxfuse.optimize(model, **contender.arguments)
        prepared.optimize_s = time.perf_counter() - start
    if contender.compiled == "compile":
        prepared.model = torch.compile(prepared.model)  # type: ignore[assignment]
    elif contender.compiled == "regional":
        for layer in decoder_layers(model):
            layer.compile()
    return prepared


def lift(model: Any) -> None:
    """The model in float32, 4-bit linears as what they stand for; the values stay what they are."""
    for name, linear in list(model.named_modules()):
        if type(linear).__name__ != "Linear4bit":
            continue
        functional = importlib.import_module("bitsandbytes.functional")
        weight = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        plain = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    model.is_loaded_in_4bit = model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if "num_experts" in model.config.to_dict():
        model.set_experts_implementation("eager")  # the grouped product is for 16 bits
    model.float()


def with_adapters(model: Any, workload: Workload, round_adapters: bool = True) -> Any:
    """LoRA on the workload's linears, as a trainer sets it up: bf16 adapters on a quantized base."""
    from peft import LoraConfig, get_peft_model

    if workload.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model,
        LoraConfig(
            r=workload.rank,
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules=list(workload.targets),
        ),
    )
    if workload.checkpointed:
        model.enable_input_require_grads()
    if workload.mode == "qlora" and round_adapters:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def decoder_layers(model: torch.nn.Module) -> Any:
    return next(
        m
        for n, m in model.named_modules()
        if n.split(".")[-1] == "layers" and isinstance(m, torch.nn.ModuleList)
    )


def _patch_with_liger(workload: Workload, only_loss: bool) -> None:
    patches = importlib.import_module("liger_kernel.transformers")
    patch = getattr(patches, f"apply_liger_kernel_to_{workload.arch}")
    if not only_loss:
        patch()
        return
    switches = [p for p in inspect.signature(patch).parameters.values() if isinstance(p.default, bool)]
    patch(**{p.name: p.name == "fused_linear_cross_entropy" for p in switches})


def _unsloth(workload: Workload, device: str, scratch: Path, asked: str) -> Prepared:
    """``asked``: the setting of its checkpointing; its own default (``offload``) where the workload is checkpointed."""
    from transformers import AutoModelForCausalLM
    from unsloth import FastLanguageModel

    def from_pretrained(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        attention = kwargs.get("attn_implementation")
        return build_base(workload, device, attention=attention if isinstance(attention, str) else "sdpa")

    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)
    full = workload.mode == "full"
    settings: dict[str, str | bool] = dict(on=True, off=False, offload="unsloth")
    checkpointing = settings[asked or ("offload" if workload.checkpointed else "off")]
    model, _ = FastLanguageModel.from_pretrained(
        model_name=_stub_checkpoint(workload, scratch / f"stub_{workload.name}"),
        max_seq_length=workload.length * (4 if workload.positions else 1),  # of sequences that grow: its tables end there
        dtype=torch.bfloat16,
        load_in_4bit=workload.mode == "qlora",
        full_finetuning=full,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        local_files_only=True,
    )
    if not full:
        model = FastLanguageModel.get_peft_model(
            model,
            r=workload.rank,
            lora_alpha=16,
            lora_dropout=0,
            bias="none",
            target_modules=list(workload.targets),
            use_gradient_checkpointing=checkpointing,
            random_state=3407,
        )
        draw_adapters(model)
    _unsloth_train_mode(model, FastLanguageModel, checkpointing)
    return Prepared(model, autocast=True)


def _unsloth_train_mode(model: Any, loader: Any, checkpointing: str | bool) -> None:
    """Its releases and model classes differ in how this is called."""
    ways = (
        lambda: model.for_training(use_gradient_checkpointing=checkpointing),
        lambda: model.for_training(),
        lambda: loader.for_training(model, use_gradient_checkpointing=checkpointing),
    )
    for way in ways:
        try:
            way()
            return
        except TypeError:
            continue
    model.train()


def _stub_checkpoint(workload: Workload, folder: Path) -> str:
    """config.json and a toy tokenizer: what Unsloth's loader reads from a local folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(workload)
    heads = dict(qwen2="Qwen2", llama="Llama", gemma2="Gemma2", qwen3_moe="Qwen3Moe")
    config.architectures = [f"{heads[workload.arch]}ForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(400))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)
