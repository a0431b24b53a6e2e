"""Our memory plan as Inductor takes it: a partitioner with an identity for its cache of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from ._torch import CustomPartitionerFn, compile_fx, get_file_hash
from .aot import partition


def compile_with_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: str) -> Callable[..., Any]:
    """The graph compiled by Inductor, split as our plan says."""
    return compile_fx(gm, example_inputs, config_patches={"custom_partitioner_fn": Partitioner(plan)})


class Partitioner(CustomPartitionerFn):
    """Fused ops are planned by us; what Inductor keeps of its own part it decides itself."""

    def __init__(self, plan: str) -> None:
        self.plan = plan

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(gm, joint_inputs, plan=self.plan, remainder_is_fused=True, **kwargs)

    def uuid(self) -> str:
        folder = Path(__file__).parent
        files = [folder / "aot.py", folder / "fused_op.py", *sorted((folder / "memory").glob("*.py")),
                 *sorted((folder / "products").glob("*.py"))]
        return f"fxfuse {self.plan} {get_file_hash(tuple(map(str, files)))!r}"
