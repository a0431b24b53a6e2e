"""Launches as generated functions: the same results as the launches they come from, for the tensors they were made for alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.kernels import direct, launch
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.direct import FIRST_MARK, record
from fxfuse.kernels.launch import MOST_RECENT, Prepared
from fxfuse.program import parse
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME, residual_norm, rms_norm, swiglu


def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each look-up of a layout."""
    seen: list[int] = []
    plain = Prepared.look_up

    def counted(self: Prepared, *arguments: Any) -> list[Tensor]:
        seen.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(Prepared, "look_up", counted)
    return seen


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm_backward", "swiglu_backward", "rotary", "cross_entropy"])
def test_the_second_launch_of_a_layout_looks_nothing_up(name: str, monkeypatch) -> None:
    program = BY_NAME[name].program("bfloat16")
    leading = (6,) if program.rank == 1 else (2, 2, 3)
    seen, prepared = looked_up(monkeypatch), Prepared(program)
    for _ in range(3):
        tensors = BY_NAME[name].inputs(program, leading, 24, 1.0)
        assert not failures(program, tensors, prepared(tensors))
    assert len(seen) == 1


def test_other_shapes_strides_and_alignments_are_not_taken_for_known_ones(monkeypatch) -> None:
    program = rms_norm("float32")
    seen, prepared = looked_up(monkeypatch), Prepared(program)
    w, x = torch.randn(16), torch.randn(4, 16)
    apart, odd = torch.randn(4, 32)[:, ::2], torch.randn(65)[1:].view(4, 16)
    for k, given in enumerate((x, x[:3], torch.randn(2, 2, 16)[0], apart, odd, torch.randn(16, 4).t()), 1):
        for _ in range(2):
            assert not failures(program, [given, w], prepared([given, w]))
        assert len(prepared.launches) <= k
    assert len(seen) < 12


def test_more_layouts_than_are_tried_first_are_still_right(monkeypatch) -> None:
    program = rms_norm("float32")
    prepared = Prepared(program)
    for rows in 2 * [*range(1, MOST_RECENT + 4)]:
        tensors = [torch.randn(rows, 8), torch.randn(8)]
        assert not failures(program, tensors, prepared(tensors))
    assert len(prepared.recent[None]) == MOST_RECENT


def test_what_launches_do_not_depend_on_is_looked_up_once(monkeypatch) -> None:
    """A parameter and its detached copy lie alike; torch's guard tells them apart, launches need not."""
    program = rms_norm("float32")
    seen, prepared = looked_up(monkeypatch), Prepared(program)
    x, w = torch.randn(4, 8), torch.randn(8)
    for _ in range(3):
        for weight in (w, w.clone().requires_grad_()):
            prepared([x, weight])
    assert len(seen) == 2


@pytest.mark.parametrize(("name", "config"), [
    ("swiglu_backward", None), ("rms_norm_backward", None), ("swiglu_backward", Config(2, 0, 4, early=True)),
    ("residual_norm_backward", Config(2, 0, 4, early=True)), ("residual_norm_backward", Config(1, 0, 4, early=True, reload=True))])
def test_outputs_in_place_of_operands_have_the_same_bits(name: str, config: Config | None) -> None:
    program = BY_NAME[name].program("bfloat16")
    tensors = BY_NAME[name].inputs(program, (7,), 24, 1.0)
    prepared = Prepared(program, None if config is None else "rows", config)
    expected = [t.clone() for t in prepared(tensors)]
    place = next(i for i, a in enumerate(program.arguments) if a.name == "g_y")
    reuse = tuple(place if k == 0 and not o.sums_rows else None for k, o in enumerate(program.outputs))
    for _ in range(2):
        given = [t.clone() for t in tensors]
        results = prepared(given, reuse=reuse)
        assert results[0] is given[place]
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_operands_that_lie_otherwise_are_left_alone() -> None:
    program = swiglu("float32")
    gate, up = torch.randn(5, 24), torch.randn(24, 5).t()
    before = up.clone()
    for _ in range(2):
        y, = Prepared(program)([gate, up], reuse=(1,))
        assert y is not up
    assert torch.equal(up, before)


def test_a_tile_of_rows_is_written_over() -> None:
    """Part of a batch of one row: the stride of its first dimension, of one element, is that of the whole."""
    program = parse(str(swiglu("float32")).replace("rank=1", "rank=2").replace("[r|", "[r,r|"))
    whole, up = torch.randn(1, 12, 24), torch.randn(1, 6, 24)
    expected, = (t.clone() for t in Prepared(program)([whole[:, :6], up]))
    assert whole[:, :6].stride() != up.stride()
    kept, prepared = whole.clone(), Prepared(program)
    for _ in range(2):
        whole.copy_(kept)
        tile = whole[:, :6]
        y, = prepared([tile, up], reuse=(0,))
        assert y is tile
        assert torch.equal(whole, torch.cat([expected, kept[:, 6:]], 1))


