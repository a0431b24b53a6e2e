"""What may run in tiles of rows and what may not; and that less lives then, by simulation and by count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.memory.tiles import tile, tiled_peak
from fxfuse.memory.tiles.live import Memory
from fxfuse.memory.tiles.loop import tile_rows
from fxfuse.memory.tiles.relations import relate
from fxfuse.memory.tiles.rows import SUMMED, WHOLE
from fxfuse.memory.tiles.segment import Segment
from fxfuse.memory.tiles.views import regrouped
from tests.tiled_graphs import LiveBytes, outputs, traced

ROWS, WIDTH, HIDDEN = 901, 32, 112


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate) * (x @ up)) @ down


def plain(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.gelu(x @ first) @ second


def packed(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ both).chunk(2, -1)
    return (F.silu(gate) * up) @ down


def parallel(x: Tensor, mixer: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x + torch.tanh(x @ mixer) + F.gelu(x @ first) @ second


def batched(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[B, S, K]: the rows are two dimensions, which matmuls see as one."""
    return gated(x.reshape(-1, WIDTH), gate, up, down).view(x.shape) + x


def weights(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) / shape[0] ** 0.5 for shape in shapes]


MLPS: dict[str, tuple[Callable[..., Any], list[tuple[int, int]]]] = {
    "gated": (gated, [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]),
    "plain": (plain, [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]),
    "packed": (packed, [(WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)]),
    "parallel": (parallel, [(WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]),
}


@pytest.mark.parametrize("kind", MLPS)
def test_any_mlp_leaves_no_wide_tensor_and_gives_the_same(kind: str) -> None:
    """Found by the graph. What is simulated is what is counted, before and after."""
    function, shapes = MLPS[kind]
    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights(*shapes)]
    gm = traced(lambda *args: [function(*args)], *inputs)
    with LiveBytes() as before:
        expected = outputs(gm, inputs)
    gm = traced(lambda *args: [function(*args)], *inputs)
    report = tile(gm, tiles=8)
    with LiveBytes() as after:
        found = outputs(gm, inputs)
    assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert (before.most, after.most) == (report.bytes_before, report.bytes_after)
    assert after.most < before.most / 3
    assert report.segments[0][1:] == (113, 8)


def test_rows_in_two_dimensions() -> None:
    inputs = [torch.randn(7, 131, WIDTH, dtype=torch.float64), *weights(*MLPS["gated"][1])]
    gm = traced(lambda *args: [batched(*args)], *inputs)
    expected = batched(*inputs)
    report = tile(gm, tiles=8)
    assert report.bytes_after < report.bytes_before / 2
    assert torch.allclose(outputs(gm, inputs)[0], expected, rtol=1e-12, atol=1e-12)


def backward(x: Tensor, g: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """Everything again and every gradient, written out."""
    a, b = x @ gate, x @ up
    s = torch.sigmoid(a)
    y, dy = a * s * b, g @ down.t()
    da, db = dy * b * s * (1 + a * (1 - s)), dy * a * s
    return [da @ gate.t() + db @ up.t(), x.t() @ da, x.t() @ db, y.t() @ g, (da + db).sum(0)]


def test_a_backward_sums_over_rows() -> None:
    """Gradients of weights and of a bias are sums over tiles."""
    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(2)] + weights(*MLPS["gated"][1])
    expected = backward(*inputs)
    gm = traced(backward, *inputs)
    report = tile(gm, tiles=8)
    with LiveBytes() as live:
        found = outputs(gm, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)
    assert live.most < report.bytes_before / 3


def gates_backward(a: Tensor, b: Tensor, g: Tensor, down: Tensor) -> list[Tensor]:
    """Of silu(a) * b before a product with ``down``; gate and up [T, H] are seen as [B, S, H], as in a model's layer."""
    batch, rows, flat = g.shape[:2], a.shape, g.flatten(0, 1)
    x, y, dy = (tensor.view(*batch, HIDDEN) for tensor in (a, b, flat @ down.t()))
    s = torch.sigmoid(x)
    da, db = dy * y * s * (1 + x * (1 - s)), dy * x * s
    return [(x * s * y).view(rows).t() @ flat, da.view(rows), db.view(rows)]


