"""What was read off a mask is kept for as long as the mask is the same: the host waits once for a mask, not in every layer and call.

A mask is the same while its storage is, where its data lie, the view of it and the count of the writes to it. A weak reference
keeps the storage's identity from being given to another one; its memory is free to go. What a mask of inference mode holds is read
anew each time, as nobody counts its writes. Writes that torch does not count (through ``.data``, from another library's kernel) go
unseen, here as in autograd.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
# Masks that are remembered: a model has one or two (all keys, a sliding window), and makes them anew in every step.
MOST = 16

_answers: OrderedDict[tuple, tuple[StorageWeakRef, dict[Hashable, Any]]] = OrderedDict()


def once_for_mask(mask: Tensor, question: Hashable, answer: Callable[[], T]) -> T:
    """The answer to a question about the values of a mask, found once for it. An answer must not hold the mask."""
    if mask.is_inference():
        return answer()
    storage = mask.untyped_storage()
    key = (storage._cdata, storage.data_ptr(), mask.storage_offset(), mask.shape, mask.stride(), mask.dtype, mask._version)
    known = _answers.get(key)
    if known is None:
        for dead in [k for k, (reference, _) in _answers.items() if reference.expired()]:
            del _answers[dead]
        while len(_answers) >= MOST:
            _answers.popitem(last=False)
        known = _answers[key] = (StorageWeakRef(storage), {})
    answers = known[1]
    if question not in answers:
        answers[question] = answer()
    return answers[question]


def forget_masks() -> None:
    """Forget everything that was read."""
    _answers.clear()
