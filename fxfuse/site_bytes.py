"""What a site keeps for the backward: as the model wrote it, and fused. Measured on fake tensors of the real sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import earlier_runs
from ._torch import FakeTensorMode, disable_current_modes
from .canonical.facts import value_of
from .program import Program
from .regions import Region
from .site_graph import SiteGraph

REMEMBERED_ON = ("cuda",)
UNKNOWN = 64


def saved_bytes(region: Region, program: Program, wanted: tuple[str, ...]) -> tuple[int, int]:
    """Bytes beyond the region's inputs and outputs that its backward keeps: (the model's own code, the fused op)."""
    if not wanted:
        return 0, 0
    site = SiteGraph(region, {view.node for view, a in zip(region.arguments, region.program.arguments, strict=True)
                              if a.name in wanted})
    return kept_by(site, program)


def kept_by(site: SiteGraph, program: Program, *more: str) -> tuple[int, int]:
    """The same for a site that is set up already, of which ``more`` is known that its text does not say. On a GPU it is measured once
    for all runs of this build: the answer follows from the graphs and the sizes.

    Its graphs were written under a fake mode of their own, and run under a new one.
    """
    values = [value_of(node) for node in site.inputs]
    asked = _written(site, program, values, more)
    known = earlier_runs.recall("saved", *asked) if asked else None
    if known is not None:
        before, after = known
        return before, after
    fused = site.fused(program)
    with disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        inputs = [_fake(value, index in site.wanted) for index, value in enumerate(values)]
        measured = _kept(site.original, inputs), _kept(fused, inputs)
    if asked:
        earlier_runs.remember("saved", measured, *asked)
    return measured


def _written(site: SiteGraph, program: Program, values: Sequence[Any], more: Sequence[str]) -> tuple[str, ...]:
    """What is asked, as text; nothing where it is asked anew each time."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = tensors[0].device.type
    if device not in REMEMBERED_ON:
        return ()
    facts = (f"{t.dtype} {[_hint(s) for s in t.shape]} {[_hint(s) for s in t.stride()]} {t.device.type}" for t in tensors)
    autocast = f"{torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
    return (*more, str(program), site.text(), *facts, autocast)


def _fake(value: Any, differentiable: bool) -> Any:
    """A fake tensor like this one, with its symbolic sizes as they were at capture."""
    if not isinstance(value, Tensor):
        return _hint(value) if hasattr(value, "node") else value
    sizes = [_hint(s) for s in value.shape]
    strides = [_hint(s) for s in value.stride()]
    fake = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return fake.requires_grad_() if differentiable and fake.is_floating_point() else fake


def _hint(size: Any) -> int:
    """A size as it was at capture; of one that only data tells, anything."""
    known = size if isinstance(size, int) else size.node.hint
    return UNKNOWN if known is None else known


def _kept(gm: Any, inputs: list[Any]) -> int:
    """Bytes of the distinct storages that autograd saves, without those of inputs."""
    own = {t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor)}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = gm(*inputs)
    del outputs
    return sum(count for _, count in kept.values())
