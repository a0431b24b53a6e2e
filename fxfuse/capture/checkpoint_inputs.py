"""What a checkpoint keeps of a block, its input, lives on the host between forward and backward, where that takes no time.

``torch.utils.checkpoint`` without reentry saves the arguments of its function as autograd saves tensors, before the function runs. A
saved tensor can be given hooks afterwards; the captured block that runs inside gives such to the argument that is its own input, and to
no other: masks and angles belong to all blocks. The copies are those of offloaded tensors (memory/offload_runtime.py): out while the
block runs, back while the block after it runs its backward. Values are the same bits.

It takes no time where the block works much longer on a row than the row travels, which is a matter of its weights: two operations for
each, at the rate of the library's matmuls. Without room on the host (``FXFUSE_HOST_MEMORY``; 0: none) tensors stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fxfuse._torch import SavedTensor, top_saved_tensors_hooks
from fxfuse.memory.costs import rates_of
from fxfuse.memory.offload_runtime import transfers

DEVICES = ("cuda",)  # whose memory is apart from the host's
LEAST_BYTES = 1 << 20  # smaller tensors are not worth two launches
# Part of a block's matmuls that a copy may take. On an H200 steps of QLoRA of a 7B model (0.21) and of LoRA of an 8B one (0.26) took no
# longer with it (616 ms after 629, 662 after 671, other changes included); in LoRA of a 2B model (0.40) the device was busy 8% longer.
FREE = 1 / 3
_PACK = ("torch.utils.checkpoint", "_checkpoint_hook.__init__.<locals>.pack_hook")
_operations: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def send_checkpointed_input(block: nn.Module, arguments: Iterable[Any], more: int = 0) -> int:
    """A captured call of ``block`` begins: if a checkpoint has just saved its input, let that go to the host. How many tensors go.

    more: how many blocks like this one are to come for the first time; memory for their inputs is looked for while this one compiles.
    """
    hooks = top_saved_tensors_hooks(True)
    if hooks is None or not _is_checkpoints(hooks[0]):
        return 0
    own = {argument.data_ptr() for argument in arguments if _may_go(argument) and _is_hidden(block, argument)}
    saved = _saved_inputs(_frame_of(hooks[0])) if own else []
    sent = [tensor for each in saved if isinstance(tensor := each.data, Tensor) and tensor.data_ptr() in own and _send(each)]
    if sent and more:
        transfers(sent[0].device).pool.expect(sent[0].nbytes, more)
    return len(sent)


def _is_checkpoints(pack: Any) -> bool:
    """Is this the hook under which a checkpoint runs its function for the first time."""
    return (getattr(pack, "__module__", ""), getattr(pack, "__qualname__", "")) == _PACK


def _frame_of(pack: Any) -> Any:
    """What the checkpoint knows of its call; None in a version of torch that keeps it elsewhere."""
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    return cells["frame"].cell_contents if "frame" in cells else None


def _saved_inputs(frame: Any) -> list[Any]:
    """The saved tensors that hold the arguments: of the frame, in older versions of the node of an operation that only saves."""
    saver = getattr(getattr(frame, "input_saver", None), "grad_fn", None)
    held: Any = getattr(saver, "_raw_saved_tensors", None) or getattr(frame, "saved_args", ())
    return [saved for saved in held if isinstance(saved, SavedTensor)]


def _may_go(argument: Any) -> bool:
    """Is this a large activation, no wrapper of others, in memory apart from the host's, which may be used."""
    return (type(argument) is Tensor and argument.requires_grad and argument.device.type in DEVICES
            and argument.nbytes >= LEAST_BYTES and transfers(argument.device).pool.limit > 0)


def _is_hidden(block: nn.Module, argument: Tensor) -> bool:
    """Does the block work that much longer on a row than the row takes to the host, and than it takes back."""
    if block not in _operations:
        _operations[block] = 2 * sum(map(_elements, block.parameters()))
    rates = rates_of(argument.device)
    copying = argument.shape[-1] * argument.element_size() / min(rates.to_host, rates.from_host)
    return copying <= FREE * _operations[block] / rates.product


def _elements(weight: nn.Parameter) -> int:
    """Of a matrix; a packed one counts by what is packed in it. What is no matrix (biases, experts, of which a row meets few) counts
    nothing."""
    state = getattr(weight, "quant_state", None)
    shape = weight.shape if state is None else state.shape
    return int(shape.numel()) if len(shape) == 2 else 0


def _send(saved: Any) -> bool:
    """Send a saved tensor. Under hooks of somebody else, it is theirs."""
    device = saved.data.device
    before = transfers(device).counts.sent

    def pack(tensor: Tensor) -> tuple[Tensor, int | None]:
        """What is kept; of a tensor that stays after all, with its version, which autograd does not look at under hooks."""
        kept = transfers(device).send(tensor, 0, 1, watched=True, hooked=True)
        return kept, tensor._version if kept is tensor else None

    def unpack(packed: tuple[Tensor, int | None]) -> Tensor:
        kept, version = packed
        if version is not None and kept._version != version:
            raise RuntimeError(f"the input of a checkpointed block, {tuple(kept.shape)}, was modified by an inplace operation: "
                               "clone it before it is modified")
        return transfers(device).take(kept)

    try:
        saved.register_hooks(pack, unpack)
    except RuntimeError:
        return False
    return transfers(device).counts.sent > before
