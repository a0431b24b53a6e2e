"""What a comparison of products takes of memory: it runs inside a training step, whose budget may be full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxfuse.kernels import room, thin_choice, thin_sites, tuning
from fxfuse.kernels.launch import prepare
from fxfuse.products import check
from tests.kernel_programs import swiglu
from tests.tiled_graphs import LiveBytes

COLUMNS, CONTRACTION, RANK = 3072, 2048, 16
WEIGHT = COLUMNS * CONTRACTION * 2  # bytes


def _sum(rows: int = 2, frozen: bool = True) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """``x W' + h B'`` as two products and a sum, and as one product that adds; with the leaves."""
    graph = fx.Graph()
    x, weight, h, thin = (graph.placeholder(name) for name in ("x", "weight", "h", "thin"))
    values = [torch.empty(rows, 64, CONTRACTION, dtype=torch.bfloat16, device="meta"),
              torch.empty(COLUMNS, CONTRACTION, dtype=torch.bfloat16, device="meta", requires_grad=not frozen),
              torch.empty(rows, 64, RANK, dtype=torch.bfloat16, device="meta"),
              torch.empty(COLUMNS, RANK, dtype=torch.bfloat16, device="meta")]  # fmt: skip
    for node, value in zip((x, weight, h, thin), values, strict=True):
        node.meta["example_value"] = value
    wide, narrow = graph.call_function(F.linear, (x, weight)), graph.call_function(F.linear, (h, thin))
    before = graph.call_function(torch.add, (wide, narrow))
    across = graph.call_function(torch.ops.aten.t.default, (thin,))
    after = graph.call_function(torch.addmm, (wide, h, across))
    for node in (wide, narrow, before, after):
        node.meta["example_value"] = torch.empty(rows, 64, COLUMNS, dtype=torch.bfloat16, device="meta")
    across.meta["example_value"] = values[3].t()
    return before, after, [x, weight, h, thin]


def _judged(gradients: bool, monkeypatch: pytest.MonkeyPatch, **kw: bool) -> tuple[check.Verdict, int]:
    monkeypatch.setattr(check, "LARGE", 1 << 18)
    before, after, leaves = _sum(**kw)
    wanted = [gradients and not check._is_frozen(leaf) for leaf in leaves]
    with LiveBytes() as live:
        verdict = check._judge([before], [after], leaves, wanted, torch.device("cpu"))
    return verdict, live.most


@pytest.mark.parametrize("gradients", [False, True])
def test_no_weight_is_copied_as_a_whole(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, most = _judged(gradients, monkeypatch)
    assert not verdict.reason
    # The weight itself, and data of as many bytes twice; with gradients autograd keeps the float64 blocks, four times as much.
    assert most < (8 if gradients else 3.5) * WEIGHT


def test_a_trained_weights_gradient_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, most = _judged(True, monkeypatch, frozen=False)
    assert not verdict.reason
    assert most > 8 * WEIGHT  # float64, and its gradient


def test_blocks_find_what_a_whole_product_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong factor in one column of a large weight."""
    monkeypatch.setattr(check, "LARGE", 1 << 18)
    before, after, leaves = _sum()
    after.kwargs = {"alpha": 1.5}
    verdict = check._judge([before], [after], leaves, [False] * 4, torch.device("cpu"))
    assert "times as far from float64" in verdict.reason
    drawn = [check._draw(leaf, 16, 1.0, torch.Generator().manual_seed(1)) for leaf in leaves]
    blocks = check._run([before], leaves, drawn, [False] * 4, torch.float64)[0]
    monkeypatch.setattr(check, "LARGE", 1 << 40)
    whole = check._run([before], leaves, drawn, [False] * 4, torch.float64)[0]
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)


def test_nothing_is_timed_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 900)
    assert room.is_there(1 << 40, device)
    try:
        room.limit(device, 1000)
        assert room.is_there(100, device)
        assert not room.is_there(101, device)
        assert room.is_there(101, torch.device("cpu"))
        assert room.is_there(101, torch.device("cuda", 1))
    finally:
        room.limit(device, None)
    assert room.is_there(101, device)