@pytest.mark.parametrize("tiles", [4, 8])
def test_results_are_laid_out_like_the_views_that_enter(tiles: int) -> None:
    """Saved matrices enter as views of more dimensions, and what a few tiles leave has those."""
    inputs = [torch.randn(917, HIDDEN, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.randn(7, 131, WIDTH, dtype=torch.float64), *weights((HIDDEN, WIDTH))]
    expected = gates_backward(*inputs)
    gm = traced(gates_backward, *inputs)
    with LiveBytes() as before:
        outputs(gm, inputs)
    gm = traced(gates_backward, *inputs)
    report = tile(gm, tiles=tiles)
    assert report.segments
    with LiveBytes() as after:
        found = outputs(gm, inputs)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(found, expected, strict=True))
    assert (before.most, after.most) == (report.bytes_before, report.bytes_after)
    assert after.most <= {4: 0.7, 8: 0.6}[tiles] * before.most


def test_a_limit_in_bytes_is_kept_with_as_few_tiles_as_do() -> None:
    inputs = [torch.randn(4096 + 1, WIDTH), *(w.float() for w in weights(*MLPS["gated"][1]))]
    gm = traced(lambda *args: [gated(*args)], *inputs)
    before = tiled_peak(gm.graph, 1).bytes
    report = tile(gm, limit_bytes=before // 2)
    assert report.bytes_after <= before // 2 < before == report.bytes_before
    with LiveBytes() as live:
        outputs(gm, inputs)
    assert live.most <= before // 2
    (_, rows, count), = report.segments
    fewer = traced(lambda *args: [gated(*args)], *inputs)
    assert tiled_peak(fewer.graph, count - 1).bytes > before // 2
    assert rows % 128 == 0


def test_other_lengths_than_the_traced_one_keep_the_rows_of_a_tile() -> None:
    """More rows are more tiles."""
    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights(*MLPS["gated"][1])]
    gm = traced(lambda *args: [gated(*args)], *inputs)
    tile(gm, tiles=4)
    run = lambda *args: outputs(gm, args)[0]  # noqa: E731
    peaks = []
    for rows in (1, 2, 127, 128, 900, 5 * ROWS, 0):
        x = torch.randn(rows, WIDTH, dtype=torch.float64)
        with LiveBytes() as live:
            found = run(x, *inputs[1:])
        peaks.append(live.most - x.nbytes)
        assert torch.allclose(found, gated(x, *inputs[1:]), rtol=1e-12, atol=1e-12)
    assert peaks[5] <= 1.05 * peaks[4]


def test_fewer_rows_than_were_compiled_for_are_cut_into_as_many_tiles() -> None:
    """A plan counts on them. (Down to tiles that hold next to nothing.)"""
    assert [tile_rows(total, 16384, 4) for total in (65536, 32768, 65920, 4096, 2048, 100)] == [16384, 8192, 13184, 1024, 1024, 100]
    assert tile_rows(131072, 16384, 4) == 16384
    assert tile_rows(900, 256, 4) == 256  # as many rows as were compiled for, where those are few


def test_one_tile_is_no_tile_and_two_wishes_are_none() -> None:
    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights(*MLPS["plain"][1])]
    gm = traced(lambda *args: [plain(*args)], *inputs)
    assert tile(gm, tiles=1).segments == []
    for wrong in ({}, {"tiles": 2, "limit_bytes": 1}):
        with pytest.raises(ValueError, match="a number of tiles or a limit"):
            tile(gm, **wrong)


NEAR_MISSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a norm over the batch": lambda x, a, b: ((x @ a) - (x @ a).mean(0)) @ b,
    "softmax over tokens": lambda x, a, b: (x @ a).softmax(0) @ b,
    "a running sum over tokens": lambda x, a, b: (x @ a).cumsum(0) @ b,
    "attention": lambda x, a, b: F.scaled_dot_product_attention((x @ a)[None], (x @ a)[None], (x @ a)[None])[0] @ b,
    "scores of rows with rows": lambda x, a, b: torch.tanh((x @ a) @ (x @ a).t()) @ x,
    "rows in reverse": lambda x, a, b: torch.tanh(x @ a).flip(0) @ b,
    "one row moved": lambda x, a, b: torch.cat([torch.tanh(x @ a)[1:], (x @ a)[:1]]) @ b,
    "rows sorted": lambda x, a, b: (x @ a).sort(0).values @ b,
    "rows and columns mixed": lambda x, a, b: (x @ a).t().reshape(-1, HIDDEN).relu() @ b,
    "dropout": lambda x, a, b: F.dropout(x @ a, 0.5) @ b,
    "rows picked": lambda x, a, b: (x @ a)[torch.arange(x.shape[0] - 1, -1, -1)] @ b,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_looks_across_rows_is_never_cut(name: str) -> None:
    """Whatever is tiled around it, the values are the same (and random numbers are drawn as before)."""
    function = NEAR_MISSES[name]
    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    gm = traced(lambda *args: [function(*args)], *inputs)
    across = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"} & {
        f"aten.{name}" for name in ("mean.dim", "_softmax.default", "cumsum.default", "flip.default", "sort.default", "index.Tensor",
                                    "native_dropout.default", "_scaled_dot_product_flash_attention_for_cpu.default")}  # fmt: skip
    torch.manual_seed(3)
    expected = function(*inputs)
    tile(gm, tiles=8)
    left = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}
    assert across <= left
    torch.manual_seed(3)
    assert torch.allclose(outputs(gm, inputs)[0], expected, rtol=1e-11, atol=1e-11)


