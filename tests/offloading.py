"""Blocks whose saved tensors go to the host, for tests of offload: a backend that tags them as a plan would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from fxfuse._torch import TracingContext, aot_autograd, functorch_config, min_cut_partition, storage_use_count
from fxfuse.bufferize import boxed
from fxfuse.memory.host_pool import HostPool, host_memory
from fxfuse.memory.joint import forward_nodes
from fxfuse.memory.offload import TAG, offload_saved
from fxfuse.memory.offload_runtime import Transfers
from fxfuse.memory.offload_streams import Copies, PlainCopies
from fxfuse.reuse import mark_donated


class Block(torch.nn.Module):
    """A residual block with two products and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(torch.nn.Module):
    """Blocks, one after the other, each compiled by itself: equal ones share a graph."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled_blocks(model: Stack, **choices: Any) -> Stack:
    """The model with every block compiled by ``backend``."""
    compiler = backend(**choices)
    for block in model.blocks:
        block.compile(backend=compiler, dynamic=True)
    return model


def backend(offload: bool = True, recompute: bool = False, seen: list | None = None) -> Callable:
    """Saves what eager does, or (recompute) the block's input alone; offloads that, or not. ``seen`` collects the two graphs."""
    compiler = aot_autograd(fw_compiler=_finish, bw_compiler=_finish, inference_compiler=_finish,
                            partition_fn=partial(_partition, offload, recompute, seen))

    def compile_graph(gm: fx.GraphModule, inputs: Any) -> Callable:
        with functorch_config.patch({"donated_buffer": False, "cse": False}):
            compiled = compiler(gm, inputs)
        TracingContext.get().fw_metadata.bw_donated_idxs = []  # as fxfuse/aot.py does
        return compiled

    return compile_graph


def _finish(gm: fx.GraphModule, inputs: Any) -> Callable:
    return boxed(gm)


def _partition(offload: bool, recompute: bool, seen: list | None, joint: fx.GraphModule, inputs: Any, *,
               num_fwd_outputs: int, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    nodes = forward_nodes(joint.graph, num_fwd_outputs)
    for node in joint.graph.nodes:
        if node not in nodes:
            continue
        value = node.meta.get("val")
        if node.op == "call_function":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE if recompute else CheckpointPolicy.MUST_SAVE
        # Inputs of three dimensions are the block's own; others are its weights.
        if offload and isinstance(value, Tensor) and (value.dim() == 3 or node.op == "call_function"):
            node.meta[TAG] = True
    forward, backward = min_cut_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
    mark_donated(forward, backward, num_fwd_outputs)
    offload_saved(forward, backward, num_fwd_outputs)
    if seen is not None:
        seen += [forward, backward]
    return forward, backward


class Late(PlainCopies):
    """A device whose copies are as late as they may be: one runs when something waits for it, after those queued before it.

    Memory that nobody holds any more when its copy runs is somebody else's by then: what is read from it is NaN, and writing into it
    is noted in ``faults``. ``log`` tells what was asked for, in order. ``waits`` False: a device on which waiting has no effect.
    """

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.log: list[str] = []
        self.faults: list[str] = []
        self.queues: dict[str, list[Copy]] = {"out": [], "back": []}
        self.done: set[int] = set()
        self.events = 0
        self.now: Any = "compute"

    def stream(self) -> Any:
        return self.now

    def send(self, source: Tensor, buffer: Any, target: Tensor) -> Event:
        return self._queue("out", source, target, buffer.read)

    def fetch(self, buffer: Any, source: Tensor, target: Tensor) -> Event:
        return self._queue("back", source, target, buffer.written)

    def wait(self, stream: Any, event: int) -> None:
        self.log.append(f"wait {event}")
        if self.waits:
            self._run_until(event)

    def finish(self) -> None:
        """Run whatever is left."""
        self._run_until(self.events)
        for queue in self.queues.values():
            while queue:
                self._run_until(queue[0].event)

    def _queue(self, side: str, source: Tensor, target: Tensor, after: int | None) -> Event:
        self.events += 1
        self.log.append(f"{side} {self.events}")
        event = Event(self.events)
        event.synchronize = partial(self._run_until, event)
        self.queues[side].append(Copy(event, _alias(source), _alias(target), after))
        return event

    def _run_until(self, event: int) -> None:
        for side, queue in self.queues.items():
            while event not in self.done and any(copy.event == event for copy in queue):
                copy = queue.pop(0)
                if copy.after is not None:
                    self._run_until(copy.after)
                if side == "out" and _is_abandoned(copy.source):
                    copy.source.fill_(float("nan"))
                if side == "back" and _is_abandoned(copy.target):
                    self.faults.append(f"copy {copy.event} wrote into memory that was free")
                copy.target.copy_(copy.source)
                self.done.add(copy.event)


class Event(int):
    """The number of a copy. ``synchronize`` runs it."""

    synchronize: Callable[[], None]


class Copy(NamedTuple):
    event: Event
    source: Tensor
    target: Tensor
    after: int | None


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor in the same memory; alone it holds that memory once."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_abandoned(tensor: Tensor) -> bool:
    """Is the memory held by this tensor (and by the storage object that asks) alone."""
    return storage_use_count(tensor.untyped_storage()._cdata) <= 2


@contextmanager
def traffic(monkeypatch: Any, copies: Copies | None = None, limit: int = 1 << 24) -> Iterator[Transfers]:
    """What the ops use within: transfers of a CPU over a pool of their own."""
    import fxfuse.memory.offload_op as op

    copies = copies or PlainCopies()
    ours = Transfers(torch.device("cpu"), copies, HostPool(host_memory, limit))
    with monkeypatch.context() as patch:
        patch.setattr(op, "transfers", lambda device: ours)
        yield ours
