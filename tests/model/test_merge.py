"""``fxfuse.merge``: one rounding, the keys of an unquantized model, and refusals before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import tokens
from tests.model.quantized_models import in_4bit, in_8bit, with_adapters

BF16 = torch.bfloat16


def in_bf16(**changes: Any) -> nn.Module:
    """Parameters in bfloat16, buffers as they are: what loading gives."""
    model = build.llama(**changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    model.config.dtype = BF16
    return model


def qlora(**options: Any) -> nn.Module:
    return with_adapters(in_4bit(in_bf16(), BF16), **options)


def exact(model: nn.Module, adapters: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    """Every weight of the merged model in float64, from the definition: dequantized weight + scale B A."""
    from bitsandbytes.functional import dequantize_4bit

    weights = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.get_base_layer().weight
            if type(weight).__name__ == "Params4bit":
                dtype, weight.quant_state.dtype = weight.quant_state.dtype, torch.float32
                total = dequantize_4bit(weight.data, weight.quant_state).double()
                weight.quant_state.dtype = dtype
            else:
                total = weight.detach().double()
            for name in adapters:
                total += module.scaling[name] * module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
            weights[f"{path.removeprefix('base_model.model.')}.weight"] = total.detach()
    return weights


def nearest(values: dict[str, Tensor], weights: dict[str, Tensor], dtype: torch.dtype = BF16) -> bool:
    """Whether these are the exact weights, rounded once: float32's own error moves a value over a boundary now and then."""
    for name, want in weights.items():
        got, once = values[name], want.to(dtype)
        assert got.dtype == dtype
        if (got != once).double().mean() > 1e-3 or not torch.allclose(got.double(), once.double(), rtol=2**-7, atol=0):
            return False
    return True


def test_a_4bit_base_is_rounded_once_and_loads_without_us(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = fxfuse.optimize(qlora())
    want = exact(model)
    merged = fxfuse.merge(model)
    assert type(merged) is type(build.llama())
    assert merged.state_dict().keys() == build.llama().state_dict().keys()
    assert {value.dtype for value in merged.state_dict().values()} == {BF16}
    assert nearest(merged.state_dict(), want)
    assert fxfuse.report(merged).sites == []

    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(loaded(**tokens()).logits, merged.eval()(**tokens()).logits)


def test_nearer_to_the_trained_model_than_merging_into_4_bits() -> None:
    """What this is for: the library's own merge loses the adapter in the steps of the quantization."""
    want = exact(qlora())
    ours = fxfuse.merge(qlora()).state_dict()
    theirs = fxfuse.merge(qlora().merge_and_unload()).state_dict()  # (dequantized only)
    for name, value in want.items():
        assert (ours[name].double() - value).norm() < 0.1 * (theirs[name].double() - value).norm()


def test_what_a_16bit_base_becomes_is_rounded_once_too() -> None:
    def make() -> nn.Module:
        return with_adapters(in_bf16().requires_grad_(False))

    want = exact(make())
    merged = fxfuse.merge(make())
    assert nearest(merged.state_dict(), want)
    other = fxfuse.merge(make(), dtype=torch.float16)
    assert nearest(other.state_dict(), want, torch.float16)


def test_an_8bit_base() -> None:
    """Beside what eight bits lose of the base, the adapters are in it."""
    merged = fxfuse.merge(with_adapters(in_8bit(in_bf16())), dtype=BF16).state_dict()
    assert merged.keys() == build.llama().state_dict().keys()
    for name, want in exact(with_adapters(in_bf16())).items():
        assert (merged[name].double() - want).norm() <= 0.01 * want.norm(), name


def test_4bit_weights_that_have_been_evaluated() -> None:
    """On some CPUs bitsandbytes packs them anew for that, with the blocks' scales in bfloat16 from then on."""

    def make() -> nn.Module:
        return with_adapters(in_4bit(in_bf16(intermediate_size=128), BF16))

    used = make()
    with torch.no_grad():
        used.eval()(**tokens())
    ours, theirs = fxfuse.merge(used).state_dict(), fxfuse.merge(make()).state_dict()
    for name, value in theirs.items():
        assert (ours[name].double() - value.double()).norm() <= 0.01 * value.double().norm()


def test_several_adapters_and_a_saved_copy_of_the_head() -> None:
    from peft import LoraConfig

    def make() -> nn.Module:
        model = qlora(modules_to_save=["lm_head"])
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        nn.init.normal_(model.get_output_embeddings().modules_to_save["default"].weight)
        return model

    model = make()
    both = exact_of_two(model)
    head = model.get_output_embeddings().modules_to_save["default"].weight.detach().clone()
    merged = fxfuse.merge(model, adapters=["default", "second"])
    assert nearest(merged.state_dict(), both)
    assert torch.equal(merged.lm_head.weight, head.to(BF16))
    assert nearest(fxfuse.merge(make(), adapters=["default"]).state_dict(), exact(make()))


def exact_of_two(model: nn.Module) -> dict[str, Tensor]:
    alone = exact(model)
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "second" in module.lora_A:
            product = module.lora_B["second"].weight.double() @ module.lora_A["second"].weight.double()
            alone[f"{path.removeprefix('base_model.model.')}.weight"] += module.scaling["second"] * product.detach()
    return alone


def test_variants_that_rescale_the_weight() -> None:
    """DoRA: the merged model computes what the adapted one did, but for the rounding to 16 bits."""

    def make() -> nn.Module:
        return with_adapters(in_4bit(build.llama(), torch.float32), use_dora=True)

    with torch.no_grad():
        want = make()(**tokens()).logits
        merged = fxfuse.merge(make(), dtype=torch.float32)
        assert (merged(**tokens()).logits - want).norm() <= 1e-5 * want.norm()


def test_without_adapters_a_model_is_dequantized() -> None:
    model = in_4bit(in_bf16(), BF16)
    with torch.no_grad():
        want = model(**tokens()).logits
        plain = fxfuse.merge(model, dtype=BF16)
        assert plain is model
        assert (plain(**tokens()).logits - want).norm() <= 0.02 * want.norm()
    assert plain.state_dict().keys() == build.llama().state_dict().keys()


def merged_already() -> nn.Module:
    model = with_adapters(build.llama())
    model.merge_adapter()
    return model


def broken() -> nn.Module:
    model = qlora()
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    return model


def tied() -> nn.Module:
    return with_adapters(build.llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])


def prompts() -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(build.llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def injected() -> nn.Module:
    from peft import LoraConfig

    model = build.llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def scaled() -> nn.Module:
    from peft import IA3Config, get_peft_model

    return get_peft_model(in_4bit(build.llama()), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (merged_already, {}, r"q_proj cannot be merged: default is merged into it already.*unmerge_adapter"),
        (broken, {}, r"lora_B.default.weight is not finite"),
        (tied, {}, r"lm_head shares its weight with .*embed_tokens.weight: merging would change both"),
        (prompts, {}, "add nothing to weights"),
        (injected, {}, "get_peft_model or PeftModel.from_pretrained"),
        (scaled, {}, "only LoRA and its variants"),
        (qlora, {"adapters": ["other"]}, "no adapter 'other' to merge; there are 'default'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_merged_is_refused_untouched(make: Callable[[], nn.Module], options: dict[str, Any], sentence: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        fxfuse.merge(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in after.items())


def test_no_model() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got str"):
        fxfuse.merge("model")  # type: ignore[arg-type]
