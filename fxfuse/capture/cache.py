"""A key/value cache among a block's arguments, made to look the same to every block.

Plain training loops leave ``use_cache`` at its default, so each block receives the model's cache and writes
its keys and values at its own layer index: traced as it stands, that is one graph per layer. Where the
block's place in the cache is still empty, the block is given a stand-in with no index, and what it wrote is
handed to the real cache afterwards: one graph for all blocks, and the cache as eager leaves it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn


@dataclass
class CacheArgument:
    """Where a call holds its cache: an index into ``args`` or a name in ``kwargs``."""

    key: int | str
    cache: Any

    def replaced(self, args: tuple, kwargs: dict[str, Any], stand_in: Any) -> tuple[tuple, dict[str, Any]]:
        """The call's arguments with ``stand_in`` in the cache's place."""
        if isinstance(self.key, int):
            return (*args[: self.key], stand_in, *args[self.key + 1 :]), kwargs
        return args, {**kwargs, self.key: stand_in}


def find_cache(args: tuple, kwargs: dict[str, Any]) -> CacheArgument | None:
    """The cache among the arguments of a call, if there is one."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None:  # whoever passes a cache has imported this
        return None
    for name, value in kwargs.items():
        if isinstance(value, library.Cache):
            return CacheArgument(name, value)
    for index, value in enumerate(args):
        if isinstance(value, library.Cache):
            return CacheArgument(index, value)
    return None


def layer_index(block: nn.Module) -> int | None:
    """The index at which ``block`` writes to a cache, or None if it has none or several."""
    indices = {vars(module).get("layer_idx") for module in block.modules()} - {None}
    return indices.pop() if len(indices) == 1 else None


def stand_in_for(cache: Any, index: int) -> Any | None:
    """Something to give the block at ``index`` instead of ``cache``; None where that place is not empty."""
    classes = stand_in_classes()
    if _empty_at(cache, index):
        return classes.one()
    library = sys.modules["transformers.cache_utils"]
    if type(cache) is library.EncoderDecoderCache and not cache.is_updated.get(index):
        if _empty_at(cache.self_attention_cache, index) and _empty_at(cache.cross_attention_cache, index):
            return classes.pair()
    return None


def hand_over(stand_in: Any, cache: Any, index: int) -> None:
    """Write to ``cache`` what the block wrote to its stand-in."""
    if not hasattr(stand_in, "is_updated"):
        if stand_in.written is not None:
            cache.update(*stand_in.written, index)
        return
    hand_over(stand_in.self_attention_cache, cache.self_attention_cache, index)
    hand_over(stand_in.cross_attention_cache, cache.cross_attention_cache, index)
    if stand_in.is_updated.now:
        cache.is_updated[index] = True


def _empty_at(cache: Any, index: int) -> bool:
    """Whether ``cache`` is a plain growing cache that holds nothing yet at ``index``."""
    library = sys.modules["transformers.cache_utils"]
    if type(cache) is not library.DynamicCache or cache.offloading:
        return False
    if index >= len(cache.layers):
        return cache.layer_class_to_replicate is library.DynamicLayer
    layer = cache.layers[index]
    return (
        type(layer) in (library.DynamicLayer, library.DynamicSlidingWindowLayer) and not layer.is_initialized
    )


@dataclass
class _Flag:
    """``is_updated`` of an encoder-decoder cache, for one block on its first call: any index, one answer."""

    now: bool = False

    def get(self, index: int, default: bool = False) -> bool:
        return self.now

    def __setitem__(self, index: int, value: bool) -> None:
        self.now = value


@functools.cache
def stand_in_classes() -> Any:
    """The stand-ins: subclasses of the library's caches, so that a block takes the same way with them."""
    library = sys.modules["transformers.cache_utils"]
    DynamicCache: Callable = library.DynamicCache

    class BlockCache(DynamicCache):  # type: ignore[misc, valid-type]
        """Returns keys and values as they come, and remembers them."""

        def __init__(self) -> None:
            super().__init__()
            self.written: tuple | None = None

        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple:
            self.written = (key_states, value_states)
            return key_states, value_states

    class BlockCachePair(library.EncoderDecoderCache):  # type: ignore[misc, name-defined]
        """One for self-attention, one for cross-attention."""

        def __init__(self) -> None:
            self.self_attention_cache = BlockCache()
            self.cross_attention_cache = BlockCache()
            self.is_updated = _Flag()

    return SimpleNamespace(one=BlockCache, pair=BlockCachePair)
