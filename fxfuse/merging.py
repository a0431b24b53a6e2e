"""Adapters into weights: in float32, rounded once.

A base in 4 or 8 bits is dequantized once, in float32, takes the adapters' product in float32, and is rounded to 16 bits. (Merging into
the quantized weights quantizes the sum again, and a trained adapter is mostly smaller than a step of four bits.) What an adapter
adds is the adapter library's own computation; here is only the order of the roundings.

    W' = round( dequantize(W) + sum over adapters of scale B A )
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.api import restore

QUANTIZED = ("Params4bit", "Int8Params")  # bitsandbytes' parameters


@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None = None, adapters: Iterable[str] | None = None) -> nn.Module:
    """``model``'s adapters merged into its weights: the plain model underneath, with the keys of an unquantized one.

    Works in place, as PEFT's ``merge_and_unload`` does: the adapters are gone afterwards, quantized layers are ordinary linears,
    and fxfuse is taken out (``fxfuse.optimize`` the result to train on). A model without adapters is dequantized only.
    ``dtype``: of all parameters of the result. None: where the base is quantized the dtype of the model's config, else each
    weight's own. ``adapters``: names, None for the active ones.
    Raises ``ValueError`` for what cannot be merged, before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fxfuse.merge takes a torch.nn.Module, got {type(model).__name__}")
    layers = dict(_tuner_layers(model))
    names = None if adapters is None else list(adapters)
    _check(model, layers, names)
    quantized = any(_is_quantized(parameter) for parameter in model.parameters())
    wanted = dtype or (_dtype_of(model) if quantized else None)

    restore(model)
    for layer in layers.values():
        _merge_layer(layer, names, wanted)
    plain: Any = model.unload() if layers else model  # type: ignore[operator]  # (PEFT's, by __getattr__)
    for path, module in list(plain.named_modules()):
        if _is_quantized(getattr(module, "weight", None)):
            plain.set_submodule(path, _plain_linear(module, _dequantized(module), wanted))
    if wanted is not None:
        for parameter in plain.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
    if quantized:
        _forget_quantization(plain)
    return plain


def _merge_layer(layer: Any, names: list[str] | None, wanted: torch.dtype | None) -> None:
    """Merge one adapted layer into its base layer, which then waits to be unloaded."""
    base: Any = layer.get_base_layer()
    own = {id(parameter) for parameter in base.parameters()}
    for parameter in layer.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.float()
    if _is_quantized(getattr(base, "weight", None)):
        weight, bias = _with_lora(layer, names or layer.active_adapters, _dequantized(base))
        layer.base_layer = _plain_linear(base, weight, wanted, bias)
        return
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    for parameter in base.parameters():
        parameter.data = parameter.data.float() if parameter.dtype.itemsize < 4 else parameter.data
    layer.merge(adapter_names=names)
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(wanted or dtypes[name])


def _with_lora(layer: Any, names: Iterable[str], weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in] with what each adapter of a quantized layer adds to it, bias [out]), in float32."""
    bias = layer.get_base_layer().bias
    bias = None if bias is None else bias.float()
    for name in names:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:  # (DoRA and its kin do more than add)
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
        else:
            weight = weight + layer.get_delta_weight(name).float()
        if layer.lora_bias[name]:
            bias = bias + layer.lora_B[name].bias * layer.scaling[name]
    return weight, bias


def _dequantized(linear: Any) -> Tensor:
    """The weight [out, in] of a bitsandbytes linear, in float32, not rounded to the dtype that it computes in."""
    from bitsandbytes import functional

    linear.state_dict()  # (on a CPU, evaluation leaves 4-bit weights in a layout of its own; this brings the common one back)
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        weight.quant_state.dtype = torch.float32  # (the layer is about to go; variants of LoRA dequantize it themselves)
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = weight.SCB if weight.SCB is not None else linear.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scale.to(weight.device))


def _plain_linear(base: Any, weight: Tensor, dtype: torch.dtype | None, bias: Tensor | None = None) -> nn.Linear:
    """An ordinary frozen linear with this weight, in the place of ``base``."""
    with torch.device("meta"):
        linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter((base.bias if bias is None else bias).to(dtype), requires_grad=False)
    return linear.train(base.training)


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers by path, outermost only: one around another merges what is inside."""
    if not any(hasattr(module, "base_layer") for module in model.modules()):
        return  # (most models that are only dequantized; and PEFT need not be there)
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            yield path, module


