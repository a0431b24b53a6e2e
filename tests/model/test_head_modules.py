"""What stands on an output projection (hooks, parametrizations, adapters, a forward of its own) is part of it: the fused loss gives
what the module gives, and whoever watches the module sees what eager shows.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxfuse
from fxfuse.errors import OutputContractError
from fxfuse.output_contract.tensor import LazyTensor
from tests.model.builders import VOCABULARY, tokens
from tests.model.giving_up import optimized as given_up

WIDTH = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Top(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head = Body(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.lm_head(self.body(input_ids))
        return {"loss": F.cross_entropy(logits.view(-1, VOCABULARY).float(), labels.view(-1)), "logits": logits}


def optimized(model: nn.Module) -> nn.Module:
    return fxfuse.optimize(model, rules=("linear_loss",), remainder="eager", strict=True)


def fused(model: nn.Module) -> int:
    return fxfuse.report(model).count("linear_loss")


def step(model: nn.Module, seed: int = 0, through: str = "loss") -> dict[str, Tensor]:
    """Loss, logits and gradients of one step."""
    model.zero_grad()
    out = model(**tokens(seed=seed))
    value = out["loss"] if through == "loss" else out["logits"].float().logsumexp(-1).mean()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out["loss"].detach(), "logits": out["logits"].detach() * 1, **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    wrong = [name for name in ours if (ours[name] - theirs[name]).norm() > 2e-6 * theirs[name].norm()]
    assert wrong == []


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tanh()


def own_forward(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * 3) + 0.5


def scale_input(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def scale_output(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.lm_head)


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def replaced(model: nn.Module) -> None:
    model.lm_head.forward = types.MethodType(own_forward, model.lm_head)


def subclassed(model: nn.Module) -> None:
    model.lm_head.__class__ = type("Other", (nn.Linear,), {"forward": own_forward})


def another(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.lm_head = nn.Linear(WIDTH, VOCABULARY)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    change.__name__: change for change in (scale_input, scale_output, weight_norm, parametrized, replaced, subclassed, another)
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_projection_is_what_is_fused(name: str) -> None:
    model, eager = Top(), Top()
    CHANGES[name](model)
    CHANGES[name](eager)
    optimized(model)
    for through in ("loss", "logits"):
        assert_same(step(model, through=through), step(eager, through=through))
    assert fused(model) + len(fxfuse.report(model).named("linear_loss", "declined")) >= 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_projection_changed_after_the_first_step(name: str) -> None:
    model, eager = optimized(Top()), Top()
    assert_same(step(model), step(eager))
    CHANGES[name](model)
    CHANGES[name](eager)
    for through in ("loss", "logits"):
        assert_same(step(model, 1, through), step(eager, 1, through))


@pytest.mark.parametrize("when", ["before", "after the first step"])
def test_a_hook_that_watches_the_output_sees_it(when: str) -> None:
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}

    def watch(model: nn.Module, where: str) -> None:
        model.lm_head.register_forward_hook(lambda module, args, out: seen[where].append(out))

    model, eager = optimized(Top()), Top()
    if when != "before":
        assert_same(step(model), step(eager))
    watch(model, "ours")
    watch(eager, "theirs")
    for seed in (0, 1):
        ours, theirs = step(model, seed), step(eager, seed)
        assert_same(ours, theirs)
        assert len(seen["ours"]) == len(seen["theirs"])
        assert torch.allclose(seen["ours"][-1], seen["theirs"][-1])


@pytest.mark.parametrize("when", ["before", "after the first step"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_that_watches_the_gradient_of_the_logits_sees_it(kind: str, when: str) -> None:
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def watch(model: nn.Module, where: str) -> None:
        getattr(model.lm_head, kind)(lambda module, *gradients: seen[where].append(gradients[-1][0]))

    model, eager = optimized(Top()), Top()
    if when != "before":
        assert_same(step(model), step(eager))
    watch(model, "ours")
    watch(eager, "theirs")
    for seed in (0, 1):
        assert_same(step(model, seed), step(eager, seed))
        assert len(seen["ours"]) == len(seen["theirs"]) == seed + 1
        assert torch.allclose(seen["ours"][-1], seen["theirs"][-1], rtol=1e-5, atol=1e-8)


def test_a_hook_on_the_weight_gets_its_gradient() -> None:
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    model, eager = optimized(Top()), Top()
    for m, where in ((model, "ours"), (eager, "theirs")):
        m.lm_head.weight.register_hook(lambda gradient, where=where: seen[where].append(gradient) or gradient * 2)
        m.lm_head.weight.register_post_accumulate_grad_hook(lambda weight, where=where: seen[where].append(weight.grad.clone()))
    assert_same(step(model), step(eager))
    assert [len(each) for each in seen.values()] == [2, 2]
    assert all(map(torch.allclose, seen["ours"], seen["theirs"]))
    assert fused(model) == 1


class TestAdapters:
    """LoRA on the projection itself, and a projection that is trained beside adapters."""

    def adapted(self, **changes: Any) -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **changes), Top())
        model.body.embed.weight.requires_grad_()
        return model.train()

    def test_on_the_projection(self) -> None:
        model, eager = optimized(self.adapted(target_modules=["lm_head"])), self.adapted(target_modules=["lm_head"])
        for through in ("loss", "logits"):
            ours, theirs = step(model, through=through), step(eager, through=through)
            assert_same(ours, theirs)
            assert sum("lora" in name for name in ours) == 2

    def test_with_dropout_on_the_projection(self) -> None:
        changes = dict(target_modules=["lm_head"], lora_dropout=0.5)
        model, eager = optimized(self.adapted(**changes)), self.adapted(**changes)
        for m in (model, eager):
            torch.manual_seed(2)
            m.got = step(m)
        assert_same(model.got, eager.got)

    def test_merged_into_the_projection_and_taken_out_again(self) -> None:
        model, eager = optimized(self.adapted(target_modules=["lm_head"])), self.adapted(target_modules=["lm_head"])
        for change in (lambda m: None, lambda m: m.lm_head.merge(), lambda m: m.lm_head.unmerge()):
            for m in (model, eager):
                change(m)
            assert_same(step(model), step(eager))

    @pytest.mark.parametrize("change", ["merge", "unmerge"])
    def test_logits_of_before_a_merge_are_not_those_of_after(self, change: str) -> None:
        model = given_up(self.adapted(target_modules=["lm_head"]))
        if change == "unmerge":
            model.lm_head.merge()
        logits = model(**tokens())["logits"]
        getattr(model.lm_head, change)()
        with pytest.raises(OutputContractError, match="adapter merged"):
            logits.sum()

    def test_a_trained_copy_of_the_projection(self) -> None:
        from peft import LoraConfig, get_peft_model

        def adapted() -> nn.Module:
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules=["inner"], modules_to_save=["lm_head"], init_lora_weights=False)
            return get_peft_model(Top(), config).train()

        model, eager = optimized(adapted()), adapted()
        for m in (model, eager):
            m.optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.5)
        for seed in range(3):
            ours, theirs = step(model, seed), step(eager, seed)
            assert_same(ours, theirs)
            assert any("modules_to_save" in name for name in ours)
            for m in (model, eager):
                m.optimizer.step()
        assert fused(model) == 1

    def test_the_logits_stay_lazy(self) -> None:
        model = optimized(self.adapted(target_modules=["lm_head"]))
        out = model(**tokens())
        assert (type(out["logits"]) is LazyTensor) == (fused(model) == 1)
