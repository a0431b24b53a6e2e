"""What must be left alone, and the sentence that says why and what to do instead.

Whole-model wrappers raise (the caller gave us the wrong object); a single module that somebody else has
taken over is declined: it runs as it is, and the report says so.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from fxfuse._torch import (
    OptimizedModule,
    functorch_level,
    in_foreign_dispatch_mode,
    is_traceable_wrapper_subclass,
)
from fxfuse.capture.find import all_parameters

# Libraries that replace forwards by kernels of their own.
KERNEL_LIBRARIES = ("liger_kernel", "unsloth", "unsloth_zoo", "kernels")
# What mixed-precision training puts around a model's forward: both call it, and both are traced with it.
AROUND_FORWARD = ("torch.amp.autocast_mode", "accelerate.utils.operations")
PARTITIONED = ("its weights are partitioned by DeepSpeed's ZeRO-3, whose hooks gather them in the middle of what would be one graph; "
               "ZeRO-2, FSDP2 and DDP run fused")  # fmt: skip
ON_SEVERAL_DEVICES = (
    "accelerate's hooks hold its forward (a device_map over several devices, or weights offloaded to CPU or disk); load the model "
    "onto one device, in one process for each (DDP), or shard it with FSDP2 where it does not fit"
)


def reject_wrapper(model: object) -> None:
    """Raise for objects that are no model, or a model inside a wrapper that must come later."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fxfuse.optimize takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise ValueError(
            "this is the result of torch.compile(model); give fxfuse.optimize the model itself, and do not "
            "compile it as well (for another backend underneath: fxfuse.optimize(model, remainder='inductor'))"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"the model is already wrapped in {type(model).__name__}; call fxfuse.optimize(model) first, then wrap it"
        )
    if type(model).__module__.startswith("deepspeed."):
        raise ValueError("the model is already in DeepSpeed's engine; call fxfuse.optimize(model) before deepspeed.initialize")
    sharded = _sharded_by(model)
    if sharded:
        raise ValueError(
            f"the model is already sharded by {sharded}; call fxfuse.optimize(model) before sharding it"
        )


def _sharded_by(model: nn.Module) -> str | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed import fsdp

    if isinstance(model, fsdp.FullyShardedDataParallel):
        return "FullyShardedDataParallel"
    return "fully_shard" if any(isinstance(module, fsdp.FSDPModule) for module in model.modules()) else None


def reason_to_decline_all(model: nn.Module) -> str | None:
    """Why nothing of this model should be touched, or None."""
    if getattr(model, "use_kernels", False) is True:
        return "its layers run kernels of the hub (use_kernels); load it with use_kernels=False for fxfuse.optimize"
    return None


def reason_to_decline(module: nn.Module, role: str = "") -> str | None:
    """Why this block, leaf or head must stay as it is, or None. Whose forward a head has is asked at each call (``replaced_by``)."""
    return _already_compiled(module) or _foreign_forward(module, role) or partitioned(module) or _foreign_parameters(module)


def _already_compiled(module: nn.Module) -> str | None:
    if module._compiled_call_impl is not None:
        return "it is already compiled (Module.compile); call fxfuse.optimize on the uncompiled model instead"
    return None


def _foreign_forward(module: nn.Module, role: str) -> str | None:
    """A forward replaced by another library, on the instance or in the class, here or below."""
    if "forward" in vars(module):
        if on_several_devices(module):
            return ON_SEVERAL_DEVICES
        if role != "head":
            owner = replaced_by(module) or _owner(vars(module)["forward"])
            return f"its forward was replaced on the instance by {owner}; call fxfuse.optimize before whatever does that"
    for name, part in module.named_modules():
        owner = _owner(part.forward)
        if owner.split(".")[0] in KERNEL_LIBRARIES:
            where = name or "itself"
            return f"{where} runs kernels of {owner}; load the model without them (use_kernels, use_liger_kernel...)"
    return None


def _foreign_parameters(module: nn.Module) -> str | None:
    for name, tensor in all_parameters(module):
        if tensor.device.type == "meta":
            return f"{name} is on the meta device; load the weights before fxfuse.optimize"
        if is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__
            if kind == "DTensor":
                return f"{name} is a DTensor (tensor parallel); fxfuse works on the plain tensors of DDP and FSDP"
            return f"{name} is a {kind}, a tensor subclass whose storage fxfuse does not know"
    return None


def on_several_devices(module: nn.Module) -> bool:
    """Whether accelerate moves this module's inputs or weights between devices: its hook holds the instance's forward."""
    return "_hf_hook" in vars(module)


def partitioned(module: nn.Module) -> str:
    """Why a module whose parameters ZeRO-3 has taken apart is left alone, or nothing. (A leaf's are gathered around its call.)"""
    if "deepspeed" not in sys.modules or not any(module.children()):
        return ""
    return PARTITIONED if hasattr(next(module.parameters(), None), "ds_id") else ""


def transformed() -> str:
    """Which of torch's transforms of functions is active, that cannot see into what is captured; or nothing."""
    if functorch_level() is not None:
        return "a torch.func transform was active"
    return "forward-mode differentiation was active" if forward_ad._current_level >= 0 else ""


def observed() -> str:
    """Who wants to see every operation now, so that nothing captured runs: a transform, somebody's dispatch mode; or nothing."""
    return transformed() or ("a TorchDispatchMode was active" if in_foreign_dispatch_mode() else "")


def _owner(function: object) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)


def replaced_by(module: nn.Module) -> str:
    """The library whose forward stands in place of this module's own, or nothing.

    Autocast and the conversion of outputs that trainers put around a forward are looked through. Anything else may call
    the module's parts in its own way (a trainer's own loss head, say): such a forward is run, not traced.
    """
    own = type(module).forward
    forward: Any = vars(module).get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if function is own:
            return ""
        maker = function.func if isinstance(function, functools.partial) else function
        owner = getattr(maker, "__globals__", {}).get("__name__") or type(maker).__module__
        if owner not in AROUND_FORWARD:
            return str(owner)
        forward = getattr(function, "__wrapped__", None)
    return ""