def test_walks_along_a_row_overwrite_nothing() -> None:
    program = residual_norm("float32")
    x, r, w = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    before = [x.clone(), r.clone()]
    for prepared in (Prepared(program, "looped", Config(1, 16, 4)),):
        for _ in range(2):
            results = prepared([x, r, w], reuse=(0, 1))
            assert not failures(program, [*before, w], results)
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])
    results = Prepared(program, "looped", Config(1, 16, 4))([x, r, w], [x, *[None] * (len(program.outputs) - 1)])
    assert results[0] is x
    assert not failures(program, [*before, w], results)


def test_a_last_walk_stores_where_it_read(monkeypatch) -> None:
    """Logits become their gradient where they lie, without a copy: what is stored in the last walk is read by no other."""
    case = BY_NAME["softmax"]
    program = case.program("float32")
    prepared = Prepared(program, "looped", Config(1, 16, 4))
    for _ in range(2):
        x, = case.inputs(program, (3,), 40, 1.0)
        expected = reference.execute(program, [x])
        y, *_ = prepared([x], [x, *[None] * (len(program.outputs) - 1)])
        assert y is x
        torch.testing.assert_close(x, expected[0])
    assert len(prepared.recent) == 1


def test_some_outputs_are_given_and_others_made(monkeypatch) -> None:
    """A padded row: the caller's tensor has columns to spare."""
    program = residual_norm("float32")
    prepared, seen = Prepared(program), looked_up(monkeypatch)
    names = [output.name for output in program.outputs]
    for _ in range(3):
        tensors = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)]
        padded = torch.zeros(3, 12)
        given = [padded[:, :8] if name == "y" else None for name in names]
        results = prepared(tensors, given)
        assert results[names.index("y")] is given[names.index("y")]
        for ours, theirs in zip(results, reference.execute(program, tensors), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert padded[:, 8:].eq(0).all()
    assert len(seen) == 1


def test_listeners_hear_generated_launches() -> None:
    program, heard = swiglu("float32"), []
    prepared = Prepared(program)
    launch.listeners.append(heard.append)
    try:
        for _ in range(3):
            prepared([torch.randn(2, 8), torch.randn(2, 8)])
    finally:
        launch.listeners.remove(heard.append)
    assert heard == [program] * 3


class FlatLauncher:
    """Passes the tensors' addresses as arguments of the C function, after its own."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch: Callable[..., object]) -> None:
        self.launch = launch

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: object) -> None:
        self.launch(x, y, z, stream, function, False, True, None, None, *arguments)


class NestedLauncher(FlatLauncher):
    """Passes them as one tuple, with what describes them."""

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: object, *arguments: object) -> None:
        self.launch(x, y, z, stream, function, False, True, packed, *arguments[:3], None, None, ["kinds"], b"signature", arguments[3:])


@pytest.mark.parametrize(("kind", "nested"), [(FlatLauncher, False), (NestedLauncher, True)])
def test_the_arguments_of_the_c_launcher_are_found(kind: type, nested: bool) -> None:
    launcher = kind(len)  # some builtin: it is not called
    compiled = SimpleNamespace(run=launcher, function=77, packed_metadata=(4, 1, 0))
    found, arguments = record(compiled, 9, 2, (5, True))
    assert found is len
    assert launcher.launch is len
    assert arguments[:5] == (9, 1, 1, FIRST_MARK, 77)
    assert (arguments[-1] if nested else arguments[-4:]) == (FIRST_MARK + 1, FIRST_MARK + 2, 5, True)


def test_a_launcher_of_another_kind_is_called_as_it_is() -> None:
    assert record(SimpleNamespace(run=print), 1, 1, ()) is None
    launcher = FlatLauncher(len)
    launcher.global_scratch_size = 128
    assert record(SimpleNamespace(run=launcher, function=1, packed_metadata=()), 1, 1, ()) is None


@pytest.mark.parametrize("kind", [FlatLauncher, NestedLauncher])
def test_the_generated_function_calls_the_c_launcher_with_addresses_and_stream(kind: type, monkeypatch, capsys) -> None:
    monkeypatch.setattr(direct, "INTERPRETED", False)
    monkeypatch.setattr(direct, "current_device", lambda: -1)
    monkeypatch.setattr(direct, "current_stream", lambda index: 4242)
    kernel = SimpleNamespace(compiled=SimpleNamespace(run=kind(print), function=77, packed_metadata=(4, 1, 0)), numbers=(5, True))
    x = torch.randn(2, 8)
    form = direct.Form((2, 8), (8, 1), torch.float32)
    made = [direct.Made("y", form), direct.Made("z", form, "a0_0")]
    function = direct.compose([[x]], made, [direct.Stage(kernel, 9, ("a0_0", "y", "z"))], "[y, z]")
    assert function is not None
    y, z = function([x])
    assert z is x
    printed = capsys.readouterr().out
    assert printed.startswith("9 1 1 4242 77 ")
    inside = f"{x.data_ptr()}, {y.data_ptr()}, {x.data_ptr()}, 5, True"
    assert inside in printed if kind is NestedLauncher else inside.replace(",", "") in printed
    assert function([x[:1]]) is None
