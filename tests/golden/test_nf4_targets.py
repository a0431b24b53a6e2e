"""The 4-bit kernel compiles for GPUs that are not here: no spills, wide stores, and no fused multiply-add in its scales."""

from __future__ import annotations

import pytest
import torch
import triton

from fxfuse.kernels import nf4
from fxfuse.kernels.nf4 import Config, Weight
from fxfuse.kernels.offline import TARGETS, Compiled, compile_kernel

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")


def compiled(config: Config, target: str, dtype: torch.dtype = torch.bfloat16, room: int = 0, nested: bool = True,
             rows: int = 14336) -> Compiled:  # fmt: skip
    weight = Weight(64, "nf4", rows, 4096, dtype, nested)
    plan = nf4.plan(weight, weight.columns + room, 16, config)
    scales = torch.uint8 if nested else torch.float32
    dtypes = [plan.word, torch.float32, scales, torch.float32, torch.float32, torch.float32, dtype]
    tensors = [torch.empty(16, dtype=dtype, device="meta") for dtype in dtypes]
    return compile_kernel(nf4.dequantize_kernel, tensors, plan.numbers, plan.options, target)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    lookup = "shuffle" if target.startswith("sm_") else "table"
    made = compiled(Config(lookup), target, room=16)
    assert made.spilled in (0, None)
    assert made.asm["cubin" if lookup == "shuffle" else "hsaco"]


@pytest.mark.parametrize("config", [Config("shuffle"), Config("table"), Config("select")], ids=str)
@pytest.mark.parametrize("room", [0, 16])
def test_a_thread_writes_16_bytes_at_a_time(config: Config, room: int) -> None:
    made = compiled(config, "sm_90", room=room)
    ptx = made.asm["ptx"]
    assert ptx.count("st.global.v4.b32") == config.unroll
    assert "st.global.b" not in ptx.replace("st.global.v4.b32", "")
    assert "st.shared" not in ptx
    assert made.registers is not None
    assert made.registers <= 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_too(dtype: torch.dtype) -> None:
    assert compiled(Config("shuffle"), "sm_90", dtype).asm["ptx"].count("st.global.v4.b32") == 2


def test_more_numbers_than_32_bits_count() -> None:
    assert compiled(Config("shuffle"), "sm_90", rows=2**20, room=16).spilled == 0


@pytest.mark.parametrize("config", [Config("shuffle"), Config("table")], ids=str)
def test_scales_are_rounded_twice(config: Config) -> None:
    """code * scale of scales, then + offset: fused, the last bit of a scale would differ now and then."""
    machine_code = compiled(config, "sm_90").asm["sass"]
    assert "FMUL" in machine_code
    assert "FADD" in machine_code
    assert "FFMA" not in machine_code
