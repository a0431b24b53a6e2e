"""What lives on the host between forward and backward, what lives on the device meanwhile, and how much of either."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from fxfuse._torch import FakeTensorMode
from fxfuse.fused_op import rows
from fxfuse.memory import offload_op, offload_runtime
from fxfuse.memory.offload import TAG, offload_saved
from fxfuse.memory.offload_entry import extent_of
from fxfuse.memory.offload_runtime import Transfers
from fxfuse.reuse import DONATED, plan_reuse

from ..offloading import Late, Stack, compiled_blocks, traffic

aten = torch.ops.aten
PRODUCT = ("program rank=1 math=float32\naxis a = ?\narg x : float32[r|a]\narg y : float32[r|a]\n"
           "%0 = load x a 0 1\n%1 = load y a 0 1\n%2 = mul %0 %1\nout z : float32[r|a] = %2 @ a 0 1")  # fmt: skip


class Halves:
    """A forward and a backward graph by hand, over fake CUDA tensors: the forward saves ``m = a @ b`` and returns ``m * b``."""

    def __init__(self, view: bool = False, written: bool = False, read: bool = True, returned: bool = False) -> None:
        self.mode = FakeTensorMode()
        graph = fx.Graph()
        a, b = (self.described(graph.placeholder(name)) for name in "ab")
        m = self.described(graph.call_function(aten.mm.default, (a, b)))
        saved = self.described(graph.call_function(aten.view.default, (m, (8, 8)))) if view else m
        if written:
            self.described(graph.call_function(aten.add_.Tensor, (saved, b)))
        op = graph.call_function(rows, ([saved, b], PRODUCT))
        op.meta["val"] = [self.fake()]
        result = self.described(graph.call_function(operator.getitem, (op, 0)))
        m.meta[TAG] = True
        graph.output((m if returned else result, b, saved, 3))
        self.forward = fx.GraphModule({}, graph)
        graph = fx.Graph()
        b, kept, tangent = (self.described(graph.placeholder(name)) for name in ("b", saved.name, "tangents_1"))
        kept.meta[DONATED] = True
        sum_ = self.described(graph.call_function(aten.mm.default, (tangent, b)))
        op = graph.call_function(rows, ([kept if read else b, sum_], PRODUCT))
        op.meta["val"] = [self.fake()]
        graph.output((self.described(graph.call_function(operator.getitem, (op, 0))),))
        self.backward = fx.GraphModule({}, graph)

    def described(self, node: fx.Node) -> fx.Node:
        node.meta["val"] = self.fake()
        return node

    def fake(self) -> Tensor:
        with self.mode:
            return torch.empty(8, 8, device="cuda")

    def offload(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that send, and those that bring back."""
        count = offload_saved(self.forward, self.backward, num_fwd_outputs=1)
        sent = self.forward.graph.find_nodes(op="call_function", target=offload_op.offload)
        back = self.backward.graph.find_nodes(op="call_function", target=offload_op.reload)
        assert len(sent) == len(back) == count
        return sent, back


@pytest.mark.parametrize("view", [False, True])
def test_what_is_saved_is_on_the_host(view: bool) -> None:
    graphs = Halves(view)
    (sent,), (back,) = graphs.offload()
    result, b, saved, number = graphs.forward.graph.output_node().args[0]
    assert (saved, number) == (sent, 3)
    assert [node.meta["val"].device.type for node in (result, b, saved)] == ["cuda", "cuda", "cpu"]
    assert (back.args[0].meta["val"].device.type, back.meta["val"].device.type) == ("cpu", "cuda")
    assert back.next.target is rows  # not before it is needed
    assert sent.prev is sent.args[0]  # as soon as it is there


@pytest.mark.parametrize("miss", ["untagged", "written", "unread"])
def test_what_stays(miss: str) -> None:
    """Near-misses: not in the plan; changed by the graph after it was saved; read by nobody."""
    graphs = Halves(written=miss == "written", read=miss != "unread")
    if miss == "untagged":
        for node in graphs.forward.graph.nodes:
            node.meta.pop(TAG, None)
    assert graphs.offload() == ([], [])


def test_what_is_returned_too_is_returned_from_the_device() -> None:
    graphs = Halves(returned=True)
    (sent,), _ = graphs.offload()
    result, _, saved, _ = graphs.forward.graph.output_node().args[0]
    assert (result.target, saved) == (aten.mm.default, sent)
    assert sent.args[-1]  # others may write to it
    assert not Halves().offload()[0][0].args[-1]


def test_nothing_is_written_where_a_tensor_leaves_from() -> None:
    """Its memory looks free after the last operation on it; the copy may not have run."""
    graphs = Halves()
    graphs.offload()
    assert plan_reuse(graphs.forward.graph) == {}
    alone = Halves()
    alone.forward.graph.output_node().args = ((alone.forward.graph.output_node().args[0][0],),)
    assert len(plan_reuse(alone.forward.graph)) == 1