def test_the_least_of_several_limits_holds_and_each_goes_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is optimized anew leaves a governor that is freed whenever the garbage collector runs: in the middle of a step."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 900)
    try:
        room.limit(device, 2000, owner=1)
        room.limit(device, 1000, owner=2)
        assert not room.is_there(101, device)
        room.limit(device, None, owner=1)
        assert not room.is_there(101, device)
        room.limit(device, 1500, owner=2)
        assert room.is_there(600, device)
        assert not room.is_there(601, device)
    finally:
        room.limit(device, None, owner=1)
        room.limit(device, None, owner=2)
    assert room.is_there(1 << 40, device)


def test_results_are_compared_in_blocks_as_they_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_choice, "COMPARED", 64)
    truth = torch.randn(37, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    ours = truth.clone()
    with LiveBytes() as live:
        assert thin_choice._agree([truth], [ours], torch.bfloat16)
    assert live.most < truth.numel() * 2
    ours[36] *= -1  # the last row, which is a block of its own
    assert not thin_choice._agree([truth], [ours], torch.bfloat16)
    assert not thin_choice._agree([truth], [torch.full_like(truth, torch.nan)], torch.bfloat16)


def test_a_first_launch_has_memory_for_its_results_alone() -> None:
    """What a kernel is made for are forms of its results: as large as they, they would be there beside them, in the step's peak."""
    program = swiglu("bfloat16")
    gate, up = torch.ones(6, 128, dtype=torch.bfloat16)[:, :64], torch.ones(6, 64, dtype=torch.bfloat16)
    (form,) = prepare(program).written((gate, up), None)
    assert (form.is_meta, form.shape, form.stride(), form.dtype) == (True, gate.shape, (64, 1), torch.bfloat16)
    given = [torch.empty_like(gate)]
    assert prepare(program).written((gate, up), given) is given


def test_launches_are_timed_where_there_is_room_for_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tuning, "_worth_timing", lambda *_: True)
    monkeypatch.setattr(tuning, "default", lambda *_: "the rule of thumb")
    monkeypatch.setattr(tuning, "shared_memory", lambda *_: 0)
    monkeypatch.setattr(room, "is_there", lambda needed, device: bool(asked.append(needed)))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "key_of", lambda *_: "a launch that nobody has timed")
    found = tuning.choose(None, "rows", None, torch.device("cpu"), 1 << 30, lambda config: None, made=3 << 30)  # type: ignore[arg-type]
    assert found == "the rule of thumb"
    assert asked == [tuning.OTHER_BYTES + (3 << 30)]


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("what a plan leaves need not be free in one piece")


def test_a_launch_that_there_is_no_memory_to_time_takes_the_rule_of_thumb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit tells how many bytes may be allocated, not whether they are free in one piece; without one nobody has looked."""
    monkeypatch.setattr(tuning, "_worth_timing", lambda *_: True)
    monkeypatch.setattr(tuning, "default", lambda *_: "the rule of thumb")
    monkeypatch.setattr(tuning, "shared_memory", lambda *_: 0)
    monkeypatch.setattr(tuning, "candidates", lambda *_: ["one", "another"])
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "key_of", lambda *_: "a launch that nobody has timed")
    monkeypatch.setattr(tuning, "times_on_device", out_of_memory)
    found = tuning.choose(None, "rows", None, torch.device("cpu"), 1 << 30, lambda config: lambda: None)  # type: ignore[arg-type]
    assert found == "the rule of thumb"


def test_thin_products_that_there_is_no_memory_to_time_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_choice, "INTERPRETED", False)
    monkeypatch.setattr(thin_choice, "_suits", lambda large: True)
    monkeypatch.setattr(thin_choice, "_key", lambda asked: "products that nobody has timed")
    monkeypatch.setattr(thin_choice, "_chosen", {})
    monkeypatch.setattr(thin_choice, "_launches", {})
    monkeypatch.setattr(thin_choice, "_timed", out_of_memory)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    left, right = torch.ones(32, 16, dtype=torch.bfloat16), torch.ones(16, 64, dtype=torch.bfloat16)
    out = torch.zeros(32, 64, dtype=torch.bfloat16)
    assert thin_choice.outer(left, right, out, 0.5) is None
    assert (out == 8.0).all()


def test_a_sum_that_there_is_no_memory_to_try_is_added_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, left, right = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((32, 64), (32, 16), (16, 64)))
    monkeypatch.setattr(torch, "empty_like", out_of_memory)
    assert thin_sites.accumulating_site()(buffer, left, right, 0.5) is buffer
    assert (buffer == 9.0).all()
