"""Every kernel compiles to machine code for GPUs that are not here, and on NVIDIA spills no registers at its default configuration."""

from __future__ import annotations

import re

import pytest
import torch
import triton

from fxfuse import reference
from fxfuse.kernels import configuration
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.launch import plan
from fxfuse.kernels.offline import TARGETS, compile_offline
from fxfuse.program import Program
from tests.kernel_programs import BY_NAME, Build, Case, of_width, packed_swiglu, rotary

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")

WIDTHS = {"packed_swiglu": 14336, "packed_swiglu_backward": 14336, "cross_entropy": 128256,
          "smoothed_cross_entropy": 128256, "cross_entropy_backward": 128256, "shifted_cross_entropy": 128256,
          "shifted_cross_entropy_backward": 128256,
          "swiglu": 14336, "swiglu_backward": 14336, "gelu": 14336, "gelu_backward": 14336, "column_sums": 14336, "functions": 64}
SIZED = {"packed_swiglu": Case("packed_swiglu", lambda dtype: packed_swiglu(dtype, 14336)),
         "packed_swiglu_backward": Case("packed_swiglu_backward", lambda dtype: packed_swiglu(dtype, 14336), ("gate_up",)),
         "rotary": Case("rotary", lambda dtype: rotary(dtype, 128)),
         "interleaved_rotary": Case("interleaved_rotary", lambda dtype: rotary(dtype, 128, step=2)),
         "partial_rotary": Case("partial_rotary", lambda dtype: rotary(dtype, 64, tail=64))}
IN_MAKE_TEST = [("rms_norm_backward", "sm_90"), ("rotary", "sm_75"), ("cross_entropy", "gfx942")]
EVERY = [(name, target) for name in BY_NAME for target in TARGETS if (name, target) not in IN_MAKE_TEST]


def meta(program: Program, width: int) -> list[torch.Tensor]:
    tensors = []
    for argument in program.arguments:
        leading = (8192,) if program.rank == 1 else (2, 32, 4096)
        shape = [n if varies else 1 for n, varies in zip(leading, argument.rows, strict=True)]
        columns = argument.columns if isinstance(argument.columns, int) else width if argument.columns else 1
        tensors.append(torch.empty(*shape, columns, dtype=reference.torch_dtype(argument.dtype), device="meta"))
    return tensors


@pytest.mark.parametrize(("name", "target"), [
    *IN_MAKE_TEST, *(pytest.param(name, target, marks=pytest.mark.slow) for name, target in EVERY)])