def node_of(gm: torch.fx.GraphModule, target: Any) -> torch.fx.Node:
    return next(node for node in gm.graph.nodes if node.target is target)


def test_a_view_has_its_rows_where_as_much_lies_before_them() -> None:
    assert regrouped((0,), (35, 6), (5, 7, 6)) is not None
    for rows, source, target, found in [
        ((0, 1), (5, 7, 6), (35, 6), (0,)),
        ((0,), (35, 6), (5, 7, 2, 3), (0, 1)),
        ((1,), (3, 35, 6), (3, 5, 7, 6), (1, 2)),
        ((0,), (35, 6), (35, 1, 6), (0,)),
        ((0,), (35, 6), (1, 35, 6), (1,)),
        ((0,), (35, 6), (70, 3), None),
        ((0,), (35, 6), (6, 35), None),
        ((1,), (6, 35), (35, 6), None),
        ((0, 1), (5, 7, 6), (5, 42), None),
    ]:
        assert regrouped(rows, source, target) == found, (source, target)


def test_a_product_keeps_rows_or_sums_over_them() -> None:
    aten = torch.ops.aten
    x, w = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, HIDDEN)
    gm = traced(lambda x, w: [x @ w], x, w)
    product = node_of(gm, aten.mm.default)
    a, b = product.args
    assert relate(product, {a: (0,)}) == {product: (0,), a: (0,), b: WHOLE}
    assert relate(product, {b: (0,)}) == {product: SUMMED, a: (1,), b: (0,)}
    assert relate(product, {b: (1,)}) == {product: (1,), a: WHOLE, b: (1,)}
    assert relate(product, {product: (0,)}) == {product: (0,), a: (0,), b: WHOLE}
    assert relate(product, {}) is None
    gm = traced(lambda x, w: [torch.softmax(x @ w, 0)], x, w)
    softmax = node_of(gm, aten._softmax.default)
    assert relate(softmax, {softmax.args[0]: (0,)}) is None
    assert relate(softmax, {softmax.args[0]: (1,)}) is not None


def test_what_is_read_later_is_not_written_over() -> None:
    """The output may lie where an operand lay that the graph made and that dies, and nowhere else."""
    def keeps(x: Tensor, a: Tensor, b: Tensor, *, read: bool) -> list[Tensor]:
        y = x * x
        z = F.gelu(y @ a) @ b
        return [z, y * 2] if read else [z]

    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights(*MLPS["plain"][1])]
    for read in (False, True):
        gm = traced(lambda *args, read=read: keeps(*args, read=read), *inputs)
        memory = Memory(gm.graph)
        around = Segment.around(memory.order, node_of(gm, torch.ops.aten.gelu.default))
        assert around is not None
        for product in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            around = around.with_node(product)
            assert around is not None
        assert len(memory.places(around)) == (not read)
        expected = keeps(*inputs, read=read)
        report = tile(gm, tiles=8)
        with LiveBytes() as live:
            found = outputs(gm, inputs)
        assert live.most == report.bytes_after
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_is_written_over_lives_as_long_as_what_was_written() -> None:
    """A tile's result lies where an operand lay that dies in the part; that memory is still there when a later operation needs most."""
    def later(x: Tensor, a: Tensor, b: Tensor, wide: Tensor) -> list[Tensor]:
        z = F.gelu((x * x) @ a) @ b
        return [z, torch.sin(x @ wide)]

    inputs = [torch.randn(ROWS, WIDTH, dtype=torch.float64), *weights(*MLPS["plain"][1], (WIDTH, 3 * HIDDEN))]
    gm = traced(later, *inputs)
    memory = Memory(gm.graph)
    around = Segment.around(memory.order, node_of(gm, torch.ops.aten.gelu.default))
    for product in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[:2]:
        assert around is not None
        around = around.with_node(product)
    assert around is not None
    assert [(made.name, under.name) for made, under in memory.places(around).items()] == [("mm_1", "mul")]
    row = ROWS * torch.float64.itemsize
    assert memory.peak([around], fraction=1 / 8).bytes == (WIDTH + 2 * 3 * HIDDEN) * row  # z, the product, its sine