def _check(model: nn.Module, layers: dict[str, Any], names: list[str] | None) -> None:
    """Everything that can be known to be wrong before anything is changed."""
    if hasattr(model, "peft_config") and not layers:
        raise ValueError("these adapters add nothing to weights (prompts or prefixes): keep the model as it is")
    if layers and not hasattr(model, "unload"):
        raise ValueError(
            "the adapters were not added by PEFT's get_peft_model or PeftModel.from_pretrained; load them with one of these, "
            "and merge that"
        )
    for path, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"{path} is on the meta device (offloaded to disk?); load the whole model onto devices, then merge")
    known = {name for layer in layers.values() for name in _adapter_names(layer)}
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no adapter {name!r} to merge; there are {', '.join(map(repr, sorted(known))) or 'none'}")
    for path, layer in layers.items():
        reason = _why_not(layer, names)
        if reason:
            raise ValueError(f"{path} cannot be merged: {reason}")
    _check_ties(model, layers)


def _why_not(layer: Any, names: list[str] | None) -> str:
    """What stands against merging these adapters into this layer, or nothing."""
    names = names or layer.active_adapters
    if layer.merged:
        return (
            f"{', '.join(layer.merged_adapters)} is merged into it already, rounded to the weight's dtype; unmerge_adapter() first, "
            "or load base and adapter anew"
        )
    base = layer.get_base_layer()
    own = {id(parameter) for parameter in base.parameters()}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in own and not torch.isfinite(parameter).all():
            return f"{name} is not finite: the adapter is broken (a diverged training?)"
    weight = getattr(base, "weight", None)
    if _is_quantized(weight):
        if not hasattr(layer, "lora_A"):
            return f"{type(layer).__name__} is on a quantized layer; only LoRA and its variants are merged there"
        if len(names) > 1 and any(name in layer.lora_variant for name in names):
            return f"adapters that rescale the weight (DoRA and its kin) are merged one at a time, not {', '.join(names)} together"
    elif weight is not None and (not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor)):
        return f"its weight is {type(weight).__name__} of {weight.dtype}, a quantized format that fxfuse.merge does not know"
    return ""


def _check_ties(model: nn.Module, layers: dict[str, Any]) -> None:
    """An adapter on one of two tied weights: merged, it would change the other one too."""
    users: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        for parameter in layer.get_base_layer().parameters():
            others = [user for user in users[id(parameter)] if not user.startswith(f"{path}.")]
            if others:
                raise ValueError(
                    f"{path} shares its weight with {', '.join(others)}: merging would change both. Before adding the adapter, give it "
                    "a weight of its own (module.weight = nn.Parameter(module.weight.clone()), config.tie_word_embeddings = False)"
                )


def _adapter_names(layer: Any) -> set[str]:
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


def _is_quantized(parameter: object) -> bool:
    return type(parameter).__name__ in QUANTIZED


def _dtype_of(model: nn.Module) -> torch.dtype:
    """What a quantized model's weights were before: its config says, or else the 4-bit weights do."""
    config = getattr(model, "config", None)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    recorded = next((state.dtype for state in states if state is not None), torch.float16)
    return dtype if isinstance(dtype, torch.dtype) else recorded


def _forget_quantization(model: Any) -> None:
    """Marks that transformers' loader leaves, so that the model saves and loads as an ordinary one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