def test_compiles_without_spills(name: str, target: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = SIZED.get(name, BY_NAME[name]).program("bfloat16")
    compiled = compile_offline(program, meta(program, WIDTHS.get(name, 4096)), target)
    if target.startswith("sm_"):
        assert compiled.asm["cubin"]
        assert compiled.registers is not None
        assert compiled.registers <= 255
        if name != "functions":  # thirty outputs at once: no kernel of a model
            assert compiled.spilled == 0
    else:
        assert compiled.asm["hsaco"]


@pytest.mark.parametrize(("name", "columns"), [
    ("layer_norm_backward", 8192), ("layer_norm_backward", 16384),
    *(pytest.param(name, columns, marks=pytest.mark.slow) for name, columns in (
        ("rms_norm_backward", 8192), ("rms_norm_backward", 16384), ("residual_norm_backward", 16384), ("layer_norm_backward", 12288)))])
def test_gradients_of_long_rows_spill_next_to_nothing(name: str, columns: int, tmp_path, monkeypatch) -> None:
    """Four registers at most; with them, rows of 16384 loaded again took 230 us on an H200, walked in blocks without 279."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = of_width(BY_NAME[name].program("bfloat16"), columns)
    spilled = compile_offline(program, meta(program, columns), "sm_90").spilled
    assert spilled is not None
    assert spilled <= (16 if columns == 16384 else 0)


@pytest.mark.parametrize(("name", "columns"), [
    ("layer_norm_backward", 5120), ("rms_norm_backward", 12288),
    *(pytest.param(name, columns, marks=pytest.mark.slow) for name, columns in (
        ("residual_norm_backward", 5120), ("residual_norm_backward", 12288), ("rms_norm_backward", 14336)))])
def test_rows_in_segments_spill_nothing(name: str, columns: int, tmp_path, monkeypatch) -> None:
    """Held as one block of a power of 2, 12288 columns spilled and nothing was loaded ahead: 69% of a plain pass on an H200."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = of_width(BY_NAME[name].program("bfloat16"), columns)
    arguments = meta(program, columns)
    layout = plan(program, "rows", arguments, [reference.allocate(program, output, arguments) for output in program.outputs])
    config = next(config for config in configuration.candidates(program, "rows", layout) if config.block)
    compiled = compile_offline(program, arguments, "sm_90", "rows", config)
    assert compiled.spilled == 0
    assert config.stages == 1 or re.search(r"cp\.async\.c[ag]\.shared\.global", compiled.asm["ptx"])
    assert "st.global.v4" in compiled.asm["ptx"]


def test_a_row_in_segments_takes_the_registers_of_its_own_columns(tmp_path, monkeypatch) -> None:
    """Of 12288 columns in one block of 16384 a multiprocessor had one row at a time, in three segments it has two."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = BY_NAME["shifted_softmax_backward"].program("bfloat16")
    one, three = (compile_offline(program, meta(program, 12288), "sm_90", "rows", Config(1, block, 16)) for block in (0, 4096))
    assert one.registers > 64 >= three.registers
    assert one.spilled == three.spilled == 0


def test_an_instance_leaves_registers_for_as_many_as_are_to_be_resident(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = BY_NAME["layer_norm"].program("bfloat16")
    free, three = (compile_offline(program, meta(program, 12288), "sm_90", "rows", Config(1, 4096, 8, resident=n)) for n in (0, 3))
    assert 3 * 256 * free.registers > 65536 >= 3 * 256 * three.registers
    assert compile_offline(program, meta(program, 12288), "gfx942", "rows", Config(1, 4096, 8, resident=3)).asm["hsaco"]


@pytest.mark.parametrize("columns", [12288, 16384])
def test_norms_of_long_rows_leave_room_for_another_row_beside_them(columns: int, tmp_path, monkeypatch) -> None:
    """With the row held in 66 registers a thread a multiprocessor had one row at a time: 58 to 83% of a copy on an H200."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = of_width(BY_NAME["rms_norm"].program("bfloat16"), columns)
    compiled = compile_offline(program, meta(program, columns), "sm_90")
    assert compiled.spilled == 0
    threads = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1])
    assert 2 * threads * compiled.registers <= 65536


def gated_norm(dtype: str) -> Program:
    """A norm times silu(z), whose backward writes two of the three tensors that it reads."""
    b = Build(1)
    a = b.axis(None, "a")
    x, z, w = b.x("x", dtype, (True,), a), b.x("z", dtype, (True,), a), b.x("w", dtype, (False,), a)
    rstd = b.rsqrt(b.add(b.mean(a, b.square(x)), 1e-6))
    normed = b.mul(w, b.cast(dtype, b.mul(x, rstd)))
    b.out("y", dtype, (True,), b.mul(normed, b.mul(z, b.sigmoid(z))), a)
    b.out("rstd", "float32", (True,), rstd, None)
    return b.build()


def test_what_waits_for_no_reduction_is_not_kept_meanwhile(tmp_path, monkeypatch) -> None:
    """Kept until the end, it took 248 bytes a thread of local memory, and twice the time."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = Case("gated_norm_backward", gated_norm, ("x", "z", "w")).program("bfloat16")
    assert compile_offline(program, meta(program, 8192), "sm_90").spilled == 0


def test_small_tiles_are_not_rounded_in_pairs(tmp_path, monkeypatch) -> None:
    """Where a thread has one element, the instruction for two has no second operand."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    for name in ("rms_norm", "residual_norm_backward", "swiglu_backward"):
        program = BY_NAME[name].program("bfloat16")
        for rows, columns in ((1, 1), (1, 32), (515, 96)):
            arguments = [t[:rows if t.shape[0] > 1 else 1] for t in meta(program, columns)]
            assert compile_offline(program, arguments, "sm_90").asm["cubin"]


def test_roundings_inside_a_kernel_go_two_to_an_instruction(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = BY_NAME["rms_norm"].program("bfloat16")
    paired = compile_offline(program, meta(program, 4096), "sm_90").asm["ptx"]
    assert "cvt.rn.bf16x2.f32" in paired
    assert "cvt.rn.bf16.f32" not in paired
    assert "through_bfloat16" not in compile_offline(program, meta(program, 4096), "sm_75").source


def test_loads_are_wide_and_the_persistent_loop_loads_ahead(tmp_path, monkeypatch) -> None:
    """16 bytes a load, and asynchronous copies of the next rows while a row is worked on."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    program = BY_NAME["rms_norm_backward"].program("bfloat16")
    ptx = compile_offline(program, meta(program, 4096), "sm_90").asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "st.global.v4" in ptx
