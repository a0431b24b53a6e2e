"""What is to be done between two training steps: behind an optimizer's step and outside of any backward.

What ran forward before has run backward by then, and a checkpoint is replayed by the kernels of its forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._torch import graph_task_id


def behind_each_step(function: Callable[[], None]) -> None:
    """Call ``function`` behind every optimizer's step from now on, wherever that is taken."""
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: function())


def is_between_steps() -> bool:
    """Asked behind an optimizer's step: is that not in the middle of a backward, where some optimizers step."""
    return not torch.compiler.is_compiling() and graph_task_id() == -1
