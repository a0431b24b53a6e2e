"""Running ``attention``: a loop over chunks of queries, in which the library's products and one derived row kernel take turns.

    for each chunk of queries, over the keys that it sees:
        scores  = queries keys'
        weights, statistics = row program(scores, others)
        out     = weights values

    and in the backward
        scores  = queries keys'                                    g_weights = g_out values'
        weights, d_scores = row program(scores, others, statistics, g_weights)
        d_queries = d_scores keys      d_keys += d_scores' queries      d_values += weights' g_out        (sums in float32)

Query heads that share a key/value head are rows of one product. Tensors are [batch, heads, length, width]; results have the heads
behind the length in memory, which is how the next projection reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..lowering import Launcher, implementation_on, launcher
from ..program import Program
from .hiding import Spans, mask_of, seen_keys
from .programs import backward_program, cotangent_of, statistics_of, weights_of

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
    program: Program  # with its statistics
    scores: str
    rows: int = 0  # queries in a chunk; 0: as many as the budget allows

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        b, h, queries, _ = self.query.shape
        rows = self.rows or queries_in_chunk(b * h * self.key.shape[2] * self.query.element_size())
        return [(start, min(start + rows, queries)) for start in range(0, queries, rows)]

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The others by name, with all four dimensions."""
        names = [a.name for a in self.program.arguments if a.name != self.scores]
        return {name: tensor[(None,) * (4 - tensor.dim())] for name, tensor in zip(names, self.others, strict=True)}

    @cached_property
    def keys(self) -> Tensor:
        return self.key.reshape(-1, *self.key.shape[2:])

    @cached_property
    def values(self) -> Tensor:
        return self.value.reshape(-1, *self.value.shape[2:])

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that they see."""
        for (start, stop), (first, last) in zip(self.spans, self._seen(), strict=True):
            yield slice(start, stop), slice(first, last)

    def _seen(self) -> Spans:
        mask = mask_of(self.program_alone, self.scores)
        if mask is None:
            return tuple((0, self.key.shape[2]) for _ in self.spans)
        return seen_keys(self.named[self.program.arguments[mask.position].name], mask.hides, self.spans)

    @cached_property
    def program_alone(self) -> Program:
        return replace(self.program, outputs=self.program.outputs[:1])

    def folded(self, tensor: Tensor, queries: slice) -> Tensor:
        """[b, h, q, w] -> [b * kv, heads of a group and queries of the chunk, w]."""
        groups = self.keys.shape[0]
        return tensor[:, :, queries].reshape(groups, -1, tensor.shape[-1])

    def unfolded(self, matrix: Tensor, queries: slice) -> Tensor:
        b, h = self.query.shape[:2]
        return matrix.view(b, h, queries.stop - queries.start, matrix.shape[-1])

    def arguments(self, program: Program, given: dict[str, Tensor], queries: slice, keys: slice) -> list[Tensor]:
        """The tensors of a program for a chunk; what is ``given`` is the chunk's own."""
        return [given[a.name] if a.name in given else self._part(a.name, queries, keys) for a in program.arguments]

    def _part(self, name: str, queries: slice, keys: slice) -> Tensor:
        """What a chunk reads of another operand."""
        tensor = self.named[name]
        argument = self.program.argument(name)
        if argument.rows[-1]:
            tensor = tensor[:, :, queries]
        return tensor[..., keys] if isinstance(argument.columns, str) else tensor


def forward(call: Attention) -> list[Tensor]:
    """The result, [b, h, q, e], and the row statistics, [b, h, q, 1]."""
    b, h, queries, _ = call.query.shape
    out = call.query.new_empty(b, queries, h, call.value.shape[-1]).transpose(1, 2)
    numbers: list[list[Tensor]] = [[] for _ in call.program.outputs[1:]]
    run, places = _prepared(call.program, call.query, {weights_of(call.program): call.scores})
    with _apart(call.query):
        for rows, seen in call.chunks():
            scores = torch.bmm(call.folded(call.query, rows), call.keys[:, seen].transpose(1, 2))
            arguments = call.arguments(call.program, {call.scores: call.unfolded(scores, rows)}, rows, seen)
            weights, *statistics = run(arguments, places)
            matrix = weights.reshape(call.keys.shape[0], -1, weights.shape[-1])
            out[:, :, rows] = call.unfolded(torch.bmm(matrix, call.values[:, seen]), rows)
            for parts, part in zip(numbers, statistics, strict=True):
                parts.append(part)
    return [out, *(torch.cat(parts, 2) for parts in numbers)]


