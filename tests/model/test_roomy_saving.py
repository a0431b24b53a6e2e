"""Adapted models whose frozen weights have room: what is saved, loaded, copied and pickled is what it always was."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fxfuse
from fxfuse.roomy_weights import home_of
from tests.model import builders as build
from tests.model.roomy import adapted, everywhere, moved, peft, right, same, trained, unmoved, values
from tests.model.test_lora_models import step

__all__ = ["everywhere"]


def test_the_state_is_contiguous_and_the_parameters_own() -> None:
    model = trained()
    state = model.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert unmoved(model)
    for name, parameter in model.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr()  # what is written to it is written to the model
    right(model)
    assert moved(model) == 0  # as long as somebody holds the state, it stays what it is
    del state
    right(model)
    assert moved(model) == 14


def test_state_read_between_forward_and_backward() -> None:
    model, batch = trained(), build.tokens()
    expected = step(model, batch)
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**batch).loss
    state = model.state_dict()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[name])
    assert state


def test_saved_by_torch(tmp_path: Path) -> None:
    model, plain = trained(), adapted()
    for folder, saved in (("ours", model), ("plain", plain)):
        (tmp_path / folder).mkdir()
        torch.save(saved.state_dict(), tmp_path / folder / "state")
    assert (tmp_path / "ours" / "state").stat().st_size == (tmp_path / "plain" / "state").stat().st_size
    fresh = adapted()
    fresh.load_state_dict(torch.load(tmp_path / "ours" / "state"))
    assert same(values(fresh), values(model))


def test_saved_by_safetensors(tmp_path: Path) -> None:
    model, plain = trained(), adapted()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "ours")
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "plain")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "plain").read_bytes()
    step(model, build.tokens())
    assert moved(model) == 14
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    safetensors.torch.save_model(plain, str(tmp_path / "model_plain"))
    assert (tmp_path / "model").read_bytes() == (tmp_path / "model_plain").read_bytes()


def test_saved_by_the_libraries(tmp_path: Path) -> None:
    model, plain = trained(), adapted()
    model.save_pretrained(tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    step(model, build.tokens())
    model.get_base_model().save_pretrained(tmp_path / "base")
    plain.get_base_model().save_pretrained(tmp_path / "plain_base")
    name = "model.safetensors"
    assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "plain_base" / name).read_bytes()
    loaded = peft.PeftModel.from_pretrained(build.llama().bfloat16(), tmp_path / "adapter", is_trainable=True,
                                            autocast_adapter_dtype=False)  # fmt: skip
    right(trained(loaded.train()))


def _load(model: nn.Module, assign: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    state = {name: (torch.randn(p.shape, generator=generator) * 0.05).to(p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=assign)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_again(assign: bool) -> None:
    model = trained()
    right(model, lambda m: _load(m, assign))
    assert moved(model) == 14


def test_unloaded() -> None:
    plain = adapted().merge_and_unload()
    model = trained()
    state = model.merge_and_unload().state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert same(state, plain.state_dict())


def test_merged_by_us() -> None:
    ours, plain = fxfuse.merge(trained()), fxfuse.merge(adapted())
    assert same(ours.state_dict(), plain.state_dict())
    assert all(p.is_contiguous() for p in ours.parameters())


def test_copies_and_pickles() -> None:
    model = trained()
    twin = copy.deepcopy(model)
    assert unmoved(twin)
    assert same(values(twin), values(model))
    right(trained(twin))
    assert moved(model) == 14
    pickled = pickle.dumps(model.base_model.model.model.layers[0].mlp.gate_proj.base_layer)
    assert b"fxfuse" not in pickled  # it can be loaded where there is no fxfuse
    linear = pickle.loads(pickled)
    assert linear.state_dict()["weight"].shape == linear.weight.shape
    assert home_of(linear.weight) is None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert same(values(torch.load(buffer, weights_only=False)), values(model))
