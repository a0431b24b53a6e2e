"""Which modules are captured: blocks, the backbones that call them, and the norms outside both."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Found:
    """Module paths, from the model down.

    ``head`` is the module around the backbones; ``stack`` the one whose own forward calls the blocks. A model
    has one of them, or none: the bare body of a transformers model builds caches and masks, which traced are
    worse than run (an explicit mask costs attention its causal path). A part of the head that joins several
    bodies (pictures and text, say) is a backbone as a whole: it decides by values, and what it makes and nobody
    reads has no gradient in eager, where a graph cut in two would give it zeros.
    """

    blocks: dict[str, nn.Module] = field(default_factory=dict)
    backbones: dict[str, nn.Module] = field(default_factory=dict)
    leaves: dict[str, nn.Module] = field(default_factory=dict)
    head: nn.Module | None = None
    stack: nn.Module | None = None


def find(model: nn.Module) -> Found:
    """Sort the modules of ``model`` (adapter wrappers looked through for the head)."""
    blocks = find_blocks(model)
    top = without_adapter(model)
    callers = callers_of(model, blocks)
    below = {path: caller for path, caller in callers.items() if caller is not top and caller is not model}
    backbones = _joined(model, top, below)
    leaves = find_leaves(model, blocks)
    if not blocks or len(below) == len(callers):
        return Found(blocks, backbones, leaves, head=top if backbones else None)
    marked = _checkpointing_layer_class()
    plain = marked is None or not any(isinstance(block, marked) for block in blocks.values())
    return Found(blocks, backbones, leaves, stack=top if plain and top is model and not backbones else None)


def without_adapter(model: nn.Module) -> nn.Module:
    """The model that an adapter library wrapped (PEFT's ``get_base_model``), or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that repeat, by path: checkpointable layers as transformers marks them, else stacks."""
    marked = _checkpointing_layer_class()
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if _inside(path, blocks):
            continue
        if marked is not None and isinstance(module, marked):
            blocks[path] = module
        elif isinstance(module, (nn.ModuleList, nn.Sequential)) and is_stack(module):
            blocks.update({_join(path, name): child for name, child in module.named_children()})
    return blocks


def is_stack(container: nn.ModuleList | nn.Sequential) -> bool:
    """Whether the members are copies of one design: one composite class, and at least two of equal shape.

    Stages of a hierarchical model are of one class too, but of different widths: their own stacks are blocks.
    """
    members = list(container)
    if not members or len({type(member) for member in members}) > 1 or not any(members[0].children()):
        return False
    if isinstance(members[0], CONTAINERS):
        return False
    if len(members) == 1:
        return isinstance(container, nn.ModuleList)
    return max(Counter(shape_signature(member) for member in members).values()) > 1


def shape_signature(module: nn.Module) -> tuple:
    """Names and shapes of the parameters: equal for copies of one design."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def kind_of(module: nn.Module) -> tuple:
    """What decides whether two modules can share a graph, as far as can be seen without tracing."""
    return type(module), tuple((name, type(child)) for name, child in module.named_modules())


def callers_of(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The lowest modules with a forward of their own that hold the blocks."""
    callers: dict[str, nn.Module] = {}
    for path in blocks:
        while path:
            path = path.rpartition(".")[0]
            module = model.get_submodule(path)
            if not isinstance(module, CONTAINERS) or not path:
                callers[path] = module
                break
    return callers


def _joined(model: nn.Module, top: nn.Module, callers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The callers by path, those that lie in one child of ``top`` replaced by that child where they are several."""
    start = next((path for path, module in model.named_modules() if module is top), "")
    depth = len(start.split(".")) + 1 if start else 1
    children = Counter(".".join(path.split(".")[:depth]) for path in callers)
    backbones: dict[str, nn.Module] = {}
    for path, caller in callers.items():
        child = ".".join(path.split(".")[:depth])
        joins = children[child] > 1 and not isinstance(model.get_submodule(child), CONTAINERS)
        backbones[child if joins else path] = model.get_submodule(child) if joins else caller
    return backbones


def find_leaves(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Norms outside blocks, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if not _inside(path, blocks) and is_norm_like(module)
    }


def is_norm_like(module: nn.Module) -> bool:
    """A module without children whose parameters, if any, are vectors: torch's norms, or a class written elsewhere.

    Without parameters it must be a function of one tensor (a norm without weights, an activation).
    """
    if any(module.children()):
        return False
    if isinstance(module, TORCH_NORMS):
        return True
    if type(module).__module__.startswith("torch."):
        return False
    parameters = list(module.parameters())
    if any(True for _ in module.buffers()) or any(p.dim() != 1 for p in parameters):
        return False
    return bool(parameters) or _required_arguments(type(module)) == 1


def _required_arguments(cls: type[nn.Module]) -> int:
    """How many arguments a call of the class's forward must give."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = list(inspect.signature(cls.forward).parameters.values())[1:]
    return sum(p.default is inspect.Parameter.empty and p.kind in kinds for p in own)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """The next smaller pieces of a block that cannot be captured whole: submodules with a forward of their own."""
    for child in block.children():
        if isinstance(child, CONTAINERS):
            yield from parts_of(child)
        elif any(child.children()) or is_norm_like(child):
            yield child


def all_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _checkpointing_layer_class() -> type | None:
    """transformers' marker class, if transformers is loaded at all (a model with such layers has loaded it)."""
    return getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)


def _inside(path: str, blocks: dict[str, nn.Module]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]) in blocks for n in range(1, len(parts) + 1))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
