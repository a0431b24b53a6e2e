"""``fxfuse::offload`` and ``fxfuse::reload``: a tensor leaves the device in a forward graph, and comes back in its backward graph.

    kept = offload(tensor, whole, rank, count, part, parts, watched)    in the forward; what autograd saves
    tensor = reload(kept, device)                                       in the backward, before its first use

``whole`` is what is copied: the tensor itself, or memory in which ``parts`` tensors that are sent lie (queries, keys and values of one
product); it is copied once.

Each may give what it was given (a tensor that stays on the device), so by their schemas the result may alias the operand: then no
pass over a graph takes the operand's memory for something else while it is still being copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .offload_runtime import transfers

LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")
LIBRARY.define("offload(Tensor(a) tensor, Tensor whole, int rank, int count, int part, int parts, bool watched) -> Tensor(a)",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("reload(Tensor(a) kept, Device device) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
offload = torch.ops.fxfuse.offload.default
reload = torch.ops.fxfuse.reload.default


def _offload(tensor: Tensor, whole: Tensor, rank: int, count: int, part: int, parts: int, watched: bool) -> Tensor:
    return transfers(tensor.device).send(tensor, rank, count, watched, whole, part, parts)


def _reload(kept: Tensor, device: torch.device) -> Tensor:
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return transfers(device).take(kept)


def _fake_offload(tensor: Tensor, whole: Tensor, rank: int, count: int, part: int, parts: int, watched: bool) -> Tensor:
    """On the host, laid out as on the device."""
    return on(torch.device("cpu"), tensor)


def _fake_reload(kept: Tensor, device: torch.device) -> Tensor:
    return on(device, kept)


def on(device: torch.device, tensor: Tensor) -> Tensor:
    """Unwritten memory like a tensor's, on a device."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


LIBRARY.impl("offload", _offload, "CompositeExplicitAutograd")
# Below autograd a detached tensor would not share the version counter that tells whether somebody has written to the original.
LIBRARY.impl("offload", _offload, "Autograd")
LIBRARY.impl("reload", _reload, "CompositeExplicitAutograd")
torch.library.register_fake("fxfuse::offload", _fake_offload, lib=LIBRARY)
torch.library.register_fake("fxfuse::reload", _fake_reload, lib=LIBRARY)
