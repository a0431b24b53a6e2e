"""What stands on a linear inside of a block (a hook, a parametrization) is part of it: its weight is never read past it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxfuse
from tests.model import builders as build
from tests.model.builders import step, tokens
from tests.model.quantized_models import in_4bit, with_adapters


def ending(model: nn.Module, name: str) -> list[nn.Module]:
    found = [module for path, module in model.named_modules() if path.endswith(name)]
    assert found
    return found


def half_as_much(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * 1.5


def hook_on_the_base(model: nn.Module) -> None:
    for module in ending(model, "q_proj.base_layer"):
        module.register_forward_hook(half_as_much)


def hook_on_a_factor(model: nn.Module) -> None:
    for module in ending(model, "v_proj.lora_A.default"):
        module.register_forward_hook(half_as_much)


def parametrized(model: nn.Module) -> None:
    for module in ending(model, "mlp.up_proj"):
        parametrizations.weight_norm(module)


def lora() -> nn.Module:
    return build.with_lora(build.llama(1))


def qlora() -> nn.Module:
    return with_adapters(in_4bit(build.llama(1)))


@pytest.mark.parametrize(
    ("make", "change"),
    [(lora, hook_on_the_base), pytest.param(lora, hook_on_a_factor, marks=pytest.mark.slow), (lora, parametrized),
     (qlora, hook_on_the_base)],
    ids=lambda each: each.__name__,
)  # fmt: skip
def test_before_optimize_and_after_a_step(make: Callable[[], nn.Module], change: Callable[[nn.Module], None]) -> None:
    batch = {**tokens(), "use_cache": False}
    eager, model, later = make(), make(), make()
    change(eager)
    change(model)
    for each in (model, later):
        fxfuse.optimize(each, validate="off", remainder="eager", strict=True)
    plain = step(later, batch)["loss"]
    change(later)
    want = step(eager, batch)
    if change is not parametrized:  # (which gives the same weight)
        assert not torch.allclose(plain, want["loss"], rtol=1e-5)
    for each in (model, later):
        got = step(each, batch)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert (got[name] - value).norm() <= 2e-5 * value.norm(), name
        assert fxfuse.report(each).errors == []
        fxfuse.report(each).assert_fused("shared_input_linears")
