"""Which frozen weights of a captured module are moved to where they have room for their adapters (roomy_weights.py), and when.

Which: the weight [out, in] of a plain ``nn.Linear`` (that class; nobody's forward, hooks or shards) that is frozen, of 16 bits, alone
in its storage and in its model, and adapted: around it lie trainable thin pairs [r, in] and [out, r]. By structure; no library is
asked. The room is for all linears that may share an input, since those of one input share one h: the ranks of its neighbours of equal
``in`` together.

When: before the first captured call of a kind of modules, and as Dynamo begins to trace one of them, before it has read a stride; all
modules of that kind, which share a graph, one weight at a time. By then whatever wraps or shards the model has done so. A call whose
weights lie otherwise (assigned, merged, loaded anew, thawed, looked at by ``state_dict``) moves them again, or gives them back, before
the graph's guards look.

What others see: the same ``Parameter``; its rows are further apart, and ``is_contiguous()`` is false. ``state_dict`` (so everything
that saves by it) gives each weight back to contiguous memory before it is read; so does ``fxfuse.restore``, and the next call of a
thawed one.

``FXFUSE_ROOMS=1`` moves weights, ``0`` does not. Never with CUDA graphs, whose streams are not the training's.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fxfuse._torch import storage_use_count
from fxfuse.memory.plan import size_text
from fxfuse.roomy_weights import give_back, home_of, move, row_distance

logger = logging.getLogger("fxfuse")

RULE = "lora_linear"
SETTING, DEFAULT = "FXFUSE_ROOMS", "0"
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 64  # the rank of an adapter that is thin beside its weight
MOST = 256  # columns of room
_ALONE = 2  # uses of a storage: by its tensor, and by the look at it
_TIDY = 2 << 30  # bytes moved until the allocator is asked to let go of what they lay in


@dataclass(frozen=True)
class Adapted:
    """A linear, the room that its weight is to have, and what it shares an input with, as far as can be seen."""

    linear: nn.Linear
    rank: int
    group: tuple[int, int]


class _GiveBack:
    """A hook of a linear before its ``state_dict``. Copies and pickles of the module have one that does nothing, no code of ours."""

    def __call__(self, linear: nn.Module, prefix: str, keep_vars: bool) -> None:
        weight = linear._parameters.get("weight")
        if type(weight) is nn.Parameter:
            give_back(weight)

    def __reduce__(self) -> tuple:
        return getattr, ("", "format")  # (takes any arguments, gives a string that nobody reads)


class Rooms:
    """The moved weights of one installation."""

    def __init__(self, backend: Any, roomy: Callable[[int], bool]) -> None:
        """``roomy``: may so many bytes more be taken, for all time."""
        rules = getattr(backend, "rules", None)
        used = (rules is None or RULE in rules) and RULE not in getattr(backend, "exclude", ())
        self._possible = used and not getattr(backend, "cuda_graphs", False)
        self._roomy = roomy
        self._moved: WeakKeyDictionary[nn.Module, dict[nn.Linear, int]] = WeakKeyDictionary()  # distances of rows, by module

    def prepare(self, modules: Sequence[nn.Module], model: nn.Module) -> None:
        """A graph is about to be made for modules of one kind."""
        if not self._possible or os.environ.get(SETTING, DEFAULT) != "1":
            return
        wanted = {module: list(rooms_wanted(module)) for module in modules}
        if not any(wanted.values()):
            return
        shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        new = [(module, linear, room) for module, found in wanted.items() for linear, room in found
               if shared[id(linear.weight)] == 1 and home_of(linear.weight) is None and is_free(linear)]  # fmt: skip
        if not new or not self._roomy(sum(_bytes(linear.weight, room) for _, linear, room in new)):
            return
        moved = 0
        for module, linear, room in new:
            if not self._move(linear, room):
                return
            _watch(linear)
            self._moved.setdefault(module, {})[linear] = linear.weight.stride(0)
            moved += linear.weight.nbytes
            if moved > _TIDY and linear.weight.is_cuda:
                torch.cuda.empty_cache()
                moved = 0

    def _move(self, linear: nn.Linear, room: int) -> bool:
        """False where there is no memory for one weight more: nothing is moved from then on, and sums go as without room."""
        try:
            move(linear.weight, room)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            self._possible = False
            logger.warning("no memory to give frozen weights room for their adapters: those that have none are left as they are")
        return self._possible

    def sentences(self) -> list[str]:
        """What a reader of the report should know."""
        weights = [linear.weight for found in self._moved.values() for linear in found if home_of(linear.weight) is not None]
        if not weights:
            return []
        more = sum(weight.untyped_storage().nbytes() - weight.nbytes for weight in weights)
        return [
            f"the frozen weights of {len(weights)} linears lie in rows with room for their adapters ({size_text(more)} more): they are "
            f"not contiguous. state_dict() and fxfuse.restore give them back as they were; {SETTING}=0 leaves them so"
        ]

    def enter(self, module: nn.Module) -> None:
        """A call begins: its weights lie as they did when its graph was made, or as they may."""
        for linear, apart in self._moved.get(module, {}).items():
            weight = linear._parameters.get("weight")
            if weight is None or weight.stride(0) != apart or weight.requires_grad:
                self._settle(linear, apart)

    def _settle(self, linear: nn.Linear, apart: int) -> None:
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            return
        if weight.requires_grad:
            give_back(weight)
        elif self._possible and is_frozen_linear(linear) and is_free(linear) and home_of(weight) is None:
            self._move(linear, apart - weight.shape[1])


def give_rooms_back(model: nn.Module) -> bool:
    """Every weight of ``model`` that was moved lies contiguous again, and nothing of ours hangs on its linear."""
    touched = False
    for module in model.modules():
        for key in [key for key, hook in module._state_dict_pre_hooks.items() if type(hook) is _GiveBack]:
            module._state_dict_pre_hooks[key](module, "", False)
            del module._state_dict_pre_hooks[key]
            touched = True
    return touched


def _watch(linear: nn.Linear) -> None:
    if not any(type(hook) is _GiveBack for hook in linear._state_dict_pre_hooks.values()):
        linear.register_state_dict_pre_hook(_GiveBack())


def _bytes(weight: torch.Tensor, room: int) -> int:
    rows, columns = weight.shape
    return rows * (row_distance(columns, room) - columns) * weight.itemsize


def rooms_wanted(module: nn.Module) -> Iterator[tuple[nn.Linear, int]]:
    """The adapted linears in a module, with the columns that their adapters may need."""
    found = list(adapted(module))
    together: Counter[tuple[int, int]] = Counter()
    for one in found:
        together[one.group] += one.rank
    for one in found:
        room = together[one.group]
        if room <= min(MOST, one.linear.in_features // 2):
            yield one.linear, room


def adapted(module: nn.Module) -> Iterator[Adapted]:
    """Linears with a frozen 16-bit weight and trainable thin pairs around them: in the nearest module that holds both."""
    above: list[nn.Module] = []

    def visit(here: nn.Module) -> Iterator[Adapted]:
        if is_frozen_linear(here):
            for depth in reversed(range(len(above))):
                rank = rank_around(above[depth], here)
                if rank:
                    yield Adapted(here, rank, (id(above[max(depth - 1, 0)]), here.in_features))  # type: ignore[arg-type]
                    return
        above.append(here)
        for child in here._modules.values():
            if child is not None:
                yield from visit(child)
        above.pop()

    yield from visit(module)


def is_frozen_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight") if type(module) is nn.Linear else None
    return (weight is not None and type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype in DTYPES
            and weight.device.type in DEVICES and weight.dim() == 2 and weight.shape[1] % 8 == 0)  # fmt: skip


def rank_around(module: nn.Module, linear: Any) -> int:
    """The ranks of the trainable pairs [r, in], [out, r] under a module, together."""
    downs: Counter[int] = Counter()
    ups: Counter[int] = Counter()
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            a, b = parameter.shape
            downs[a] += b == linear.in_features and a <= WIDEST
            ups[b] += a == linear.out_features and b <= WIDEST
    return sum(rank * min(count, ups[rank]) for rank, count in downs.items())


def is_free(linear: nn.Linear) -> bool:
    """Is a weight nobody else's: no hooks or forward on its linear, no shards, and nothing else that lies in its storage."""
    kept, weight = vars(linear), linear.weight
    if "forward" in kept or "_is_fsdp_managed_module" in kept or "_hf_hook" in kept or hasattr(weight, "ds_id"):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    if weight.is_inference() or weight.is_shared() != weight.is_cuda or not weight.is_contiguous() or weight.storage_offset():
        return False
    storage = weight.untyped_storage()
    return storage.nbytes() == weight.nbytes and storage_use_count(storage._cdata) == _ALONE
