"""Emitted kernels on a GPU: as right as eager against float64, repeatable, compiled once for all sequence lengths, cheap to launch."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from fxfuse.kernels import invoke, launch, tuning
from fxfuse.kernels.configuration import candidates
from fxfuse.kernels.launch import Prepared
from fxfuse.program import Program
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME, CASES, Case, of_width, packed_swiglu, rotary, swiglu

DTYPES = ["float32", "bfloat16", "float16"]
WIDE = {"packed_swiglu": Case("packed_swiglu", lambda dtype: packed_swiglu(dtype, 1408)),
        "rotary": Case("rotary", lambda dtype: rotary(dtype, 128)),
        "interleaved_rotary": Case("interleaved_rotary", lambda dtype: rotary(dtype, 64, step=2))}


@pytest.fixture(autouse=True)
def rule_of_thumb(monkeypatch) -> None:
    """No timing runs: what is tested is one configuration."""
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")


def on_gpu(case: Case, program: Program, leading: tuple[int, ...], columns: int, scale: float) -> list[torch.Tensor]:
    return [t.cuda() for t in case.inputs(program, leading, columns, scale)]


def leading_of(program: Program, rows: int) -> tuple[int, ...]:
    return (rows,) if program.rank == 1 else (2, 5, max(rows // 10, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [WIDE.get(c.name, c) for c in CASES], ids=lambda c: c.name)
def test_as_right_as_eager(case: Case, dtype: str) -> None:
    program = case.program(dtype)
    for rows, columns, scale in ((1, 1, 1.0), (515, 96, 1e-3), (300, 1000, 1.0), (129, 4096, 1e3), (37, 9000, 1.0)):
        if case.name == "functions" and (columns > 1000 or scale > 1):
            continue
        columns = dict(program.axes).get("a") or columns
        tensors = on_gpu(case, program, leading_of(program, rows), columns, scale)
        assert not failures(program, tensors, Prepared(program)(tensors)), (rows, columns, scale)


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward", "softmax", "softmax_backward", "cross_entropy",
                                  "cross_entropy_backward", "layer_norm_backward", "swiglu_backward", "column_sums"])
@pytest.mark.parametrize("columns", [16385, 32768, 65536, 262144])
def test_long_rows(name: str, columns: int) -> None:
    program = BY_NAME[name].program("bfloat16")
    tensors = on_gpu(BY_NAME[name], program, (19,), columns, 1.0)
    assert not failures(program, tensors, Prepared(program)(tensors))


@pytest.mark.parametrize(("name", "columns"), [
    *((name, 4096) for name in ("rms_norm", "rms_norm_backward", "normed_rotary", "swiglu", "cross_entropy", "softmax", "bias_gradient",
                                "rotary")),
    *((name, columns) for name in ("rms_norm_backward", "layer_norm_backward") for columns in (2048, 5120, 8192, 12288, 16384)),
    *((name, columns) for name in ("shifted_softmax", "shifted_softmax_backward", "rms_norm") for columns in (5120, 12288))])
def test_every_configuration_that_tuning_may_choose(name: str, columns: int) -> None:
    case = WIDE.get(name, BY_NAME[name])
    program = case.program("bfloat16")
    if [width for _, width in program.axes] == [None]:
        program = of_width(program, columns)
    tensors = on_gpu(case, program, leading_of(program, 500), columns, 1.0)
    prepared = Prepared(program)
    prepared(tensors)
    made, = prepared.launches.values()
    for config in candidates(program, made.kind, made.layout):
        assert not failures(program, tensors, Prepared(program, made.kind, config)(tensors)), config


def test_misaligned_and_strided_tensors() -> None:
    for name in ("rms_norm", "rms_norm_backward", "swiglu", "layer_norm_backward"):
        program = BY_NAME[name].program("bfloat16")
        tensors = on_gpu(BY_NAME[name], program, (130,), 1024, 1.0)
        odd = [torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:].view(t.shape).copy_(t) for t in tensors]
        apart = [torch.empty(*t.shape, 2, dtype=t.dtype, device="cuda")[..., 1].copy_(t) for t in tensors]
        prepared = Prepared(program)
        for variant in (tensors, odd, apart, tensors):
            assert not failures(program, variant, prepared(variant)), name


def test_transposed_heads_keep_their_layout() -> None:
    program = WIDE["rotary"].program("bfloat16")
    x = torch.randn(2, 50, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    tables = [torch.randn(2, 1, 50, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    y, = Prepared(program)([x, *tables])
    assert y.stride() == x.stride()
    assert not failures(program, [x, *tables], [y])


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows are right: 2.5 billion logits forward and backward, and a flat map over 2.2 billion elements."""
    program = BY_NAME["cross_entropy"].program("bfloat16")
    x = torch.empty(20000, 128256, device="cuda", dtype=torch.bfloat16)
    x[-64:].normal_()
    x[:-64] = 0
    label = torch.randint(0, 128256, (20000, 1), device="cuda")
    loss, lse = Prepared(program)([x, label])
    assert not failures(program, [x[-64:], label[-64:]], [loss[-64:], lse[-64:]])
    backward = BY_NAME["cross_entropy_backward"].program("bfloat16")
    arguments = {"x": x, "label": label, "lse": lse, "g_loss": torch.ones_like(loss)}
    d_x, = Prepared(backward)([arguments[a.name] for a in backward.arguments])
    assert not failures(backward, [arguments[a.name][-64:] for a in backward.arguments], [d_x[-64:]])
    del d_x, x
    flat = swiglu("bfloat16")
    rows = 2**31 // 8192 + 1000
    gate, up = (torch.zeros(rows, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate[-8:].normal_()
    up[-8:].normal_()
    y, = Prepared(flat)([gate, up])
    assert not failures(flat, [gate[-8:], up[-8:]], [y[-8:]])


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward", "bias_gradient", "normed_rotary_backward"])
def test_the_same_bits_on_every_run(name: str) -> None:
    program = BY_NAME[name].program("bfloat16")
    tensors = on_gpu(BY_NAME[name], program, leading_of(program, 3000), 2048, 1.0)
    prepared = Prepared(program)
    first = prepared(tensors)
    for _ in range(10):
        again = prepared([t.clone() for t in tensors])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary", "cross_entropy", "softmax"])
def test_sequence_lengths_compile_nothing_new(name: str) -> None:
    case = WIDE.get(name, BY_NAME[name])
    program = case.program("bfloat16")
    prepared = Prepared(program)
    counts = []
    for length in (640, 641, 1000, 1024, 2047, 4096, 513, 999):
        before = sum(invoke.compilations.values())
        leading = (length,) if program.rank == 1 else (2, 4, length)
        prepared(on_gpu(case, program, leading, 2048, 1.0))
        counts.append(sum(invoke.compilations.values()) - before)
    assert sum(counts[1:]) == 0, counts


def test_side_streams_and_cuda_graphs() -> None:
    program = BY_NAME["rms_norm_backward"].program("bfloat16")
    tensors = on_gpu(BY_NAME["rms_norm_backward"], program, (512,), 1024, 1.0)
    prepared = Prepared(program)
    expected = prepared(tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = prepared(tensors)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prepared(tensors)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, aside, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


OUT_OF_RANGE = """
import torch
from fxfuse.kernels.launch import run
from tests.kernel_programs import cross_entropy
run(cross_entropy("float32"), [torch.randn(4, 10, device="cuda"), torch.tensor([[1], [10], [2], [-100]], device="cuda")])
torch.cuda.synchronize()
"""


def test_a_label_out_of_range_is_a_device_assertion() -> None:
    """In a process of its own: a device assertion ends its CUDA context, in eager too."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


def test_tuning_times_candidates_once_and_keeps_its_choice(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "1")
    monkeypatch.setenv("FXFUSE_TUNING_PATIENCE", "inf")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._stored.cache_clear()
    program = BY_NAME["swiglu"].program("bfloat16")
    tensors = on_gpu(BY_NAME["swiglu"], program, (2048,), 2048, 1.0)
    chosen = Prepared(program)
    assert not failures(program, tensors, chosen(tensors))
    files = list((tmp_path / "tuned").glob("*.json"))
    assert len(files) == 1
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._stored.cache_clear()
    monkeypatch.setattr(tuning, "times_on_device", lambda *_: pytest.fail("timed again"))
    again = Prepared(program)
    again(tensors)
    assert [made.config for made in again.launches.values()] == [made.config for made in chosen.launches.values()]
    tuning._stored.cache_clear()


def test_a_launch_costs_the_host_little() -> None:
    """Printed, and bounded loosely: the clock of a shared machine is not a test."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    for name in ("rms_norm", "swiglu", "rms_norm_backward"):
        program = BY_NAME[name].program("bfloat16")
        tensors = on_gpu(BY_NAME[name], program, (16,), 1024, 1.0)
        prepared = launch.prepare(program)
        prepared(tensors)
        torch.cuda.synchronize()
        best = min(_microseconds(lambda prepared=prepared, tensors=tensors: prepared(tensors)) for _ in range(5))
        print(f"{name}: {best:.1f} us of host time a launch")
        assert best < 60


def _microseconds(call, repeats: int = 200) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / repeats * 1e6
