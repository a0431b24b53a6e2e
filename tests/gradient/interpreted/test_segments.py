"""Rows held in segments, blocks of equal width side by side: as right as eager, for every width, and as few exchanges as one block."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.kernels import single
from fxfuse.kernels.catalogue import segment_of
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.launch import Prepared
from fxfuse.program import Program
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME, CASES, Build, Case, of_width

# Of one axis, as wide as its arguments.
OF_ANY_WIDTH = sorted(c.name for c in CASES if [*dict(c.program("float32").axes).values()] == [None] and c.name != "functions")


def weightless_norm(dtype: str) -> Program:
    """A norm whose weight is frozen: nothing is summed over rows, all of the rest is."""
    b = Build(1)
    a = b.axis(None, "a")
    x, w = b.x("x", dtype, (True,), a), b.x("w", dtype, (False,), a)
    rstd = b.rsqrt(b.add(b.mean(a, b.square(x)), 1e-6))
    b.out("y", dtype, (True,), b.mul(w, b.cast(dtype, b.mul(x, rstd))), a)
    return b.build()


FROZEN = Case("frozen_norm_backward", weightless_norm, ("x",))


def norm_of_a_weight(dtype: str) -> Program:
    """A norm times w / |w|: all rows share a sum along the weight, too."""
    b = Build(1)
    a = b.axis(None, "a")
    x, w = b.x("x", dtype, (True,), a), b.x("w", dtype, (False,), a)
    rstd = b.rsqrt(b.add(b.mean(a, b.square(x)), 1e-6))
    b.out("y", dtype, (True,), b.mul(b.mul(x, rstd), b.div(w, b.sqrt(b.reduce("sum", a, b.square(w))))), a)
    b.out("rstd", "float32", (True,), rstd, None)
    return b.build()


@pytest.mark.parametrize(("reload", "early"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("block", [0, 8])
def test_what_all_rows_share_may_be_reduced_itself(block: int, reload: bool, early: bool) -> None:
    for wanted in ((), ("x", "w")):
        case = Case("norm_of_a_weight", norm_of_a_weight, wanted)
        program = case.program("float32")
        tensors = case.inputs(program, (7,), 37, 1.0)
        prepared = Prepared(program, "rows", Config(1, block, 4, per_unit=2, reload=reload, early=early))
        assert not failures(program, tensors, prepared(tensors))


def source_of(prepared: Prepared) -> str:
    made, = prepared.launches.values()
    return made.variant.source


@given(name=st.sampled_from([*OF_ANY_WIDTH, FROZEN.name]), dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
       count=st.sampled_from([3, 5, 7]), beside=st.sampled_from([0, 0, -1, -7, 1]), rows=st.integers(1, 9), reload=st.booleans(),
       early=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**20))
def test_segments_are_as_right_as_eager(name: str, dtype: str, count: int, beside: int, rows: int, reload: bool, early: bool,
                                        scale: float, seed: int) -> None:
    """Full segments, a last one that is cut short, and one that holds a single column."""
    case = FROZEN if name == FROZEN.name else BY_NAME[name]
    program = case.program(dtype)
    torch.manual_seed(seed)
    tensors = case.inputs(program, (rows,), 8 * count + beside, scale)
    prepared = Prepared(program, "rows", Config(1, 8, 4, stages=3, per_unit=2, reload=reload, early=early))
    assert not failures(program, tensors, prepared(tensors))
    source = source_of(prepared)
    last = count - 1 + (beside > 0)
    assert f"= {last} * B_" in source
    assert f"= {last + 1} * B_" not in source
    assert set(re.findall(r"(\w+) = \w+ < W_\w+", source)) == ({f"a_ok_{last}"} if beside else set())


@pytest.mark.parametrize(("columns", "segment"), [
    (4096, 0), (4097, 1024), (5120, 1024), (5121, 2048), (7168, 1024), (7169, 0), (8192, 0), (12288, 4096), (11008, 4096), (1024, 0),
    (1025, 512), (513, 0)])
def test_which_lengths_are_cut(columns: int, segment: int) -> None:
    """Where an eighth of one block at least would be empty otherwise."""
    assert segment_of(columns) == segment


@pytest.mark.parametrize(("name", "columns", "segments"), [
    ("shifted_softmax", 2560, True), ("shifted_softmax_backward", 5000, True), ("rms_norm_backward", 4700, True),
    ("rms_norm", 12288, True),
    ("shifted_softmax", 4000, False), ("rms_norm_backward", 2560, False), ("swiglu", 5120, False), ("cross_entropy", 40000, False)])
def test_what_is_held_in_segments_by_default(name: str, columns: int, segments: bool) -> None:
    program = of_width(BY_NAME[name].program("bfloat16"), columns)
    tensors = BY_NAME[name].inputs(program, (3,), columns, 1.0)
    prepared = Prepared(program)
    assert not failures(program, tensors, prepared(tensors))
    made, = prepared.launches.values()
    assert (made.kind == "rows" and made.config.block > 0) == segments


def test_lengths_that_change_are_one_kernel() -> None:
    """Keys of an attention: 2560, 3072 and 3584 of them are rows of one block of 4096, with the same source."""
    program = BY_NAME["shifted_softmax"].program("bfloat16")
    prepared = Prepared(program)
    for columns in (2560, 3072, 3584):
        prepared(BY_NAME["shifted_softmax"].inputs(program, (2,), columns, 1.0))
    assert len({made.variant.source for made in prepared.launches.values()}) == 1
    assert {made.config.block for made in prepared.launches.values()} == {0}


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward", "shifted_softmax", "shifted_softmax_backward"])
def test_threads_wait_for_one_another_as_often_as_for_one_block(name: str) -> None:
    program = BY_NAME[name].program("bfloat16")
    tensors = BY_NAME[name].inputs(program, (6,), 40, 1.0)
    exchanges = []
    for block in (0, 8):
        prepared = Prepared(program, "rows", Config(1, block, 4))
        prepared(tensors)
        walked = source_of(prepared).split("p_part = ")[0]
        exchanges.append(len(re.findall(r"tl\.sum\(|device\.row_max\(|device\.sums_of", walked)))
    assert exchanges[0] == exchanges[1] > 0


@pytest.mark.parametrize(("reload", "early"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward", "residual_norm_backward", "softmax_backward"])
def test_a_row_may_be_stored_where_it_was_read(name: str, reload: bool, early: bool) -> None:
    program = BY_NAME[name].program("bfloat16")
    config = Config(1, 8, 4, per_unit=2, reload=reload, early=early)
    tensors = BY_NAME[name].inputs(program, (9,), 40, 1.0)
    apart = Prepared(program, "rows", config)(tensors)
    taken = next(k for k, a in enumerate(program.arguments) if a.name.startswith("g_"))
    places = tuple(taken if k == 0 else None for k in range(len(program.outputs)))
    together = Prepared(program, "rows", config)(tensors, reuse=places)
    assert together[0].data_ptr() == tensors[taken].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_infinities_and_nan_reach_their_own_row_alone() -> None:
    for name in ("rms_norm", "softmax", "shifted_softmax", "row_peak", "layer_norm_backward", "shifted_softmax_backward"):
        program = BY_NAME[name].program("float32")
        tensors = BY_NAME[name].inputs(program, (6,), 40, 1.0)
        tensors[0][0, 3], tensors[0][2, 17], tensors[0][4, 39] = float("nan"), float("inf"), float("-inf")
        for reload in (False, True):
            assert not failures(program, tensors, Prepared(program, "rows", Config(1, 8, 4, reload=reload))(tensors)), name


@pytest.mark.parametrize(("name", "right", "wrong"), [
    ("rms_norm_backward", r" \+ (v\d+_3) \+ ", " + "), ("shifted_softmax", r"device\.maximum\((.*), b_x_4\)", r"\1"),
    ("layer_norm_backward", r"sum_d_w_0_2 \+= \w+", "pass")])
def test_a_segment_left_out_is_seen(name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emit, program, planted = single.emit, BY_NAME[name].program("float32"), []

    def faulty(*args: object, **kwargs: object) -> str:
        changed, count = re.subn(right, wrong, emit(*args, **kwargs))  # type: ignore[arg-type]
        planted.append(count)
        return changed

    tensors = BY_NAME[name].inputs(program, (9,), 40, 100.0 if name == "shifted_softmax" else 1.0)
    tensors[0][:, 39] += 1000.0 if name == "shifted_softmax" else 0.0
    assert not failures(program, tensors, Prepared(program, "rows", Config(1, 8, 4))(tensors))
    monkeypatch.setattr(single, "emit", faulty)
    assert failures(program, tensors, Prepared(program, "rows", Config(1, 8, 4))(tensors))
    assert any(planted)
