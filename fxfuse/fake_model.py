"""A model without memory: every parameter a fake tensor on the CPU, made from a config or in the image of a model.

Fake tensors have shapes, dtypes and strides but no data. The meta device would do, but mask code of transformers
and quantized layers fail there; fake CUDA tensors abort attention in a torch built for the CPU.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxfuse._torch import FakeTensorMode
from fxfuse.errors import UnsupportedGraph

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS, LENGTH = 1, 1024
# In this order: what a model is usually trained as comes first, where it can be several things.
AUTO_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def fake_mode() -> Any:
    """A mode under which tensors are fake and our dispatchers capture all the same."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Imagining(FakeTensorMode):
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            """Compilation may go on under this mode: it is ours, not a tracer of somebody else's."""
            return True

    return Imagining(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def model_from_config(config: PretrainedConfig) -> nn.Module:
    """The model that the config describes, in the dtype it names. Call it under ``fake_mode``."""
    import transformers
    from transformers.initialization import no_init_weights

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with no_init_weights():  # nothing to fill; and some fillings look at what they filled
        for name in config.architectures or ():
            if hasattr(transformers, name):
                return _tied(getattr(transformers, name)._from_config(config, dtype=dtype))
        for name in AUTO_CLASSES:
            auto = getattr(transformers, name)
            if type(config) in auto._model_mapping:
                return _tied(auto.from_config(config, dtype=dtype))
    raise UnsupportedGraph(
        f"transformers has no model class for {type(config).__name__}; pass a torch.nn.Module instead"
    )


def _tied(model: Any) -> nn.Module:
    """Ties come with the initialization that is left out here."""
    model.tie_weights()
    return model


def image_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake and on the CPU. Call it under ``fake_mode``.

    Ties between parameters are kept; the model itself is only read.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = _image_of_tensor(tensor, memo)
    return copy.deepcopy(model, memo)


def _image_of_tensor(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """The fake tensor for a tensor. A parameter that carries others with it (the scales of a quantized weight) carries their images."""
    if type(tensor) is not torch.Tensor and not isinstance(tensor, nn.Parameter):
        raise UnsupportedGraph(
            f"a tensor of type {type(tensor).__name__} has no image without data; explain the config instead"
        )
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    if type(tensor) not in (nn.Parameter, torch.Tensor):
        carried = {name: fact for name, fact in vars(tensor).items() if not isinstance(fact, nn.Module)}
        for part in _tensors_in(carried, set()):
            if id(part) not in memo:
                memo[id(part)] = _image_of_tensor(part, memo)
        vars(fake).update(copy.deepcopy(carried, memo))
    return fake


def _tensors_in(facts: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors in containers and in the attributes of plain objects."""
    if id(facts) in seen or isinstance(facts, type):
        return
    seen.add(id(facts))
    if isinstance(facts, torch.Tensor):
        yield facts
        return
    if not isinstance(facts, (dict, list, tuple)):
        facts = getattr(facts, "__dict__", {})
    for part in facts.values() if isinstance(facts, dict) else facts:
        yield from _tensors_in(part, seen)


@contextmanager
def unpacked() -> Iterator[None]:
    """transformers looks at position ids for several sequences in a row, and builds a mask where it cannot see: here there is one."""
    masking = sys.modules.get("transformers.masking_utils")
    original = getattr(masking, "find_packed_sequence_indices", None)
    if masking is None or original is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda position_ids: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = original  # type: ignore[attr-defined]


def usual_inputs(model: nn.Module, rows: int = 0, length: int = 0) -> dict[str, torch.Tensor]:
    """A training batch such as the model's config implies; of ``rows`` and ``length`` where given. Call it under ``fake_mode``."""
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise TypeError(
            f"fxfuse.explain does not know what {type(model).__name__} takes; give its inputs by name, "
            "as in fxfuse.explain(model, x=torch.empty(8, 128))"
        )
    rows = rows or ROWS
    if name == "input_ids":
        ids = torch.zeros(rows, length or _length(config.get_text_config()), dtype=torch.long)
        return {name: ids.clone() for name in (name, "decoder_input_ids", "labels") if _takes(model, name)}
    if name == "pixel_values":
        sides = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return {"pixel_values": torch.zeros(rows, config.num_channels, *sides, dtype=model.dtype)}
    if name == "input_features":
        frames = 2 * config.max_source_positions
        labels = torch.zeros(rows, length or 64, dtype=torch.long)
        features = torch.zeros(rows, config.num_mel_bins, frames, dtype=model.dtype)
        return {"input_features": features, "decoder_input_ids": labels.clone(), "labels": labels}
    raise TypeError(f"fxfuse.explain does not know the shape of {name!r}; give the model's inputs by name")


def _length(config: PretrainedConfig) -> int:
    return min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
