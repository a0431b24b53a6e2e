"""Dynamic 4-bit: what is kept is what the predictions feel, and the result is an ordinary bitsandbytes model."""

from __future__ import annotations

import random

import pytest
import torch

import fxfuse

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

from fxfuse.quantization.dynamic import selection_of  # noqa: E402
from fxfuse.quantization.linears import as_quantized, find_linears  # noqa: E402
from fxfuse.quantization.sensitivity import divergence, predict  # noqa: E402

BUDGET = 1.0  # these models are float32: keeping a linear costs 6.7 times its 4 bits
SPOILED = ("model.layers.0.mlp.down_proj",)


def llama(seed: int = 0, kv_heads: int = 2) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=kv_heads, initializer_range=0.2)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def spoiled_llama() -> transformers.PreTrainedModel:
    """One of its linears has weights that are small but for one a block: the scale of the block rounds the others away."""
    model = llama()
    with torch.no_grad():
        for name in SPOILED:
            weight = model.get_submodule(name).weight
            weight[:, ::64] = 6.0 * weight[:, ::64].sign()
    return model


def batches(count: int = 3, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 96, (2, 24), generator=generator)} for _ in range(count)]


def config(**kwargs) -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **kwargs)


def divergence_without(model, kept: list[str], text) -> float:
    linears = find_linears(model, config())
    going = [each for each in linears if each.name not in kept]
    return divergence(model, going, text, config(), predict(model, text))


def test_the_linears_that_rounding_spoils_are_kept() -> None:
    model = spoiled_llama()
    fxfuse.quantize(model, batches(), budget=BUDGET)
    selection = selection_of(model)
    assert set(SPOILED) <= set(selection.kept)
    assert selection.selected < selection.uniform / 2
    assert selection.bytes <= selection.budget


def test_planted_outliers_leave_the_function_alone_and_are_kept() -> None:
    """The benchmark's recipe: bit for bit the same logits, a divergence that is mostly of the layers that were chosen."""
    from benchmarks.small_model import plant_outliers

    model = llama(kv_heads=4)
    text = batches()
    with torch.no_grad():
        before = model(**text[0]).logits
        rounded = divergence_without(model, [], text)
        (chosen,) = plant_outliers(model, layers=1)
        assert torch.equal(model(**text[0]).logits, before)
    assert divergence_without(model, [], text) > 1.5 * rounded
    fxfuse.quantize(model, text, budget=BUDGET)
    layer = f"model.layers.{chosen}."
    assert {layer + "mlp.down_proj", layer + "self_attn.o_proj"} <= set(selection_of(model).kept)


def test_the_choice_beats_a_random_one_and_the_first_or_last_layers_on_other_text() -> None:
    model, held_out = spoiled_llama(), batches(seed=7)
    quantized = fxfuse.quantize(spoiled_llama(), batches(), budget=BUDGET)
    kept, rows = selection_of(quantized).kept, selection_of(quantized).rows
    spent = sum(row.extra for row in rows if row.kept)

    def filled(order) -> list[str]:
        names, left = [], spent
        for row in order:
            if row.extra <= left:
                names.append(row.name)
                left -= row.extra
        return names

    ours = divergence_without(model, kept, held_out)
    for seed in range(4):
        order = list(rows)
        random.Random(seed).shuffle(order)
        if set(SPOILED) <= set(filled(order)):
            continue
        assert ours < divergence_without(model, filled(order), held_out)
    assert ours < divergence_without(model, filled(reversed(rows)), held_out)
    assert ours < divergence_without(model, [], held_out)


def test_transformers_alone_loads_what_was_saved(tmp_path) -> None:
    model = fxfuse.quantize(spoiled_llama(), batches(), budget=BUDGET)
    text = batches(1, seed=3)[0]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name in selection_of(model).kept:
        assert type(again.get_submodule(name)) is torch.nn.Linear
    quantized = [name for name, module in again.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert sorted([*quantized, *selection_of(model).kept]) == sorted(row.name for row in selection_of(model).rows)
    assert type(again.lm_head) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(again(**text).logits, model(**text).logits)


def test_what_is_quantized_is_what_transformers_makes_of_the_same_weights(tmp_path) -> None:
    plain = llama()
    plain.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config()).eval()
    ours = fxfuse.quantize(plain, batches(1), budget=0.0)
    assert selection_of(ours).kept == []
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_linears_stored_the_other_way_round_and_with_biases(tmp_path) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    fxfuse.quantize(model, batches(2), budget=0.3)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    text = batches(1, seed=3)[0]
    with torch.no_grad():
        assert torch.equal(again(**text).logits, model(**text).logits)


def test_a_quantized_model_is_fused_and_trains_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = fxfuse.quantize(llama(), batches(1), budget=0.2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = fxfuse.optimize(model)
    ids = batches(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    fxfuse.report(model).assert_fused("nf4_linear")


def test_a_name_that_begins_another_is_kept_alone() -> None:
    from fxfuse.quantization.conversion import _skip_list

    class Row(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(12)])

    going = {f"parts.{i}" for i in range(12) if i != 1}
    names = _skip_list(Row(), going)
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert {f"parts.{i}" for i in range(12) if should_convert_module(f"parts.{i}", names)} == going


def test_weights_are_what_they_were_after_an_exception() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail_inside() -> None:
        with as_quantized(find_linears(model, config()), config()):
            assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail_inside()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_padding_is_not_measured() -> None:
    text = batches(1)[0]["input_ids"]
    mask = torch.ones_like(text)
    mask[:, 16:] = 0
    assert len(predict(llama(), [{"input_ids": text, "attention_mask": mask}]).positions[0]) == 32


@pytest.mark.parametrize(("budget", "error"), [(-0.1, ValueError), (True, TypeError), (None, TypeError), ("soon", ValueError),
                                               ("auto", ValueError), (1000, ValueError)])  # fmt: skip
def test_budgets_that_make_no_sense(budget, error) -> None:
    model = llama()
    with pytest.raises(error, match=r"budget|memory"):
        fxfuse.quantize(model, batches(1), budget=budget)
    assert not getattr(model, "is_quantized", False)


def test_models_and_calibrations_that_cannot_be_taken() -> None:
    with pytest.raises(TypeError, match="transformers model"):
        fxfuse.quantize(torch.nn.Linear(64, 64), batches(1))
    with pytest.raises(ValueError, match="empty"):
        fxfuse.quantize(llama(), [])
    with pytest.raises(TypeError, match="tokenized"):
        fxfuse.quantize(llama(), ["some text"])
    with pytest.raises(ValueError, match="quantized already"):
        fxfuse.quantize(fxfuse.quantize(llama(), batches(1)), batches(1))
    with pytest.raises(ValueError, match="fused already"):
        fxfuse.quantize(fxfuse.optimize(llama()), batches(1))
    with pytest.raises(ValueError, match="has not been called"):
        selection_of(llama())


def test_the_table_and_the_plot(tmp_path) -> None:
    model = fxfuse.quantize(spoiled_llama(), batches(1), budget=BUDGET)
    selection = selection_of(model)
    text = str(selection)
    assert SPOILED[0] in text
    assert "16 bits" in text
    assert f"{len(selection.kept)} of 21 linears" in text
    pytest.importorskip("matplotlib")
    assert selection.plot(tmp_path / "kept.png").stat().st_size > 5000
