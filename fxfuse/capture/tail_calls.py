"""Whether anybody will read what a call returns: the proof that a checkpoint only wants what its function saves.

In the backward, torch.utils.checkpoint runs its function again for the tensors that autograd saves inside. Without
reentry it drops what the function returns; with reentry it takes its place in the autograd graph, never its values.
So where a block's call is the last thing such a function does, the values of the block's outputs are needed by nobody.

That it is the last thing is read off the Python stack: from the block's call up to the checkpoint's frame, every
frame must be at a call whose very next instruction returns the result. ``partial`` objects and bound methods
have no frame; hooks, loops and anything done with the result end the proof, and the outputs are computed.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FrameType

from fxfuse._torch import graph_task_id, len_dispatch_stack

CHECKPOINT_MODULE = "torch.utils.checkpoint"
# The function that replays without reentry, and CheckpointFunction.backward.
REPLAYING = ("recompute_fn", "backward")
_NOTHING = ("CACHE", "NOP", "PRECALL")


def result_is_unread(frame: FrameType | None) -> bool:
    """Whether what ``frame`` is about to return will reach nothing but a checkpoint's recomputation.

    ``frame`` is that of the caller. Outside of a backward this costs one call into torch. Under a dispatch mode
    (selective checkpointing, debugging) somebody looks at every operation.
    """
    if graph_task_id() == -1 or len_dispatch_stack():
        return False
    while frame is not None:
        code = frame.f_code
        if code.co_name in REPLAYING and frame.f_globals.get("__name__") == CHECKPOINT_MODULE:
            return True
        if not returns_what_it_calls(code, frame.f_lasti):
            return False
        frame = frame.f_back
    return False


@lru_cache(maxsize=1024)
def returns_what_it_calls(code: CodeType, at: int) -> bool:
    """Whether the instruction of ``code`` at offset ``at`` is a call, and the next one returns its result."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _NOTHING]
    for instruction, following in pairwise(instructions):
        if instruction.offset <= at < following.offset:
            return instruction.opname.startswith("CALL") and following.opname == "RETURN_VALUE"
    return False
