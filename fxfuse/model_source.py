"""Where a model named on the command line comes from: folder, config file, hub id or transformers type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class UnknownModel(ValueError):
    """The words given name no model; the message says what would."""


def config_of(source: str) -> PretrainedConfig:
    """The configuration that ``source`` names. Nothing is downloaded beyond it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(source).expanduser()
    if path.is_file():
        return _config_in(path)
    if path.is_dir() and not (path / "config.json").exists():
        raise UnknownModel(f"{path} has no config.json; give a folder that save_pretrained wrote")
    if not path.exists() and source in CONFIG_MAPPING:
        return AutoConfig.for_model(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UnknownModel(
            f"{source!r} is no folder, config file, transformers type or reachable hub id ({_first(error)})"
        ) from error


def model_of(source: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model with its weights where there are any, else freshly drawn from its config."""
    from transformers import AutoModelForCausalLM

    config = config_of(source)
    path = Path(source).expanduser()
    weightless = path.is_file() or source == config.model_type
    if path.is_dir():
        weightless = not any(next(path.glob(pattern), None) for pattern in WEIGHTS)
    try:
        if weightless:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{source!r} does not give a causal language model ({_first(error)})") from error


def _config_in(path: Path) -> PretrainedConfig:
    """A config.json by itself."""
    from transformers import AutoConfig

    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnknownModel(f"{path} is not JSON ({_first(error)}); give a config.json") from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UnknownModel(f"{path} is not the config of a known model_type ({_first(error)})") from error


def _first(error: Exception) -> str:
    """The first line of an error; the rest is advice for other callers."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
