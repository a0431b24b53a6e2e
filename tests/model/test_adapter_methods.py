"""PEFT's other methods: each trains as eager does, and its blocks are captured whole or left as they are by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio
from tests.model import builders as build
from tests.model.builders import tokens

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ON_LINEARS = {"target_modules": LINEARS}


@dataclass(frozen=True)
class Method:
    """A config of PEFT's, the model that it is for, and why its blocks are not captured (part of the sentence), or nothing."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = lambda: build.llama(2)
    declined: str = ""


METHODS = {
    "loha": Method("LoHaConfig", {"r": 4, **ON_LINEARS}),
    "loha, rank dropout": Method("LoHaConfig", {"r": 4, "rank_dropout": 0.3, **ON_LINEARS}),
    "loha, module dropout": Method("LoHaConfig", {"r": 4, "module_dropout": 0.3, **ON_LINEARS}, declined="by chance (module_dropout)"),
    "lokr": Method("LoKrConfig", {"r": 4, **ON_LINEARS}),
    "lokr, both decomposed": Method("LoKrConfig", {"r": 2, "decompose_both": True, "rank_dropout": 0.3, **ON_LINEARS}),
    "experts": Method("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}, lambda: build.mixtral(2)),
    "ia3": Method("IA3Config", {**ON_LINEARS, "feedforward_modules": ["down_proj"]}),
    "vera": Method("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "adalora": Method("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, **ON_LINEARS}),
    "oft": Method("OFTConfig", {"oft_block_size": 16, "target_modules": ["q_proj", "v_proj"]}),
    "boft": Method("BOFTConfig", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "hra": Method("HRAConfig", {"r": 4, **ON_LINEARS}),
    "norms": Method("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "fourier": Method("FourierFTConfig", {"n_frequency": 16, "target_modules": ["q_proj", "v_proj"]}),
    "randlora": Method("RandLoraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "tokens": Method("TrainableTokensConfig", {"token_indices": [3, 4, 5], "target_modules": ["embed_tokens"]}),
    "replicated layers": Method("LoraConfig", {"r": 4, "layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj", "v_proj"]}),
    "pissa": Method("LoraConfig", {"r": 4, "init_lora_weights": "pissa", **ON_LINEARS}),
    "prompt": Method("PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt encoder": Method("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "task_type": "CAUSAL_LM"}),
    "prefix": Method("PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, declined="a key/value cache came"),
}
QUICK = ("loha, rank dropout", "loha, module dropout", "lokr", "experts", "ia3", "norms", "tokens")


def adapted(method: Method) -> nn.Module:
    """A model with the method's adapters, moved off the point from which they change nothing."""
    base = method.model()
    torch.manual_seed(1)
    model = peft.get_peft_model(base, getattr(peft, method.config)(**method.options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.train()


def in_float64(model: nn.Module) -> nn.Module:
    """A copy; its experts run one by one, as torch has no grouped product in float64."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide.config, "num_local_experts"):
        wide.get_base_model().set_experts_implementation("eager")
    return wide


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the gradient of each trained parameter."""
    torch.manual_seed(2)
    loss = model(**tokens(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.filterwarnings("error:Error detected in")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS])
def test_a_method_trains_as_in_eager(name: str) -> None:
    """Loss and gradients of every adapter parameter are as near to float64 as eager's."""
    method = METHODS[name]
    model = adapted(method)
    theirs, exact = gradients(model), gradients(in_float64(model))
    fxfuse.optimize(model, validate="off", remainder="eager", strict=True)
    for _ in range(2):
        ours = gradients(model)
        assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
        assert {key for key, p in model.named_parameters() if p.requires_grad} >= set(ours[1])
        assert error_ratio(ours[0], theirs[0], exact[0]) <= 1.5
        errors = {key: error_ratio(ours[1][key], theirs[1][key], exact[1][key]) for key in exact[1]}
        # (of four numbers, rounding makes now these and now those the nearer ones)
        assert {key: error for key, error in errors.items() if error > (2.5 if exact[1][key].numel() > 8 else 4)} == {}
    says_what_it_did(fxfuse.report(model), method)


def says_what_it_did(report: fxfuse.Report, method: Method) -> None:
    """Blocks are graphs of their own, or the reason is said."""
    if method.declined:
        assert any(method.declined in note for note in left_out(report)), report.notes
        return
    assert left_out(report) == []
    assert "block" in {graph.kind for graph in report.graphs}
    assert report.count("rms_norm") > 0
    assert report.count("rope") > 0
    assert report.errors == []


def left_out(report: fxfuse.Report) -> list[str]:
    """What it says of blocks that are not captured."""
    return [note for note in report.notes if "DecoderLayer" in note and ("eager" in note or "not captured" in note)]


@pytest.mark.parametrize("name", ["lokr", "experts"])
def test_the_life_of_an_adapter_that_is_traced_in_other_words(name: str) -> None:
    """Adapters that come after ``optimize``; copies, disabling, merging and ``restore`` find the library's own layers."""
    method = METHODS[name]
    base = fxfuse.optimize(method.model(), validate="off", remainder="eager", strict=True)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, getattr(peft, method.config)(**method.options)).train()
    eager = copy.deepcopy(model)
    fxfuse.restore(eager)
    for each in (model, eager):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in each.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)

    def equal() -> bool:
        (ours, mine), (theirs, its) = gradients(model), gradients(eager)
        near = all((mine[key] - its[key]).norm() <= 2e-5 * its[key].norm() for key in its)
        return mine.keys() == its.keys() and near and abs(ours - theirs) <= 2e-5 * theirs

    assert equal()
    assert left_out(fxfuse.report(base)) == []
    assert model.state_dict().keys() == eager.state_dict().keys()
    with model.disable_adapter(), eager.disable_adapter():
        assert torch.allclose(model(**tokens()).loss, eager(**tokens()).loss, rtol=2e-5)
    assert equal()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(**tokens()).logits, eager.eval()(**tokens()).logits)
    eager.train()
    fxfuse.restore(base)
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]
    assert torch.equal(gradients(model)[0], gradients(eager)[0])
    merged, expected = (each.merge_and_unload().state_dict() for each in (model, eager))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)
