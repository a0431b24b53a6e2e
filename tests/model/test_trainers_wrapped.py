"""Models that somebody else holds already: refused, or declined by name, with what to call when. Never wrong in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import PassThrough, differences, step, tokens

OPTIONS = {"validate": "off", "remainder": "eager"}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Loss and gradients equal up to float32 rounding."""
    assert ours.keys() == theirs.keys()
    return all((ours[name] - want).norm() <= 2e-5 * want.norm() for name, want in theirs.items())


@pytest.mark.usefixtures("group")
class TestWrappers:
    def test_data_parallel(self) -> None:
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel; call fxfuse\.optimize\(model\) first, then wrap"):
            fxfuse.optimize(nn.parallel.DistributedDataParallel(build.llama()))

    def test_sharded(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match=r"sharded by fully_shard; call fxfuse\.optimize\(model\) before"):
            fxfuse.optimize(fully_shard(build.llama(), mesh=mesh))
        with pytest.raises(ValueError, match="sharded by FullyShardedDataParallel"):
            fxfuse.optimize(FullyShardedDataParallel(build.llama(), device_id=torch.device("cpu")))


def test_a_compiled_model() -> None:
    with pytest.raises(ValueError, match=r"result of torch\.compile\(model\); give fxfuse\.optimize the model itself"):
        fxfuse.optimize(torch.compile(build.llama()))


DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


class TestHooksOfDeviceMaps:
    """accelerate's hooks hold the forwards of a model over several devices, as transformers loads it: it runs as it is, by name."""

    @pytest.mark.parametrize("first", ["optimized", "dispatched"])
    @pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
    def test_a_dispatched_model(self, elsewhere: str, first: str, tmp_path: Path) -> None:
        from accelerate import dispatch_model

        model, eager = build.llama(), build.llama()
        if first == "optimized":
            fxfuse.optimize(model, **OPTIONS)
        for each in (model, eager):
            folder = str(tmp_path / str(id(each)))
            dispatch_model(each, {**DEVICES, "model.layers.1": elsewhere}, main_device="cpu", offload_dir=folder, force_hooks=True)
        fxfuse.optimize(model, **OPTIONS)
        assert close(step(model, tokens()), step(eager, tokens()))
        notes = fxfuse.report(model).notes
        assert any("Layer" in note or "layers" in note for note in notes), notes
        assert any("accelerate's hooks hold its forward (a device_map over several devices" in note for note in notes), notes

    def test_weights_that_are_not_there(self) -> None:
        from accelerate import cpu_offload

        model = cpu_offload(build.llama(), torch.device("cpu"))
        fxfuse.optimize(model, **OPTIONS)
        assert "left as it is" in " ".join(fxfuse.report(model).notes)
        with torch.no_grad():
            assert torch.equal(model(**tokens())["loss"], build.llama()(**tokens())["loss"])


@pytest.fixture
def patched_back() -> Iterator[None]:
    """Liger exchanges names of transformers' module and keeps no note of what they were, also where it is asked for one model only."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


class TestOtherPatchers:
    @pytest.mark.usefixtures("patched_back")
    def test_liger(self) -> None:
        liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        model = build.llama()
        liger._apply_liger_kernel_to_instance(model)
        fxfuse.optimize(model, **OPTIONS)
        notes = " ".join(fxfuse.report(model).notes)
        assert "layers.* is left as it is" in notes
        assert "liger_kernel" in notes

    def test_a_patched_class(self) -> None:
        """As Unsloth does it: forwards of classes, in place."""
        model = build.llama()

        class Patched(type(model.model.layers[0])):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        Patched.forward.__module__ = "unsloth.models.llama"
        for layer in model.model.layers:
            layer.__class__ = Patched
        fxfuse.optimize(model, **OPTIONS)
        assert "itself runs kernels of unsloth.models.llama; load the model without them" in " ".join(fxfuse.report(model).notes)

    def test_a_trainers_own_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A forward set on the model later (TRL's fused head): it is run as it is, around blocks that stay fused."""
        monkeypatch.setattr("fxfuse.api._backend", lambda *options: PassThrough("head"))
        model, eager = fxfuse.optimize(build.llama()), build.llama()

        def twice(self: nn.Module, forward: Any, **inputs: Any) -> dict[str, torch.Tensor]:
            return {"loss": 2 * forward(**inputs)["loss"]}

        for each in (model, eager):
            each.forward = MethodType(lambda self, forward=each.forward, **inputs: twice(self, forward, **inputs), each)
        assert differences(step(model, tokens()), step(eager, tokens())) == []
        notes = fxfuse.report(model).notes
        assert any(f"its forward is that of {__name__}; its blocks run fused" in note for note in notes), notes


class TestMixedAdapters:
    @pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
    def test_adapters_of_different_dtypes_at_once(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        from peft import LoraConfig

        def make() -> nn.Module:
            model = build.with_lora(build.llama(1))
            torch.manual_seed(3)
            model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
            for name, parameter in model.named_parameters():
                for adapter, dtype in zip(("default", "second"), dtypes, strict=True):
                    if f".{adapter}." in name:
                        parameter.data = parameter.data.to(dtype)
            model.base_model.set_adapter(["default", "second"])
            return model

        model, eager = fxfuse.optimize(make(), **OPTIONS), make()
        ours, theirs = step(model, tokens()), step(eager, tokens())
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            precision = 2e-5 if want.dtype == torch.float32 else 2**-7
            # (a bfloat16 adapter's rounding is in everything behind it)
            assert (ours[name].double() - want.double()).norm() <= max(precision, 2**-9) * want.double().norm(), name
        assert fxfuse.report(model).errors == []

    def test_adapters_on_layers_that_are_no_linears(self) -> None:
        from peft import LoraConfig, get_peft_model

        def make() -> nn.Module:
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules=["embed_tokens", "c_attn", "wte"], init_lora_weights=False, fan_in_fan_out=True)
            return get_peft_model(build.gpt2(1), config)

        model, eager = fxfuse.optimize(make(), **OPTIONS), make()
        assert close(step(model, tokens()), step(eager, tokens()))
