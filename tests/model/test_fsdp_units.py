"""Units of FSDP2 as accelerate's plugin makes them: the head is one of its own, and its loss is fused all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.as_accelerate_shards import as_accelerate_shards
from tests.model.builders import tokens
from tests.model.test_fsdp_blocks import OPTIONS, gradients


def events(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **batch: Any) -> list[tuple[str, str]]:
    """What FSDP2 does with each of its units in a step, in order: gathers it, gives it back, reduces its gradients."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    seen: list[tuple[str, str]] = []
    with monkeypatch.context() as patch:
        for name in ("_to_unsharded", "_to_sharded", "post_backward"):
            original = getattr(FSDPParamGroup, name)

            def noted(self: Any, *args: Any, name: str = name, original: Callable = original, **kwargs: Any) -> Any:
                seen.append((name, self._module_fqn))
                return original(self, *args, **kwargs)

            patch.setattr(FSDPParamGroup, name, noted)
        model(**batch)["loss"].backward()
    return seen


UNITS = {
    "full": lambda: build.llama(2),
    "tied": lambda: build.llama(1, tie_word_embeddings=True),
    "lora": lambda: build.with_lora(build.llama(1)),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["full", "lora", pytest.param("tied", marks=pytest.mark.slow)])
def test_units_as_accelerate_makes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding apart, the last norm with the head (under PEFT the head alone): the loss is fused, units come and go as in eager."""
    model, eager = fxfuse.optimize(UNITS[name](), **OPTIONS), UNITS[name]()
    ours, theirs = (as_accelerate_shards(each) for each in (model, eager))
    for seed in range(2):
        done, expected = (events(each, monkeypatch, **tokens(seed=seed)) for each in (ours, theirs))
        assert sorted(done) == sorted(expected)
        if name != "lora":  # (there the head is given back at the end)
            assert done == expected
        want = gradients(eager)
        assert gradients(model).keys() == want.keys()
        for path, value in gradients(model).items():
            assert (value - want[path]).norm() <= 2e-5 * want[path].norm(), path
        for each in (model, eager):
            each.zero_grad(set_to_none=True)
    report = fxfuse.report(model)
    assert report.count("linear_loss") == 1
    assert report.count("rope") == 2 * len(model.get_decoder().layers)
    assert not report.errors
    assert not [note for note in report.notes if "eager" in note or "FSDP2" in note]


@pytest.mark.usefixtures("group")
def test_units_in_bfloat16_cast_what_they_are_given() -> None:
    """Mixed precision of FSDP2 casts what enters and leaves each unit; a norm is computed in what it was cast to."""
    model, eager = fxfuse.optimize(build.llama(1), **OPTIONS), build.llama(1)
    ours, theirs = (as_accelerate_shards(each, torch.bfloat16) for each in (model, eager))
    (mine, its), exact = (each(**tokens()) for each in (ours, theirs)), build.llama(1)(**tokens())
    assert mine.loss.dtype == its.loss.dtype == torch.bfloat16
    assert mine.logits.dtype == its.logits.dtype == torch.bfloat16
    assert abs(mine.loss - exact.loss) <= abs(its.loss - exact.loss) + 2**-8 * exact.loss
    mine.loss.backward()
    its.loss.backward()
    want = gradients(eager)
    for path, value in gradients(model).items():
        assert (value - want[path]).norm() <= 2**-5 * want[path].norm(), path
    fxfuse.report(model).assert_fused("linear_loss")


@pytest.mark.usefixtures("group")
def test_hooks_are_where_they_were_after_a_step_and_after_an_error() -> None:
    model = as_accelerate_shards(fxfuse.optimize(build.llama(1), **OPTIONS))
    hooks = [model.lm_head._forward_pre_hooks, model.lm_head._forward_hooks, model._forward_hooks]
    before = [dict(each) for each in hooks]
    model(**tokens())["loss"].backward()
    assert [dict(each) for each in hooks] == before
    with pytest.raises((IndexError, RuntimeError)):
        model(**{**tokens(), "labels": torch.full((2, 12), build.VOCABULARY + 5)})["loss"].backward()
    assert [dict(each) for each in hooks] == before


@pytest.mark.usefixtures("group")
def test_a_head_that_gives_its_weight_back_is_named() -> None:
    """Its weight is not there when the loss is computed, nor when logits are asked for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
        return fully_shard(model, mesh=mesh)

    model, eager = fxfuse.optimize(build.llama(1), **OPTIONS), build.llama(1)
    for each in map(made, (model, eager)):
        each(**tokens())["loss"].backward()
    want = gradients(eager)
    for path, value in gradients(model).items():
        assert (value - want[path]).norm() <= 2e-5 * want[path].norm(), path
    report = fxfuse.report(model)
    assert report.count("cross_entropy") == 1
    assert any("lm_head is a unit of FSDP2 by itself" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.usefixtures("group")
def test_checkpoints_of_torch_around_layers() -> None:
    """As accelerate's activation_checkpointing puts them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, eager = fxfuse.optimize(build.llama(1), **OPTIONS), build.llama(1)
    for each in (model, eager):
        as_accelerate_shards(each)
        for number, layer in enumerate(each.model.layers):
            each.model.layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
        each(**tokens())["loss"].backward()
    want = gradients(eager)
    for path, value in gradients(model).items():
        assert (value - want[path]).norm() <= 2e-5 * want[path].norm(), path
    fxfuse.report(model).assert_fused("linear_loss")
