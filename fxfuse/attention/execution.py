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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .. import reference
from ..chunk_kernels import packed, products_as_given
from ..lowering import implementation_on
from .hiding import seen_keys
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
        """The queries of each chunk: the first, and the one after the last."""
        b, h, queries, _ = self.query.shape
        rows = self.rows or queries_in_chunk(b * h * self.key.shape[2] * self.query.element_size())
        return [(start, min(start + rows, queries)) for start in range(0, queries, rows)]

    @cached_property
    def seen(self) -> list[tuple[int, int]]:
        """The keys that each chunk sees: the first, and how many."""
        mask = self.prepared.mask
        if mask is None:
            return [(0, self.key.shape[2]) for _ in self.spans]
        name = self.prepared.forward.names[mask.position]
        found = seen_keys(widened(self.others[self.prepared.others.index(name)]), mask.hides, self.spans)
        return [(first, last - first) for first, last in found]

    @cached_property
    def named(self) -> list[dict[str, Tensor]]:
        """What each chunk reads beside its scores, by name: [b, kv, group, queries, keys] each; what does not vary has size 1."""
        arguments = {argument.name: argument for argument in self.prepared.forward.program.arguments}
        chunks: list[dict[str, Tensor]] = [{} for _ in self.spans]
        for name, tensor in zip(self.prepared.others, self.others, strict=True):
            whole, argument = self.by_group(widened(tensor)), arguments[name]
            parts = self.parts(whole) if argument.rows[-1] else [whole] * len(chunks)
            for chunk, part, (first, count) in zip(chunks, parts, self.seen, strict=True):
                chunk[name] = part.narrow(4, first, count) if isinstance(argument.columns, str) else part
        return chunks

    def parts(self, by_group: Tensor) -> Sequence[Tensor]:
        """Of a tensor with the queries along its dimension 3, the part of each chunk."""
        return by_group.split_with_sizes([stop - start for start, stop in self.spans], 3)

    def rows_of(self, matrix: Tensor) -> Sequence[Tensor]:
        """The rows of each chunk, of a matrix [b * kv, q * group, w]."""
        return matrix.split_with_sizes([(stop - start) * self.group for start, stop in self.spans], 1)

    def numbers(self, statistics: Sequence[Tensor]) -> list[list[Tensor]]:
        """What each chunk has of the row statistics."""
        by_statistic = [self.parts(self.by_group(numbers)) for numbers in statistics]
        return [[parts[i] for parts in by_statistic] for i in range(len(self.spans))]

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

    def scores(self, matrix: Tensor) -> Tensor:
        """A chunk's matrix [b * kv, q * group, n] as its row programs see it: [b, kv, group, q, n]."""
        return matrix.view(self.query.shape[0], -1, matrix.shape[1] // self.group, self.group, matrix.shape[2]).transpose(2, 3)


def matrices(tensor: Tensor) -> Tensor:
    """[b, kv, n, w] -> [b * kv, n, w]"""
    return packed(tensor).view(-1, *tensor.shape[2:])


def widened(tensor: Tensor) -> Tensor:
    """With the dimensions that are missing in front: [b or 1, h or 1, .., ..]"""
    return tensor if tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]


def forward(call: Attention) -> list[Tensor]:
    """The result, [b, h, q, e], and the row statistics, [b, h, q, 1]."""
    program = call.prepared.forward
    run = program.on(call.query.device.type)
    with products_as_given(call.query), _untimed(call.query):
        queries, keys, values = call.by_query(call.query), matrices(call.key), matrices(call.value)
        out, across = queries.new_empty(*queries.shape[:2], values.shape[2]), keys.transpose(1, 2)
        statistics = [torch.empty(*call.query.shape[:3], 1, dtype=reference.torch_dtype(output.dtype), device=out.device)
                      for output in program.program.outputs[1:]]
        chunks = zip(call.seen, call.rows_of(queries), call.rows_of(out), call.named, call.numbers(statistics), strict=True)
        for (first, count), q, result, named, numbers in chunks:
            matrix = torch.bmm(q, across.narrow(2, first, count))
            named[call.prepared.scores] = scores = call.scores(matrix)
            run([named[name] for name in program.names], [scores, *numbers])
            torch.bmm(matrix, values.narrow(1, first, count), out=result)
        return [call.by_head(out), *statistics]


def backward(call: Attention, arriving: Tensor, statistics: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of query, key and value, for the gradient of the result."""
    program = call.prepared.backward
    run = program.on(call.query.device.type)
    with products_as_given(call.query), _untimed(call.query):
        queries, keys, values = call.by_query(call.query), matrices(call.key), matrices(call.value)
        g_out, d_queries = call.by_query(arriving), torch.empty_like(queries)
        across, values_across = keys.transpose(1, 2), values.transpose(1, 2)
        d_keys, d_values = Sum(keys), Sum(values)
        chunks = zip(call.seen, call.rows_of(queries), call.rows_of(g_out), call.rows_of(d_queries), call.named,
                     call.numbers(statistics), strict=True)
        for (first, count), q, g, d_q, named, numbers in reversed(list(chunks)):  # behind a causal mask the last sees every key
            matrix = torch.bmm(q, across.narrow(2, first, count))
            g_matrix = torch.bmm(g, values_across.narrow(2, first, count))
            named |= zip(call.prepared.statistics, numbers, strict=True)
            named[call.prepared.scores] = scores = call.scores(matrix)
            named[call.prepared.cotangent] = g_weights = call.scores(g_matrix)
            run([named[name] for name in program.names], [scores, g_weights])
            torch.bmm(g_matrix, keys.narrow(1, first, count), out=d_q)
            d_keys.add(first, count, g_matrix.transpose(1, 2), q)
            d_values.add(first, count, matrix.transpose(1, 2), g)
        return [call.by_head(d_queries), d_keys.by_head(call.key), d_values.by_head(call.value)]


class Sum:
    """A sum over chunks of products [b * kv, keys, w], in float32 where the operands have 16 bits."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.empty(like.shape, dtype=torch.float32 if like.element_size() == 2 else like.dtype, device=like.device)
        self.begun = False

    def add(self, start: int, count: int, a: Tensor, b: Tensor) -> None:
        """Adds ``a b`` to the rows of some keys; what comes first need not be added where it gives every row."""
        first = not self.begun and count == self.total.shape[1]
        if not self.begun and not first:
            self.total.zero_()
        self.begun = True
        accumulate(self.total.narrow(1, start, count), a, b, first)

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
        torch.baddbmm(into, a, b, into.dtype, beta=beta, out=into)  # type: ignore[call-overload]
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
        torch.baddbmm(into, a, b, torch.float32, out=into)  # type: ignore[call-overload]
        sums = bool((into == 289).all())
        torch.baddbmm(into, a, b, torch.float32, beta=0, out=into)  # type: ignore[call-overload]
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return sums and bool((into == 32).all()) and bool((whole[:, :8] == 257).all()) and into.data_ptr() == whole[:, 8:].data_ptr()


def _untimed(tensor: Tensor) -> AbstractContextManager[None]:
    """Kernels of many widths are not timed one by one."""
    if implementation_on(tensor.device.type) != "triton":
        return nullcontext()
    from ..kernels.tuning import untimed

    return untimed()