def test_what_came_back_is_written_over_where_what_stayed_would_be() -> None:
    stayed = Halves()
    away = Halves()
    away.offload()
    assert [plan for graphs in (stayed, away) for plan in plan_reuse(graphs.backward.graph).values()] == [((0,), (0,))] * 2


@pytest.fixture
def device() -> Late:
    return Late()


@pytest.fixture
def transfers(device: Late, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    with traffic(monkeypatch, device) as ours:
        yield ours


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_one_block_is_under_way_at_a_time(transfers: Transfers, device: Late, recompute: bool) -> None:
    depth, held, graphs = 6, [], []
    model = compiled_blocks(Stack(depth, 8), recompute=recompute, seen=graphs)
    original = transfers.copies.wait

    def wait(stream: object, event: int) -> None:
        held.append(transfers.held_bytes())
        original(stream, event)

    device.wait = wait
    model(torch.randn(2, 4, 8)).sum().backward()  # compiles
    sent = transfers.counts.sent_bytes
    model(torch.randn(2, 4, 8)).sum().backward()
    block = (transfers.counts.sent_bytes - sent) / depth
    largest = 2 * 4 * 16 * 4
    assert block == (2 * 4 * 8 * 4 if recompute else 2 * 4 * (2 * 8 + 2 * 16) * 4)
    assert max(held) <= block + largest
    assert transfers.held_bytes() == 0
    assert transfers.counts.late == 0


BLOCKS = {
    "all leave": (["xxxx"] * 4, 4),
    "some stay": (["xx.x"] * 4, 3),
    "more in the last": (["xx.."] * 3 + ["xxxx"], 4),
    "more in the first": (["xxxx", "x", "x", "x"], 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_no_more_than_the_next_block_is_on_its_way_back(transfers: Transfers, name: str) -> None:
    """What stays on the device (``.``: its elements lie too far apart) leaves no room for tensors of a block after the next, and
    a block that sends less than this one is not followed by another."""
    graphs, most = BLOCKS[name]
    apart = torch.ones(8, 64)[:, :1]
    kept = [[transfers.send(torch.ones(64) if what != "." else apart, rank, len(graph)) for rank, what in enumerate(graph)]
            for graph in graphs]
    assert sum(held is apart for block in kept for held in block) == sum(graph.count(".") for graph in graphs)
    for block in reversed(kept):
        ahead = set()
        for held in block:
            if held is not apart:
                number = transfers.pool.find(held).owner.group.number
                assert torch.equal(transfers.take(held), torch.ones(64))
                ahead |= {entry.group.number for entry in transfers._arriving} - {number}
                assert transfers.held_bytes() <= most * 256
        assert len(ahead) <= 1
    assert transfers.held_bytes() == 0


def test_the_pool_does_not_grow_after_the_first_step(transfers: Transfers, device: Late) -> None:
    model = compiled_blocks(Stack(3, 8), recompute=True)
    sizes = []
    for rows_ in (4, 3, 4, 2, 4):
        model(torch.randn(2, rows_, 8)).sum().backward()
        device.finish()
        sizes.append(transfers.pool.bytes)
    assert len(set(sizes)) == 1  # smaller tensors find room where larger ones were
    assert transfers.pool.in_use() == 0


def layouts() -> dict[str, Tensor]:
    x = torch.arange(48.0).reshape(6, 8)
    return {"transposed": x.t(), "a part": x.flatten()[5:40].view(5, 7), "wider rows": x[:, :7], "expanded": x[:, :1].expand(6, 4)[:2],
            "bool": x > 20, "half": x.bfloat16(), "complex": torch.complex(x, -x), "scalar": x[3, 3]}  # fmt: skip


@pytest.mark.parametrize("name", layouts())
def test_values_and_layout_come_back(transfers: Transfers, name: str) -> None:
    tensor = layouts()[name]
    before = tensor.clone()
    kept = [transfers.send(tensor, 0, 1) for _ in range(3)]
    assert transfers.counts.sent == 3
    while kept:
        back = transfers.take(kept.pop())
        assert (back.dtype, back.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(back, before)
    assert transfers.counts.prefetched == 2


@pytest.mark.parametrize("tensor", [torch.ones(6, 32)[:, :8], torch.ones(0, 3), torch.ones(3, dtype=torch.complex64).conj()],
                         ids=["sparse", "empty", "conjugate"])
def test_what_no_plain_copy_moves_stays(transfers: Transfers, tensor: Tensor) -> None:
    assert transfers.send(tensor, 0, 1) is tensor
    assert transfers.take(tensor) is tensor
    assert sum(transfers.counts.kept.values()) == 1


def test_the_extent_is_what_lies_between_first_and_last() -> None:
    x = torch.ones(6, 32)
    assert [extent_of(t) for t in (x, x.t(), x[:, :8], x[1:3, 4], x[:, :1].expand(6, 5), x[:0])] == [192, 192, 168, 33, 161, 0]


def test_a_step_that_nobody_differentiates_lets_go_of_everything(transfers: Transfers, device: Late) -> None:
    for _ in range(600):
        transfers.send(torch.ones(4), 0, 1)
    device.finish()
    assert transfers.held_bytes() <= 16
    assert transfers.pool.bytes <= 1 << 9
    assert len(transfers._groups) < 300


def packed() -> tuple[Tensor, list[Tensor]]:
    """A product's result, and queries, keys and values in it."""
    whole = torch.arange(72.0).reshape(6, 12)
    return whole, [part.view(6, 2, 2).transpose(0, 1) for part in whole.split(4, dim=1)]


def test_parts_of_one_memory_are_copied_once(transfers: Transfers) -> None:
    kept = []
    for _ in range(3):
        whole, parts = packed()
        kept.append([transfers.send(part, 0, 1, False, whole, i, 3) for i, part in enumerate(parts)])
    assert transfers.counts.sent_bytes == 3 * whole.numel() * 4
    for _ in range(2):  # a graph that is kept is gone through again
        for saved in reversed(kept):
            back = [transfers.take(part) for part in saved]
            assert len({part.untyped_storage().data_ptr() for part in back}) == 1
            for ours, part in zip(back, packed()[1], strict=True):
                assert torch.equal(ours, part)
                assert ours.stride() == part.stride()
    transfers.clear()
    assert transfers.held_bytes() == 0


def test_parts_of_which_not_all_are_taken(transfers: Transfers, device: Late) -> None:
    """An exception came between; memory that the other parts were to be taken from is let go, and what was not taken is not lost."""
    whole, parts = packed()
    kept = [transfers.send(part, 0, 1, False, whole, i, 3) for i, part in enumerate(parts)]
    assert torch.equal(transfers.take(kept[1]), parts[1])
    for i in (2, 0, 1):
        assert torch.equal(transfers.take(kept[i]), parts[i])
    del kept
    device.finish()
    transfers.send(torch.ones(2), 0, 1)
    assert transfers.held_bytes() <= 8


def test_a_part_of_other_memory_stays(transfers: Transfers) -> None:
    """Were a graph to send a part after its whole was replaced, the part would not be looked for where it is not."""
    whole, parts = packed()
    other = parts[1].clone()
    kept = [transfers.send(parts[0], 0, 1, False, whole, 0, 2), transfers.send(other, 0, 1, False, whole, 1, 2)]
    assert kept[1] is other
    assert transfers.take(kept[1]) is other
    assert torch.equal(transfers.take(kept[0]), parts[0])
    another, parts = packed()
    assert transfers.send(parts[1], 0, 1, False, another, 1, 2) is parts[1]  # its first part was never sent


def test_nothing_leaves_while_a_cuda_graph_is_recorded(transfers: Transfers, device: Late) -> None:
    """What is recorded is run again later, when the host's part of it is over."""
    device.is_recording = lambda: True
    x = torch.ones(4)
    assert transfers.send(x, 0, 1) is x
    assert transfers.counts.kept == {"a CUDA graph is recorded": 1}


def test_the_report_tells_the_traffic_and_release_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_runtime, "_all", {})  # nothing was sent in this process before
    ours = offload_runtime.transfers(torch.device("cpu"))
    ours.pool.release()
    kept = [ours.send(torch.ones(4), 0, 1) for _ in range(2)]
    assert any(line.startswith("cpu: offloaded 2 tensors") for line in offload_runtime.told())
    held = ours.pool.bytes
    offload_runtime.release()
    assert ours.held_bytes() == 0
    assert [float(ours.take(tensor).sum()) for tensor in kept] == [4, 4]
    assert ours.pool.bytes == held > 0
    del kept
    offload_runtime.release()
    assert ours.pool.bytes == 0


def test_parts_of_one_product_go_with_it() -> None:
    """The first that is made takes the memory along, in whatever order they are saved."""
    mode = FakeTensorMode()
    forward, backward = fx.Graph(), fx.Graph()

    def described(node: fx.Node, *sizes: int) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty_strided(sizes, (12, 1), device="cuda")
        return node

    a = described(forward.placeholder("a"), 6, 12)
    product = described(forward.call_function(aten.mm.default, (a, a)), 6, 12)
    split = forward.call_function(aten.split.Tensor, (product, 4, 1))
    parts = [described(forward.call_function(operator.getitem, (split, i)), 6, 4) for i in range(3)]
    forward.output((a, *reversed(parts)))
    saved = [described(backward.placeholder(part.name), 6, 4) for part in reversed(parts)]
    backward.output((described(backward.call_function(aten.cat.default, (saved,)), 6, 4),))
    product.meta[TAG] = True
    graphs = [fx.GraphModule({}, graph) for graph in (forward, backward)]
    assert offload_saved(*graphs, num_fwd_outputs=1) == 3
    sent = forward.find_nodes(op="call_function", target=offload_op.offload)
    assert [(node.args[0], node.args[1], node.args[2:6]) for node in sent] == [
        (part, product, (0, 1, i, 3)) for i, part in enumerate(parts)]
    assert forward.output_node().args[0] == (a, *reversed(sent))
