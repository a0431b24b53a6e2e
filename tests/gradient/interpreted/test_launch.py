"""What a launch promises besides the numbers: edges, errors, layouts, determinism, splitting, and that the judge sees faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fxfuse import reference
from fxfuse.errors import EmissionError
from fxfuse.kernels import catalogue, configuration, launch, library, tuning
from fxfuse.kernels.catalogue import has_reductions
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.launch import Prepared, prepare, run
from fxfuse.kernels.single import Launch
from fxfuse.program import parse
from fxfuse.residuals import plan_residuals
from tests.kernel_judge import failures
from tests.kernel_programs import (
    BY_NAME,
    cross_entropy,
    rms_norm,
    rotary,
    swiglu,
)


def inputs(name: str, program, leading=(13,), columns=24):
    return BY_NAME[name].inputs(program, leading, columns, 1.0)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "softmax", "column_sums", "rms_norm_backward"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_no_rows_and_no_columns(name: str, shape: tuple[int, int]) -> None:
    program = BY_NAME[name].program("float32")
    tensors = inputs(name, program, shape[:1], shape[1])
    for ours, theirs in zip(run(program, tensors), reference.execute(program, tensors), strict=True):
        assert torch.allclose(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("label", [-1, 7, 2**40])
@pytest.mark.parametrize("kind", ["rows", "looped"])
def test_a_label_out_of_range_is_an_index_error(label: int, kind: str) -> None:
    program = cross_entropy("float32")
    tensors = [torch.randn(3, 7), torch.tensor([[0], [label], [-100]])]
    with pytest.raises(IndexError, match="out of bounds"):
        Prepared(program, kind, Config(1, 4, 4))(tensors)


def test_int32_labels() -> None:
    program = cross_entropy("float32")
    text = str(program).replace("int64", "int32")
    narrow = parse(text).verify()
    tensors = [torch.randn(6, 9), torch.tensor([[0], [8], [-100], [3], [4], [5]], dtype=torch.int32)]
    assert not failures(narrow, tensors, run(narrow, tensors))


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward", "residual_norm_backward"])
def test_long_rows_with_sums_are_loaded_again_longer_ones_walked_in_blocks_and_then_split(name: str, monkeypatch) -> None:
    monkeypatch.setattr(catalogue, "COLUMNS_BESIDE_SUMS", 16)
    program = BY_NAME[name].program("bfloat16")
    tensors = inputs(name, program, (21,), 70)
    for whole, columns, launched in ((1024, 16, "rows"), (16, 1024, "looped"), (16, 16, "SplitLaunch")):
        monkeypatch.setattr(catalogue, "COLUMNS_AND_SUMS", whole)
        monkeypatch.setattr(catalogue, "COLUMNS_OF_SUMS", columns)
        prepared = Prepared(program)
        assert not failures(program, tensors, prepared(tensors))
        assert [getattr(made, "kind", type(made).__name__) for made in prepared.launches.values()] == [launched]


@pytest.mark.parametrize("kind", ["rows"])
def test_sums_over_rows_repeat_bit_for_bit(kind: str) -> None:
    program = BY_NAME["rms_norm_backward"].program("float32")
    tensors = inputs("rms_norm_backward", program, (57,), 33)
    first = Prepared(program, kind, Config(2, 0, 4, per_unit=3))(tensors)
    second = Prepared(program, kind, Config(2, 0, 4, per_unit=3))(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_prepared_program_keeps_one_launch_a_layout_and_counts_launches() -> None:
    program = rms_norm("float32")
    prepared, seen = Prepared(program), []
    launch.listeners.append(seen.append)
    try:
        for rows in (4, 4, 6):
            prepared([torch.randn(rows, 8), torch.randn(8)])
    finally:
        launch.listeners.remove(seen.append)
    assert seen == [program] * 3
    assert len(prepared.launches) == 2
    assert prepare(program) is prepare(program)


def test_outputs_given_by_the_caller_are_written() -> None:
    program = swiglu("float32")
    gate, up = torch.randn(5, 24), torch.randn(5, 24)
    out = torch.empty(5, 24)
    result, = Prepared(program)([gate, up], [out])
    assert result is out
    assert not failures(program, [gate, up], [out])


def test_rows_are_walked_in_memory_order_and_merged() -> None:
    """A transposed query [batch, heads, positions, d] is two dimensions: tokens, and the heads that share a table."""
    program = rotary("float32", 16)
    x = torch.randn(2, 5, 3, 16).transpose(1, 2)
    tables = [torch.randn(2, 1, 5, 16) for _ in range(2)]
    prepared = Prepared(program)
    y, = prepared([x, *tables])
    made, = prepared.launches.values()
    assert "n_1" in made.variant.source
    assert "n_2" not in made.variant.source
    assert y.stride() == x.stride()


def test_dense_maps_become_one_row() -> None:
    program = swiglu("float32")
    prepared = Prepared(program, "tiled", Config(1, 64, 4))
    tensors = [torch.randn(10, 2048), torch.randn(10, 2048)]
    assert not failures(program, tensors, prepared(tensors))
    made, = prepared.launches.values()
    assert "n_rows" not in made.variant.source
    assert made.instances == 10 * 2048 // 64


@pytest.mark.parametrize(("tensors", "reason"), [
    ([torch.randn(4, 8).double(), torch.randn(8)], "cast it"),
    ([torch.randn(4, 8), torch.randn(9)], "last dimension"),
    ([torch.randn(4, 8), torch.randn(4, 8)], "broadcasts"),
    ([torch.randn(2, 4, 8), torch.randn(8)], "more dimensions"),
    ([torch.randn(4, 8)], "1 were given"),
])
def test_tensors_that_do_not_fit_are_refused_with_a_sentence(tensors, reason: str) -> None:
    with pytest.raises(EmissionError, match=reason):
        run(rms_norm("float32"), tensors)


# (program, schedule, what stands in the emitted source, what a faulty emitter would have written)
FAULTS = [
    ("rms_norm", "rows", "+ 1e-06", "+ 1e-01"),
    ("rms_norm", "rows", "tl.sum(tl.where(a_ok, ", "0.97 * tl.sum(tl.where(a_ok, "),
    ("rms_norm", "rows", "device.round_to(v9, tl.bfloat16).to(tl.float32)", "device.round_to(v9, tl.float16).to(tl.float32) * 1.01"),
    ("rms_norm", "rows", "W_a, tl.float32)", "B_a, tl.float32)"),
    ("rms_norm", "looped", "tail = W_a // B_a * B_a", "tail = W_a // B_a * B_a + 1"),
    ("rms_norm", "looped", "total3 += v2_a0\n", "total3 = v2_a0\n"),
    ("rms_norm_backward", "rows", "tl.where(row_ok, ", "tl.where(row_ok | True, 1.0 + "),
    ("rms_norm_backward", "rows", "tl.num_programs(0)", "(tl.num_programs(0) + 1)"),
    ("rms_norm_backward", "rows", "for first in range(0, n_parts, P)", "for first in range(P, n_parts + P, P)"),
    ("rms_norm_backward", "rows", "sum_d_w_0 += ", "sum_d_w_0 = "),
    ("layer_norm", "rows", "v6 = b_x - v5", "v6 = b_x - 0.5 * v5"),
    ("softmax", "rows", "device.row_logsumexp(", "1.01 * device.row_logsumexp("),
    ("softmax", "looped", 'float("-inf"))', "0.0)"),
    ("cross_entropy", "rows", "tl.store(p_loss_row, v14", "tl.store(p_loss_row, v13"),
    ("cross_entropy", "looped", "tl.load(p_x_row + at", "tl.load(p_x_row + 1 + at"),
    ("swiglu", "tiled", "device.sigmoid(", "1.02 * device.sigmoid("),
    ("swiglu", "tiled", "rows * s_up_0", "rows * (s_up_0 + 1)"),
    ("rotary", "rows", "p_x_row + 8 + half", "p_x_row + 7 + half"),
    ("rotary", "rows", " - v", " + v"),
    ("rotary", "rows", "i0 * s_cos_0", "i0 * (s_cos_0 + 1)"),
    ("interleaved_rotary", "rows", "b_x_0, b_x_1 = ", "b_x_1, b_x_0 = "),
    ("bias_gradient", "rows", "sum_d_b_0, 0, keep_dims=True", "sum_d_b_0 * 0.98, 0, keep_dims=True"),
]


@pytest.mark.parametrize(("name", "kind", "right", "wrong"), FAULTS)
def test_the_judge_sees_a_fault_planted_in_a_kernel(name, kind, right, wrong, monkeypatch) -> None:
    program = BY_NAME[name].program("bfloat16")
    leading = (13,) if program.rank == 1 else (2, 3, 5)
    tensors = inputs(name, program, leading, 27)
    if name == "swiglu":  # not dense, so that rows have strides
        tensors = [torch.cat([t, t], -1)[..., :27] for t in tensors]
    if name == "rms_norm":
        tensors[0] *= 0.01
    config = Config(1 if kind == "looped" else 2, 0 if kind == "rows" else 8, 4)
    true_load = library.load
    planted = []

    def faulty(source: str):
        changed = source.replace(right, wrong)
        planted.append(changed != source)
        return true_load(changed)

    assert not failures(program, tensors, Prepared(program, kind, config)(tensors))
    monkeypatch.setattr(library, "load", faulty)
    found = failures(program, tensors, Prepared(program, kind, config)(tensors))
    assert planted == [True]
    assert found


@pytest.mark.parametrize("name", ["bias_gradient", "rms_norm_backward", "softmax", "column_sums"])
def test_a_launch_that_does_not_fit_takes_less(name: str, monkeypatch) -> None:
    """A device with room for one tile of 1,024 bytes: fewer stages, fewer rows, and where rows are longer, blocks of columns."""
    program = BY_NAME[name].program("float32")
    tensors = inputs(name, program, (21,), 200)
    refused = []

    def load(made: Launch, tensors, outputs) -> OutOfResources | None:
        block = made.config.block or 256
        needed = made.config.stages * made.config.rows * block * 4
        if needed <= 1024:
            return None
        refused.append(needed)
        return OutOfResources(needed, 1024, "shared memory")

    monkeypatch.setattr(Launch, "load", load)
    monkeypatch.setattr(tuning, "_chosen", {})
    prepared = Prepared(program)
    assert not failures(program, tensors, prepared(tensors))
    assert refused
    before = len(refused)
    Prepared(program)(tensors)
    assert len(refused) == before, "what did not fit is remembered"


@pytest.mark.parametrize(("name", "launched"), [("softmax", "Launch"), ("rms_norm_backward", "Launch")])
def test_whole_rows_that_fit_no_device_are_walked_in_blocks(name: str, launched: str, monkeypatch) -> None:
    program = BY_NAME[name].program("float32")
    tensors = inputs(name, program, (9,), 200)

    def load(made: Launch, tensors, outputs) -> OutOfResources | None:
        whole = made.kind == "rows" and has_reductions(made.program)
        return OutOfResources(1, 0, "shared memory") if whole else None

    monkeypatch.setattr(Launch, "load", load)
    monkeypatch.setattr(tuning, "_chosen", {})
    prepared = Prepared(program)
    assert not failures(program, tensors, prepared(tensors))
    assert [type(made).__name__ for made in prepared.launches.values()] == [launched]


def test_a_forward_and_the_one_that_keeps_statistics_share_a_configuration() -> None:
    """DPO subtracts a reference's log-probabilities from the policy's: rows have to be summed up alike in both."""
    layouts = {}
    for name in ("rms_norm", "layer_norm"):
        whole = BY_NAME[name].program("bfloat16")
        plain = replace(whole, outputs=whole.outputs[:1])
        keeping = plan_residuals(plain, tuple(a.name for a in plain.arguments))
        assert len(keeping.outputs) > 1
        for program in (plain, keeping):
            tensors = inputs(name, program)
            outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
            layouts[program] = launch.plan(program, "rows", tensors, outputs)
    keys = {program: tuning.key_of(program, "rows", layout, torch.device("cpu")) for program, layout in layouts.items()}
    assert (len(keys), len(set(keys.values()))) == (4, 2), "one choice for each norm, another norm's is its own"


def test_the_rule_of_thumb_stays_within_shared_memory() -> None:
    """9,000 float32 columns of two tensors, two tiles ahead, are 256 KiB: more than any device has; in segments 160 KiB."""
    program = BY_NAME["bias_gradient"].program("float32")
    tensors = [torch.empty(37, 9000, device="meta") for _ in program.arguments]
    outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
    layout = launch.plan(program, "rows", tensors, outputs)
    for shared in (65536, 101376, 166912, 232448):
        for config in configuration.candidates(program, "rows", layout, shared):
            assert configuration.pipelined(program, "rows", layout, config) < shared
            assert config.stages == 1 or shared > (81920 if config.block else 131072)


@pytest.mark.parametrize("which", [0, 1])
def test_rows_that_do_not_agree_are_an_error(which: int) -> None:
    """A tensor of one row where the program was made for as many as the others have: nothing is skipped in silence."""
    program = swiglu("float32")
    tensors = inputs("swiglu", program)
    tensors[which] = tensors[which][:1]
    with pytest.raises(EmissionError, match="rows along dimension 0"):
        run(program, tensors)
