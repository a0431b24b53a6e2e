"""One training step that leaves no trace: it makes the graphs exist before the first real step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxfuse.capture.expected import attributes_of, put_back


def rehearse(model: nn.Module, example_inputs: Any) -> None:
    """One forward and backward on ``example_inputs``; gradients, buffers and random state stay as they were.

    ``example_inputs``: a tensor, a sequence of positional arguments or a mapping of keyword arguments.
    """
    with _untouched(model), torch.enable_grad():
        output = _call(model, example_inputs)
        terms = [term for term in _floats(output) if term.requires_grad]
        if not terms:
            return
        # The loss alone where there is one, else everything the model gives.
        scalars = [term for term in terms if term.dim() == 0][:1]
        total = torch.stack([term.float().sum() for term in scalars or terms]).sum()
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
            trainable = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(total, trainable, allow_unused=True)  # fires no optimizer step in such a hook
        else:
            total.backward()


def check_example_inputs(example_inputs: Any) -> None:
    """Raise for what cannot be arguments of a model."""
    if example_inputs is None or isinstance(example_inputs, (torch.Tensor, Mapping)):
        return
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return
    raise TypeError(
        "example_inputs takes a tensor, a tuple of positional arguments or a dict of keyword arguments, got "
        f"{type(example_inputs).__name__}"
    )


def _call(model: nn.Module, example_inputs: Any) -> Any:
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return model(example_inputs)
    return model(*example_inputs)


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Floating-point tensors in a model's output, in order."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _floats(value)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers, attributes and random state back."""
    attributes = attributes_of(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        put_back(attributes)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