def backward(call: Attention, arriving: Tensor, statistics: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of query, key and value, for the gradient of the result."""
    program = backward_program(call.program, call.scores)
    saved = dict(zip(statistics_of(call.program), statistics, strict=True))
    b, h, queries, width = call.query.shape
    d_query = call.query.new_empty(b, queries, h, width).transpose(1, 2)
    wide = torch.float32 if call.query.element_size() == 2 else call.query.dtype
    d_keys, d_values = (torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (call.keys, call.values))
    outputs = [output.name for output in program.outputs]
    run, places = _prepared(program, call.query, dict(zip(outputs, (call.scores, cotangent_of(call.program)), strict=True)))
    with _apart(call.query):
        for rows, seen in call.chunks():
            q, g = call.folded(call.query, rows), call.folded(arriving, rows)
            scores = torch.bmm(q, call.keys[:, seen].transpose(1, 2))
            g_weights = torch.bmm(g, call.values[:, seen].transpose(1, 2))
            given = {name: tensor[:, :, rows] for name, tensor in saved.items()}
            given |= {call.scores: call.unfolded(scores, rows), cotangent_of(call.program): call.unfolded(g_weights, rows)}
            weights, d_scores = (t.reshape(scores.shape) for t in run(call.arguments(program, given, rows, seen), places))
            d_query[:, :, rows] = call.unfolded(torch.bmm(d_scores, call.keys[:, seen]), rows)
            accumulate(d_keys[:, seen], d_scores.transpose(1, 2), q)
            accumulate(d_values[:, seen], weights.transpose(1, 2), g)
    return [d_query, *(t.to(like.dtype).view(like.shape) for t, like in ((d_keys, call.key), (d_values, call.value)))]


def _prepared(program: Program, like: Tensor, instead: dict[str, str]) -> tuple[Launcher, tuple[int | None, ...]]:
    """The launcher of a program, and for each output the argument in whose place it is stored where whole rows are read before."""
    position = {argument.name: i for i, argument in enumerate(program.arguments)}
    dtype = {argument.name: argument.dtype for argument in program.arguments}
    places = tuple(position[instead[o.name]] if o.name in instead and dtype[instead[o.name]] == o.dtype else None
                   for o in program.outputs)
    return launcher(str(program), like.device.type), places


def accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``into += a b``, in the dtype of ``into``, which is as wide as theirs or wider."""
    if into.dtype == a.dtype:
        into.baddbmm_(a, b)
    elif not a.is_cuda:
        into.baddbmm_(a.to(into.dtype), b.to(into.dtype))
    elif adds_wide(a.device, a.dtype):
        torch.ops.aten.baddbmm.dtype_out(into, a, b, into.dtype, out=into)
    else:
        into.add_(torch.bmm(a, b))


@lru_cache(maxsize=8)
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Does a product of 16-bit matrices add to a part of a float32 tensor on this device: tried once (the overload is young)."""
    a, b = torch.ones(2, 64, 32, device=device, dtype=dtype), torch.ones(2, 32, 16, device=device, dtype=dtype)
    whole = torch.full((2, 80, 16), 257.0, device=device)
    into = whole[:, 8:72]
    try:
        torch.ops.aten.baddbmm.dtype_out(into, a, b, torch.float32, out=into)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((into == 289).all()) and bool((whole[:, :8] == 257).all()) and into.data_ptr() == whole[:, 8:].data_ptr()


def _apart(tensor: Tensor) -> ExitStack:
    """Products in the dtypes that they are given, whatever autocast says; kernels of many widths are not timed one by one."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    if implementation_on(tensor.device.type) == "triton":
        from ..kernels.tuning import untimed

        stack.enter_context(untimed())
    return stack
