"""A mask as FlexAttention takes it: which blocks of keys a block of queries sees in part, and which whole.

Read off the mask itself, on the device, once for a mask. The host learns three truth values, in one wait: whether the mask only hides
(a number that it adds elsewhere than 0 is a bias), whether some query sees nothing (it would get other weights), and whether the
blocks that are seen follow each other (the kernel then need not look up each).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .known_masks import once_for_mask

SIZE = 128


@dataclass(frozen=True)
class Blocks:
    """tuple: as the higher-order op takes it, but for the mask function   usable: the mask only hides, and no query sees nothing
    contiguous: blocks that are seen follow each other"""

    tuple: tuple[Any, ...]
    usable: bool
    contiguous: bool


def narrowed(mask: Tensor) -> Tensor:
    """[b or 1, h or 1, queries, keys]: the mask without what is repeated in memory."""
    for dim in (0, 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def blocks_of(mask: Tensor, hides: bool | None) -> Blocks:
    """mask: as ``narrowed`` gives it; ``hides`` as in hiding.Mask."""
    return once_for_mask(mask, ("blocks", hides), lambda: _blocks_of(mask, hides))


def _blocks_of(mask: Tensor, hides: bool | None) -> Blocks:
    seen = mask > torch.finfo(mask.dtype).min if hides is None else mask != hides
    plain = torch.ones((), dtype=torch.bool, device=mask.device) if hides is not None else ((mask == 0) | ~seen).all()
    queries, keys = mask.shape[2:]
    padded = F.pad(seen, (0, -keys % SIZE, 0, -queries % SIZE))
    tiles = padded.unflatten(3, (-1, SIZE)).unflatten(2, (-1, SIZE))
    some, whole = tiles.any(-1).any(3), tiles.all(-1).all(3)
    partial = (some & ~whole).to(torch.int32)
    both = (partial, whole.to(torch.int32))
    adjacent = torch.stack([_adjacent(dense) for dense in both]).all()
    facts = torch.stack([plain, seen.any(-1).all(), adjacent]).tolist()
    listed = [part for way in (both, [dense.transpose(2, 3) for dense in both]) for dense in way for part in _listed(dense)]
    made = BlockMask((queries, keys), *listed, BLOCK_SIZE=(SIZE, SIZE), mask_mod=None)
    return Blocks(made.as_tuple()[:-1], facts[0] and facts[1], facts[2])


def _listed(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are 1, and their columns first."""
    order = torch.argsort(dense, dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _adjacent(dense: Tensor) -> Tensor:
    """Are the ones of each row, and of each column, next to each other."""
    along = [(F.pad(d, (1, 0)).diff(dim=-1) == 1).sum(-1).amax() <= 1 for d in (dense, dense.transpose(2, 3))]
    return along[0] & along[1]
