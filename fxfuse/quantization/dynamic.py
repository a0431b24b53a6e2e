"""``fxfuse.quantize``: measure every linear, keep the few that matter in 16 bits, store the others in 4."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conversion import convert
from .linears import find_linears
from .selection import Selection, bytes_of, select
from .sensitivity import Batch, divergence, measure, predict

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

_log = logging.getLogger("fxfuse")
_KEPT_ON = "_fxfuse_selection"


def quantize(model: PreTrainedModel, calibration: Iterable[Any], *, budget: float | str = 0.1,
             quantization_config: BitsAndBytesConfig | None = None) -> PreTrainedModel:  # fmt: skip
    """Store the model's linears in 4 bits, in place, except those whose rounding the predictions feel most.

    calibration: batches as the model takes them: token ids [batch, length], or mappings with "input_ids" and what else
        forward takes. A few thousand tokens of the kind of text that matters.
    budget: bytes for the weights of these linears: an int, a size such as "4.5GiB", or a float, the share of extra bytes over all of
        them in 4 bits (0.1: a tenth more).
    quantization_config: a ``BitsAndBytesConfig`` with ``load_in_4bit``; NF4 with nested statistics unless given. Its skip list is kept,
        and gets the linears that stay.

    Returns the same model, as transformers' ``from_pretrained(quantization_config=...)`` would have made it: ``save_pretrained``
    and ``from_pretrained`` do the rest. ``selection_of(model)`` tells what was kept and why. It costs a forward of the
    calibration for every linear. The output head, embeddings and expert weights that are no linears stay as they
    are, as in transformers.

    Raises TypeError for what is no transformers model or no batch; ValueError for a model that is quantized, fused or adapted already,
    for a budget too small, and for an empty calibration.
    """
    config = _config(model, quantization_config)
    _check(model)
    linears = find_linears(model, config)
    if not linears:
        raise ValueError("the model has no linear that transformers would quantize; nothing was changed")
    nested = bool(config.bnb_4bit_use_double_quant)
    allowed = bytes_of(budget, linears, nested)
    batches = [_batch(each, model.device) for each in calibration]
    if not batches:
        raise ValueError("calibration is empty; give a few batches of token ids")
    training = model.training
    model.eval()
    try:
        predictions = predict(model, batches)
        measured = measure(model, linears, batches, config, predictions)
        selection = select(linears, measured, allowed, nested)
        selection.uniform = divergence(model, linears, batches, config, predictions)
        going = [each for each in linears if each.name not in set(selection.kept)]
        selection.selected = divergence(model, going, batches, config, predictions)
    finally:
        model.train(training)
    convert(model, linears, selection.kept, config)
    setattr(model, _KEPT_ON, selection)
    _log.info("%s", selection)
    return model


def selection_of(model: PreTrainedModel) -> Selection:
    """What ``quantize`` decided for this model. ValueError if it was not quantized here."""
    found = getattr(model, _KEPT_ON, None)
    if found is None:
        raise ValueError("fxfuse.quantize has not been called on this model in this process")
    return found


def _config(model: PreTrainedModel, given: BitsAndBytesConfig | None) -> BitsAndBytesConfig:
    try:
        from transformers import BitsAndBytesConfig, PreTrainedModel
    except ImportError as error:
        raise ImportError("fxfuse.quantize makes transformers models of bitsandbytes linears; it needs both installed") from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"quantize takes a transformers model; got {type(model).__name__}")
    if given is None:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=model.dtype)  # fmt: skip
    if not isinstance(given, BitsAndBytesConfig) or not given.load_in_4bit:
        raise TypeError("quantization_config takes a BitsAndBytesConfig with load_in_4bit=True")
    return BitsAndBytesConfig(**{name: value for name, value in given.to_dict().items() if name != "quant_method"})


def _check(model: PreTrainedModel) -> None:
    from ..capture.install import find_installation

    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantized already; load it in 16 bits (its quantization_config left out) and quantize that")
    if find_installation(model) is not None:
        raise ValueError("the model is fused already; quantize it first, or call fxfuse.restore(model), then quantize, then optimize")
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters; quantize the base first, then add them")
    strange = next((name for name, parameter in model.named_parameters() if parameter.device.type == "meta"), None)
    if strange is not None:
        raise ValueError(f"{strange} has no values (it is on the meta device, offloaded or not loaded); load the model whole first")


def _batch(given: Any, device: torch.device) -> Batch:
    if isinstance(given, Tensor):
        given = {"input_ids": given}
    if not hasattr(given, "keys") or not isinstance(given.get("input_ids"), Tensor) or given["input_ids"].ndim != 2:
        raise TypeError("a batch of the calibration is token ids [batch, length], or a mapping with such 'input_ids'; "
                        f"got {type(given).__name__} (text has to be tokenized first)")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
