"""Running ``attention``: a loop over chunks of queries, in which the library's products and one derived row kernel take turns.

    for each chunk of queries, over the keys that it sees:
        scores  = queries keys'
        weights, statistics = row program(scores, others)          weights in the place of the scores
        out     = weights values

    and in the backward
        scores  = queries keys'                                    g_weights = g_out values'
        weights, d_scores = row program(scores, others, statistics, g_weights)      in the places of both
        d_queries = d_scores keys      d_keys += d_scores' queries      d_values += weights' g_out        (sums in float32)

Query heads that share a key/value head are rows of one product, behind each query (``by_query``): a chunk of queries is a part of one
matrix, which products read and write where it lies. So each operand and each result is laid out once, not once a chunk. Tensors are
[batch, heads, length, width]; results have the heads behind the length in memory, which is how the next projection reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .. import reference
from ..chunk_kernels import packed, products_as_given, run_into
from ..lowering import implementation_on
from ..program import Program
from .hiding import Spans, seen_keys
from .prepared import Prepared

# Scores of one chunk. Smaller ones would stay in the cache between a product and the row kernel, but leave the launches exposed:
# on an H200, 8192 queries with 8 heads took 3.1 ms forward in chunks of 64 MiB and 1.8 ms in chunks of 128, in the composition written
# by hand for softcap_attention.py ("rows 512", "rows 1024").
SCORES_BYTES = 128 << 20
STEP = 64


def queries_in_chunk(row_bytes: int) -> int:
    """How many queries are worked on at once, when the scores of one take so many bytes over all heads."""
    return max(SCORES_BYTES // max(row_bytes, 1) // STEP, 1) * STEP


@dataclass(frozen=True)
class Chunk:
    """Some queries, the rows that they are in matrices [b * kv, queries * group, .], and the keys that they see."""

    queries: slice
    rows: slice
    keys: slice


@dataclass(frozen=True)
class Attention:
    """query: [b, h, q, d]  key: [b, kv, n, d]  value: [b, kv, n, e]  others: what the row program reads beside the scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    others: Sequence[Tensor]
    prepared: Prepared
    rows: int = 0  # queries in a chunk; 0: as many as the budget allows

    @cached_property
    def group(self) -> int:
        """Query heads to a key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        b, h, queries, _ = self.query.shape
        rows = self.rows or queries_in_chunk(b * h * self.key.shape[2] * self.query.element_size())
        return [(start, min(start + rows, queries)) for start in range(0, queries, rows)]

    @cached_property
    def chunks(self) -> list[Chunk]:
        return [Chunk(slice(start, stop), slice(start * self.group, stop * self.group), slice(first, last))
                for (start, stop), (first, last) in zip(self.spans, self._seen(), strict=True)]

    def _seen(self) -> Spans:
        mask = self.prepared.mask
        if mask is None:
            return tuple((0, self.key.shape[2]) for _ in self.spans)
        name = self.prepared.forward.arguments[mask.position].name
        tensor = self.others[self.prepared.others.index(name)]
        return seen_keys(tensor[(None,) * (4 - tensor.dim())], mask.hides, self.spans)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The others by name, [b, kv, group, queries, keys] each; what does not vary has size 1."""
        return {name: self.by_group(tensor[(None,) * (4 - tensor.dim())])
                for name, tensor in zip(self.prepared.others, self.others, strict=True)}

    def by_group(self, tensor: Tensor) -> Tensor:
        """[b, h, .., ..] -> [b, kv, group, .., ..]"""
        return tensor.unflatten(1, (-1, self.group)) if tensor.shape[1] != 1 else tensor.unsqueeze(2)

    def by_query(self, tensor: Tensor) -> Tensor:
        """[b, h, q, w] -> [b * kv, q * group, w]"""
        rows = packed(self.by_group(tensor).transpose(2, 3))
        return rows.view(-1, rows.shape[2] * rows.shape[3], rows.shape[4])

    def by_head(self, rows: Tensor) -> Tensor:
        """[b * kv, q * group, w] -> [b, h, q, w], heads behind the queries in memory."""
        b, h, queries, _ = self.query.shape
        width = rows.shape[-1]
        return packed(rows.view(b, -1, queries, self.group, width).transpose(1, 2)).view(b, queries, h, width).transpose(1, 2)

    def run(self, program: Program, chunk: Chunk, given: dict[str, Tensor], results: Sequence[Tensor]) -> None:
        """A row program on the rows of a chunk. ``given``: by name, what is the chunk's own."""
        run_into(program, [given[a.name] if a.name in given else self._part(a.name, a.rows[-1], isinstance(a.columns, str), chunk)
                           for a in program.arguments], results)

    def _part(self, name: str, varies: bool, wide: bool, chunk: Chunk) -> Tensor:
        """What a chunk reads of another operand."""
        tensor = self.named[name]
        tensor = tensor[:, :, :, chunk.queries] if varies else tensor
        return tensor[..., chunk.keys] if wide else tensor

    def scores(self, matrix: Tensor) -> Tensor:
        """A chunk's matrix [b * kv, q * group, n] as its row programs see it: [b, kv, group, q, n]."""
        return matrix.view(self.query.shape[0], -1, matrix.shape[1] // self.group, self.group, matrix.shape[2]).transpose(2, 3)


def matrices(tensor: Tensor) -> Tensor:
    """[b, kv, n, w] -> [b * kv, n, w]"""
    return packed(tensor).view(-1, *tensor.shape[2:])


def forward(call: Attention) -> list[Tensor]:
    """The result, [b, h, q, e], and the row statistics, [b, h, q, 1]."""
    with _apart(call.query):
        queries, keys, values = call.by_query(call.query), matrices(call.key), matrices(call.value)
        out = queries.new_empty(*queries.shape[:2], values.shape[2])
        statistics = [torch.empty(*call.query.shape[:3], 1, dtype=reference.torch_dtype(output.dtype),
                                  device=out.device)
                      for output in call.prepared.forward.outputs[1:]]
        by_group = [call.by_group(numbers) for numbers in statistics]
        for chunk in call.chunks:
            matrix = torch.bmm(queries[:, chunk.rows], keys[:, chunk.keys].transpose(1, 2))
            scores = call.scores(matrix)
            call.run(call.prepared.forward, chunk, {call.prepared.scores: scores},
                     [scores, *(numbers[:, :, :, chunk.queries] for numbers in by_group)])
            torch.bmm(matrix, values[:, chunk.keys], out=out[:, chunk.rows])
        return [call.by_head(out), *statistics]


def backward(call: Attention, arriving: Tensor, statistics: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of query, key and value, for the gradient of the result."""
    by_group = dict(zip(call.prepared.statistics, map(call.by_group, statistics), strict=True))
    with _apart(call.query):
        queries, keys, values = call.by_query(call.query), matrices(call.key), matrices(call.value)
        g_out, d_queries = call.by_query(arriving), torch.empty_like(queries)
        d_keys, d_values = Sum(keys), Sum(values)
        for chunk in reversed(call.chunks):  # behind a causal mask the last chunk sees every key
            q, g, seen = queries[:, chunk.rows], g_out[:, chunk.rows], chunk.keys
            matrix, g_matrix = (torch.bmm(a, b[:, seen].transpose(1, 2)) for a, b in ((q, keys), (g, values)))
            scores, g_weights = call.scores(matrix), call.scores(g_matrix)
            given = {name: numbers[:, :, :, chunk.queries] for name, numbers in by_group.items()}
            given |= {call.prepared.scores: scores, call.prepared.cotangent: g_weights}
            call.run(call.prepared.backward, chunk, given, [scores, g_weights])
            torch.bmm(g_matrix, keys[:, seen], out=d_queries[:, chunk.rows])
            d_keys.add(seen, g_matrix.transpose(1, 2), q)
            d_values.add(seen, matrix.transpose(1, 2), g)
        return [call.by_head(d_queries), d_keys.by_head(call.key), d_values.by_head(call.value)]


class Sum:
    """A sum over chunks of products [b * kv, keys, w], in float32 where the operands have 16 bits."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.empty(like.shape, dtype=torch.float32 if like.element_size() == 2 else like.dtype, device=like.device)
        self.begun = False

    def add(self, keys: slice, a: Tensor, b: Tensor) -> None:
        """Adds ``a b`` to the rows of some keys; what comes first need not be added where it gives every row."""
        first = not self.begun and (keys.start, keys.stop) == (0, self.total.shape[1])
        if not self.begun and not first:
            self.total.zero_()
        self.begun = True
        accumulate(self.total[:, keys], a, b, first)

    def by_head(self, like: Tensor) -> Tensor:
        """As ``like``, [b, kv, n, w], in its dtype, heads behind the keys in memory."""
        total = self.total if self.begun else self.total.zero_()
        return packed(total.view(like.shape).transpose(1, 2), like.dtype).transpose(1, 2)


def accumulate(into: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """``into += a b`` (``into = a b`` the first time), in the dtype of ``into``, which is as wide as theirs or wider."""
    beta = 0 if first else 1
    if into.dtype == a.dtype:
        into.baddbmm_(a, b, beta=beta)
    elif not a.is_cuda:
        into.baddbmm_(a.to(into.dtype), b.to(into.dtype), beta=beta)
    elif adds_wide(a.device, a.dtype):
        torch.ops.aten.baddbmm.dtype_out(into, a, b, into.dtype, beta=beta, out=into)
    else:
        product = torch.bmm(a, b)
        _ = into.copy_(product) if first else into.add_(product)


@lru_cache(maxsize=8)
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Does a product of 16-bit matrices add to a part of a float32 tensor on this device: tried once (the overload is young)."""
    a, b = torch.ones(2, 64, 32, device=device, dtype=dtype), torch.ones(2, 32, 16, device=device, dtype=dtype)
    whole = torch.full((2, 80, 16), 257.0, device=device)
    into = whole[:, 8:72]
    try:
        torch.ops.aten.baddbmm.dtype_out(into, a, b, torch.float32, out=into)
        sums = bool((into == 289).all())
        torch.ops.aten.baddbmm.dtype_out(into, a, b, torch.float32, beta=0, out=into)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return sums and bool((into == 32).all()) and bool((whole[:, :8] == 257).all()) and into.data_ptr() == whole[:, 8:].data_ptr()


def _apart(tensor: Tensor) -> ExitStack:
    """Products in the dtypes that they are given; kernels of many widths are not timed one by one."""
    stack = ExitStack()
    stack.enter_context(products_as_given(tensor))
    if implementation_on(tensor.device.type) == "triton":
        from ..kernels.tuning import untimed

        stack.enter_context(untimed())
    return stack
