"""A key/value cache among a block's arguments, made to look the same to every block.

Plain training loops leave ``use_cache`` at its default, so each block receives the model's cache and writes
its keys and values at its own layer index: traced as it stands, that is one graph per layer. Where the
block's place in the cache is still empty, the block is given a stand-in with no index, and what it wrote is
handed to the real cache afterwards: one graph for all blocks, and the cache as eager leaves it.

Where somebody's checkpoint stands around a block, the backward runs it again with the cache that its forward has filled. It is given a
stand-in as in its forward, so that the same graph runs; what it writes then is dropped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fxfuse._torch import graph_task_id

# By cache and index: how long the place was when a captured block had written to it.
_filled: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


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
    if _empty_at(cache, index) or _runs_again(cache, index):
        return classes.one()
    library = sys.modules["transformers.cache_utils"]
    if type(cache) is library.EncoderDecoderCache:
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        untouched = not cache.is_updated.get(index) and all(_empty_at(part, index) for part in parts)
        if untouched or all(_runs_again(part, index) for part in parts):
            return classes.pair()
    return None


def hand_over(stand_in: Any, cache: Any, index: int) -> None:
    """Write to ``cache`` what the block wrote to its stand-in."""
    if not hasattr(stand_in, "is_updated"):
        if stand_in.written is not None and not _runs_again(cache, index):
            cache.update(*stand_in.written, index)
            _filled.setdefault(cache, {})[index] = cache.get_seq_length(index)
        return
    hand_over(stand_in.self_attention_cache, cache.self_attention_cache, index)
    hand_over(stand_in.cross_attention_cache, cache.cross_attention_cache, index)
    if stand_in.is_updated.now:
        cache.is_updated[index] = True


def _runs_again(cache: Any, index: int) -> bool:
    """Whether a backward runs the block at ``index`` again, and nobody has written behind what its forward wrote."""
    return graph_task_id() != -1 and _filled.get(cache, {}).get(index) == cache.get_seq_length(index)


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
