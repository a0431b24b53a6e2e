"""What a trace depends on beside the graph and its inputs: this build, settings of torch, the devices, modes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import BuiltinFunctionType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import Any

import torch

from .._torch import (
    FakeTensorMode,
    dispatch_modes,
    dynamo_config,
    functorch_config,
    library_impls,
    shape_config,
)
from ..earlier_runs import build
from ..functions import is_as_written
from .asked import Unknown

_PREFIXES = ("TORCH", "PYTORCH", "FXFUSE_", "CUBLAS", "CUDNN", "NVIDIA_", "AOT_")
_OTHERS = ("TORCHELASTIC_",)  # who started the process, anew each time
_FOLDERS = ("_DIR", "_HOME", "_PATH")  # where things lie says nothing about what they are
# What runs behind an operator of a trace, and what torch.vmap loads late; an implementation for another key decides what is traced.
_BEHIND = ("Meta", "CPU", "CUDA", "MPS", "XPU", "FuncTorchBatched")
_UNTRACED = frozenset(["backward"])  # which profilers and trainers put a clock around; a trace has its own derivatives
_OF_C = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, type)


def conditions(devices: Iterable[torch.device]) -> str:
    """A text that differs whenever one of them does. Unknown under modes of the caller's, which could see the trace."""
    foreign = [type(mode).__name__ for mode in dispatch_modes() if not isinstance(mode, FakeTensorMode)]
    if foreign or torch._C._len_torch_function_stack() > 0:
        raise Unknown(f"a trace under {', '.join(foreign) or 'a torch function mode'}")
    if not is_as_written():
        raise Unknown("functions that were added or replaced while this runs, and no source tells of")
    impls = sorted(name for name in library_impls if name.startswith(("aten/", "prims/", "_/")))
    replaced = [name for name in impls if not name.startswith("prims/") and name.split("/")[-1] not in _BEHIND]
    if replaced:
        raise Unknown(f"operators of torch's whose derivative or composition somebody replaced: {', '.join(replaced)}")
    methods = _methods_of_others()
    if methods:
        raise Unknown(f"methods of tensors that somebody added or replaced: {', '.join(methods)}")
    backends = torch.backends
    facts = [
        build(), torch.version.git_version, torch.version.cuda, torch.version.hip,
        *sorted({_device(device) for device in devices}),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(), torch.get_default_dtype(),
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_float32_matmul_precision(),
        backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order(), backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        backends.cuda.matmul.allow_tf32, backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32,
        backends.mkldnn.enabled, backends.cudnn.version(),
        _settings(functorch_config), _settings(dynamo_config), _settings(shape_config),
        impls,
        sorted(item for item in os.environ.items() if _matters(item[0])),
    ]  # fmt: skip
    return "\n".join(map(str, facts))


def _methods_of_others() -> list[str]:
    """What a graph calls by a name alone, or a function of torch's calls, and is not torch's."""
    read = {name: getattr(found, "fget", found) for name, found in vars(torch.Tensor).items() if name not in _UNTRACED}
    return [name for name, found in read.items() if callable(found) and not isinstance(found, _OF_C)
            and not getattr(getattr(found, "__code__", None), "co_filename", "").startswith(torch.__path__[0])]


def _matters(variable: str) -> bool:
    return variable.startswith(_PREFIXES) and not variable.startswith(_OTHERS) and not variable.endswith(_FOLDERS)


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    known = torch.cuda.get_device_properties(device)
    return f"{device} {known.name} {known.major}.{known.minor} {known.total_memory} {known.multi_processor_count}"


def _settings(config: ModuleType) -> list[tuple[str, str]]:
    """A module of torch's settings, as it stands now."""
    return sorted((name, _described(value)) for name, value in config.get_serializable_config_copy().items())  # type: ignore[attr-defined]


def _described(value: Any) -> str:
    """The same text in every process. Unknown where an object has no other name than its address."""
    if isinstance(value, (set, frozenset)):
        return f"set{sorted(map(_described, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}{list(map(_described, value))}"
    if isinstance(value, dict):
        return f"dict{[(_described(key), _described(item)) for key, item in value.items()]}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    if " at 0x" in text:
        raise Unknown(f"a setting that is {text}")
    return text
