"""Frozen weights with room beside them: what lies where, what reads it, and what must never be touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import roomy_weights
from fxfuse.capture import rooms
from fxfuse.fake_model import fake_mode
from fxfuse.products import augmented, calls
from fxfuse.reporting.records import GraphRecord
from fxfuse.roomy_weights import give_back, home_of, move, row_distance, with_tail
from fxfuse.validation import error_ratio
from tests.adapted_modules import Adapted, Attentionlike, GatedMLP, Kinds, compiled, step

WIDTH = 64


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are moved on this device too, and sums are augmented at any size."""
    monkeypatch.setattr(rooms, "DEVICES", ("cpu",))
    monkeypatch.setattr(augmented, "LEAST", 0)
    monkeypatch.setenv(rooms.SETTING, "1")


def weight(rows: int = 24, columns: int = 16) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns).bfloat16(), requires_grad=False)


def ratios(module: nn.Module, kinds: Kinds) -> dict[str, float]:
    """Of the output and every gradient of an optimized module: how much further from float64 than eager."""
    module = kinds.prepare(module)
    x = torch.randn(3, 40, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    truth, eager = step(exact, exact, x.double(), False), step(plain, plain, x.to(kinds.model), kinds.autocast)
    fxfuse.optimize(module, strict=True, remainder="eager")
    ours = step(module, module, x.to(kinds.model), kinds.autocast)
    assert set(ours) == set(eager)
    return {name: error_ratio(ours[name], eager[name], truth[name]) for name in eager}


@pytest.mark.parametrize("make", [Attentionlike, GatedMLP])
@pytest.mark.parametrize("options", [{}, dict(bias=True), dict(scales=(0.7, 2.0)), dict(dropout=0.1)], ids=str)
def test_every_gradient(make: type, options: dict, records: list[GraphRecord]) -> None:
    module = make(**options)
    assert max(ratios(module, Kinds()).values()) < 2.2
    source = records[-1].forward_source
    several = "dropout" in options or len(options.get("scales", ())) > 1  # (x has no room for several masks)
    assert source.count("'own')") == (0 if "dropout" in options else source.count("calls_beside("))
    assert several or source.count("calls_beside(") >= (3 if make is Attentionlike else 2)
    fxfuse.restore(module)


@pytest.mark.parametrize("kinds", [Kinds(adapters=torch.float32, autocast=True), Kinds(model=torch.float16, adapters=torch.float16)],
                         ids=str)  # fmt: skip
def test_other_dtypes(kinds: Kinds, records: list[GraphRecord]) -> None:
    assert max(ratios(GatedMLP(), kinds).values()) < 2.2
    assert records[-1].forward_source.count("'own')") == 2


def test_a_tail_that_is_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: what was in the room is read instead."""

    def unwritten(weight: Tensor, tail: Tensor, alpha: float, start: int, room: int) -> Tensor:
        return weight.data.as_strided((weight.shape[0], weight.shape[1] + room), weight.stride())

    monkeypatch.setattr(calls, "with_tail", unwritten)
    assert max(ratios(GatedMLP(), Kinds()).values()) > 20


def test_what_a_layer_of_an_8b_model_takes_in(monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord]) -> None:
    """Gate and up, not down: beside its thin term the residual stream goes by. Not backwards: gradients lie in the memory of what they
    are of, or come without room, and a copy costs as much as it saves."""
    monkeypatch.setattr(augmented, "LEAST", 1 << 22)
    monkeypatch.setattr(augmented, "is_promised", lambda value, room: room <= 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_mode():
            module, x = GatedMLP(4096, 14336, rank=16), torch.empty(2, 4096, 4096, requires_grad=True)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in name)
            compiled(module, validate="off")(x)
    finally:
        torch.set_default_dtype(torch.float32)
    taken = [line for line in records[-1].forward_source.splitlines() if "calls_beside(" in line]
    assert len(taken) == 2
    assert all("'own')" in line for line in taken)
    assert "calls_below(" not in records[-1].backward_source
    assert f"(0, torch.bfloat16, {row_distance(4096, 32) - 4096})" in records[-1].forward_source


def test_thin_products_are_moved_not_repeated(monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord]) -> None:
    """The gradient of an input that three linears share takes in three thin products, each of which still reads its gradient once."""
    monkeypatch.setattr(augmented, "COPY", 0.2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_mode():
            module, x = Attentionlike(4096, 1024, rank=16), torch.empty(2, 4096, 4096, requires_grad=True)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in name)
            compiled(module, validate="off")(x)
    finally:
        torch.set_default_dtype(torch.float32)
    source = records[-1].backward_source
    assert source.count("calls_below(") == source.count("calls_with_room(") == 1
    assert source.count("calls_thin_pair(") == 4
    assert source.count("calls_columns(") == 0


def test_moved_and_given_back() -> None:
    w = weight()
    values, whole = w.detach().clone(), w.untyped_storage().nbytes()
    identity = id(w)
    move(w, 6)
    assert torch.equal(w, values)
    assert w.stride() == (24, 1)
    assert not w.is_contiguous()
    home = home_of(w)
    assert home is not None
    assert home.room == 8
    assert give_back(w)
    assert not give_back(w)
    assert torch.equal(w, values)
    assert w.is_contiguous()
    assert w.untyped_storage().nbytes() == whole
    assert id(w) == identity
    assert home_of(w) is None


def test_what_is_written_is_what_is_read() -> None:
    w = weight()
    move(w, 12)
    values, version = w.detach().clone(), w._version
    for start, scale, ranks in ((0, 2.0, 4), (8, -1.0, 4), (3, 1.0, 5), (0, 0.5, 12)):  # another place, another width
        tail = torch.randn(24, ranks).bfloat16()
        wide = with_tail(w, tail, scale, start, 12)
        assert wide is not None
        assert wide.data_ptr() == w.data_ptr()
        zero = torch.zeros(24, 12).bfloat16()
        zero[:, start : start + ranks] = tail * scale
        assert torch.equal(wide, torch.cat([values, zero], 1))
    assert w._version == version
    assert torch.equal(w, values)


def test_a_view_that_looks_alike_is_left_alone() -> None:
    """Rows of somebody's wider matrix: its neighbours are not ours to write to."""
    w = weight()
    move(w, 8)
    matrix = torch.randn(24, 24).bfloat16()
    before, view, tail = matrix.clone(), matrix[:, :16], torch.randn(24, 8).bfloat16()
    assert view.stride() == w.stride()
    assert roomy_weights.is_promised(view, 8)
    assert with_tail(view, tail, 1.0, 0, 8) is None
    assert torch.equal(calls.beside(view, tail, 1.0, 0, 8, calls.OWN), torch.cat([before[:, :16], tail], 1))
    part = w.detach()[:12]  # some rows of ours are not the weight either
    assert with_tail(part, tail[:12], 1.0, 0, 8) is None
    assert torch.equal(matrix, before)


def test_another_stream_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    move(w, 8)
    whole = w.data.as_strided((24, 24), (24, 1)).clone()
    monkeypatch.setattr(roomy_weights, "_stream", lambda tensor: 7)
    tail = torch.randn(24, 8).bfloat16()
    assert with_tail(w, tail, 1.0, 0, 8) is None
    assert torch.equal(calls.beside(w, tail, 1.0, 0, 8, calls.OWN), torch.cat([w, tail], 1))
    assert torch.equal(w.data.as_strided((24, 24), (24, 1)), whole)


def test_too_little_room_is_none() -> None:
    w = weight()
    move(w, 8)
    assert not roomy_weights.is_promised(w, 16)
    tail = torch.randn(24, 16).bfloat16()
    assert torch.equal(calls.beside(w, tail, 1.0, 0, 16, calls.OWN), torch.cat([w, tail], 1))


def test_a_storage_that_is_gone_is_forgotten() -> None:
    w = weight()
    move(w, 8)
    layout = w.detach()
    w.data = torch.zeros(24, 16).bfloat16()
    assert home_of(w) is None
    assert home_of(layout) is not None  # as long as somebody holds it
    likeness = torch.empty_strided((24, 16), (24, 1), dtype=torch.bfloat16)
    del layout
    assert not roomy_weights.is_promised(likeness, 8)


def test_copies_have_no_room() -> None:
    w = weight()
    move(w, 8)
    for other in (copy.deepcopy(w), w.clone(), w.detach().to(torch.float32)):
        assert home_of(other) is None
        assert torch.equal(other, w.to(other.dtype))
    assert copy.deepcopy(w).is_contiguous()


def test_two_forwards_before_their_backwards() -> None:
    """The tail of the second lies where the first one's was; nothing that autograd keeps has changed."""
    module = Kinds().prepare(nn.Sequential(nn.RMSNorm(WIDTH), Adapted(WIDTH, 112)))
    plain = copy.deepcopy(module)
    fxfuse.optimize(module, strict=True, remainder="eager")
    xs = [torch.randn(2, 20, WIDTH).bfloat16() for _ in range(2)]
    for run in (module, plain):
        sum(run(x).float().pow(2).sum() for x in xs).backward()
    assert home_of(module[1].base.weight) is not None
    truth = copy.deepcopy(plain).double()
    truth.zero_grad()
    sum(truth(x.double()).pow(2).sum() for x in xs).backward()
    for ours, eager, exact in zip(module.parameters(), plain.parameters(), truth.parameters(), strict=True):
        if ours.grad is not None:
            assert error_ratio(ours.grad, eager.grad, exact.grad) < 2.2
