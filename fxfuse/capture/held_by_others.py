"""What lives through a step because somebody else holds it: no block saves it, and no graph makes it for itself.

Two such things are as large as what passes from block to block. The first block's input is a leaf of autograd where PEFT has made it
one (``enable_input_require_grads``); autograd holds a leaf until its gradient is there. And as long as the model's output is held,
what its logits can be had from is held too. Both are seen while a step runs, and are taken to grow with its tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from fxfuse.capture.step_shape import Shape
from fxfuse.memory.plan import Held
from fxfuse.output_contract.source import bytes_behind


class Seen:
    """leaf: is the first block's input a leaf; outputs: bytes for each token that the model's output holds, as far as was seen."""

    def __init__(self) -> None:
        self.leaf = False
        self.outputs = 0.0

    def forward(self, out: torch.Tensor, shape: Shape | None, known: bool) -> None:
        """The first block has run. Until a backward shows what the output holds (``known``), it is one tensor like this one."""
        assert out.grad_fn is not None
        leaves = (getattr(node, "variable", None) for node, _ in out.grad_fn.next_functions)
        self.leaf = any(leaf is not None and not isinstance(leaf, nn.Parameter) and leaf.shape == out.shape for leaf in leaves)
        if not known and shape is not None:
            self.outputs = out.nbytes / max(shape.tokens, 1)

    def backward(self, model: nn.Module | None, device: torch.device, shape: Shape | None) -> None:
        """The backward has come to the first block."""
        if model is not None and shape is not None:
            self.outputs = bytes_behind(model, device) / max(shape.tokens, 1)

    def at(self, shape: Shape) -> Held:
        """What will be held in a step of this shape."""
        return Held(self.leaf, int(self.outputs * shape.tokens))
