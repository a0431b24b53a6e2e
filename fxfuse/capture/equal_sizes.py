"""Which sizes of a call are one size: the batch, the length. Each has one symbol in the graph then, which is made sooner.

Dynamo can give every dimension of every input a symbol of its own. What is equal is then found out operation by operation, and every
size is rewritten in those terms again and again: of compiling a decoder layer that takes a third. Or it gives sizes that are equal in
this call one symbol; two that are equal by chance are then one size to the graph, and a call in which they differ compiles another.

So the places of the sizes are looked at: equal sizes get one symbol where each of them stands in places of one meaning only. A length
that equals the width or the head size, a batch of 8 rows of 8 tokens, an encoder's length that equals the decoder's: then every
dimension has its own.

A head is compiled for what its backbone returns, of the batch and the length of the tokens, and for the labels. There a number (of
logits to keep) is a symbol too, of which all sizes are made: one that is zero, as in training, is the constant that it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxfuse.capture import cache

BATCH, LENGTH, COLUMNS, HEADS, STREAM, NUMBER = "batch", "length", "columns", "heads", "another length", "number"
_Meanings = defaultdict[int, set[str]]
_NO_SIZES = (type(None), bool, float, str, torch.dtype, torch.device)


def equal_is_same(args: tuple, kwargs: dict[str, Any]) -> bool:
    """May sizes that are equal in this call of a block stand for one size each. Its first argument is [batch, length, width]."""
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or not hidden.is_floating_point():
        return False
    if any(isinstance(size, torch.SymInt) for size in hidden.shape):  # of an imagined call: its sizes have their symbols
        return False
    meanings = _Meanings(set)
    meanings[hidden.shape[0]].add(BATCH)
    meanings[hidden.shape[1]].add(LENGTH)
    meanings[hidden.shape[2]].add(COLUMNS)
    for value in tree_leaves((args[1:], kwargs)):
        if isinstance(value, _NO_SIZES) or type(value).__module__ == cache.__name__:  # (a stand-in for a cache, which is empty)
            continue
        found = list(_sizes(value, hidden))
        if not found:
            return False
        for size, meaning in found:
            meanings[size].add(meaning)
    return _are_told_apart(meanings)


def equal_is_same_in_head(args: tuple, kwargs: dict[str, Any], weights: Iterable[Tensor]) -> bool:
    """May sizes that are equal in this call of a head, of these weights, stand for one size each, and numbers for themselves. Its
    arguments are tokens, labels and masks, [batch, length], embedded tokens, [batch, length, width], and numbers that are zero."""
    meanings = _Meanings(set)
    for weight in weights:
        for size in weight.shape:
            meanings[size].add(COLUMNS)
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, _NO_SIZES) or (type(value) is int and value == 0) or (type(value) is Tensor and value.dim() == 0):
            continue
        if type(value) is not Tensor:  # (a subclass may answer for itself, and be something else)
            return False
        places = (BATCH, LENGTH, COLUMNS) if value.is_floating_point() else (BATCH, LENGTH)
        if value.dim() != len(places) or any(isinstance(size, torch.SymInt) for size in value.shape):
            return False
        for size, meaning in zip(value.shape, places, strict=True):
            meanings[size].add(meaning)
    return _are_told_apart(meanings)


def _are_told_apart(meanings: _Meanings) -> bool:
    return all(len(found) == 1 for size, found in meanings.items() if size > 1)


def _sizes(value: Any, hidden: Tensor) -> Iterator[tuple[int, str]]:
    """Each size of an argument with what it means, for what blocks are given; nothing where that is not known."""
    if isinstance(value, int):
        yield value, NUMBER
    elif isinstance(value, Tensor) and value.dim() == 4:  # a mask
        yield from zip(value.shape, (BATCH, HEADS, LENGTH, LENGTH), strict=True)
    elif isinstance(value, Tensor) and value.dim() in (1, 2) and not value.is_floating_point():  # places, a mask
        yield from zip(value.shape, (BATCH, LENGTH)[-value.dim():], strict=True)
    elif isinstance(value, Tensor) and value.dim() in (2, 3) and value.is_floating_point():  # angles
        another = value.shape[-1] == hidden.shape[-1]
        yield from zip(value.shape, (BATCH, STREAM if another else LENGTH, COLUMNS)[-value.dim():], strict=True)
