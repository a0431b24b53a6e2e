"""The pair of thin products compiles for GPUs that are not here: no spills, and the tensor cores do the products."""

from __future__ import annotations

import pytest
import torch
import triton

from fxfuse.kernels import thin_outer, thin_pair
from fxfuse.kernels.offline import TARGETS, Compiled, compile_kernel
from fxfuse.kernels.thin_pair import CONFIGS, PARTS, SUMMED, Config, Sizes

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")
SIZES = Sizes(8192, 14336, 16, 14336, 16, 1, 48, 48)


def compiled(config: Config, target: str, dtype: torch.dtype = torch.bfloat16, sizes: Sizes = SIZES) -> Compiled:
    plan = thin_pair.plan(sizes, config, 132, target in ("sm_90", "sm_120"))
    dtypes = [dtype, dtype, dtype, torch.float32, torch.float32]
    tensors = [torch.empty(16, dtype=d, device="meta") for d in dtypes]
    return compile_kernel(thin_pair.parts_kernel, tensors, plan.parts, plan.options, target)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_75"])
def test_compiles_without_spills(target: str) -> None:
    made = compiled(Config(), target)
    assert made.spilled in (0, None)


def test_older_tensor_cores_compile_it_too() -> None:
    """It is the library's there, as copies of tiles do not overlap (thin_choice.py); float16 alone."""
    assert compiled(Config(64, 128, 4, 1), "sm_75", torch.float16).asm["cubin"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_fits_an_h200(config: Config) -> None:
    made = compiled(config, "sm_90")
    assert made.spilled == 0
    assert made.asm["ptx"].count("wgmma.mma_async") >= 2
    assert "cp.async" in made.asm["ptx"]  # tiles are on their way while others are multiplied
    resident = 65536 // (32 * config.warps * made.registers)
    assert resident >= config.waves or config.warps == 8


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_other_ranks(rank: int) -> None:
    assert compiled(Config(), "sm_90", sizes=SIZES._replace(rank=rank)).spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_the_sums_compile(target: str) -> None:
    early = int(target in ("sm_90", "sm_120"))
    tensors = [torch.empty(16, dtype=d, device="meta") for d in (torch.float32, torch.float32, torch.float16, torch.float16)]
    numbers = (8192, 14336, 48, 56, 4, 2, 3, 16, PARTS, SUMMED, early)
    made = compile_kernel(thin_pair.sums_kernel, tensors, numbers, {"num_warps": 4}, target)
    assert made.spilled in (0, None)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_75"])
@pytest.mark.parametrize("config", thin_outer.CONFIGS, ids=str)
@pytest.mark.parametrize("base", [0, 14336])
def test_the_outer_product_compiles_and_stores_wide(config: thin_outer.Config, base: int, target: str) -> None:
    sizes = thin_outer.Sizes(8192, 14336, 16, 48, 1, 16, base, 14336)
    tensors = [torch.empty(16, dtype=torch.bfloat16, device="meta")] * 4
    numbers = thin_outer.numbers_of(sizes, config, 2)
    made = compile_kernel(thin_outer.outer_kernel, tensors, numbers, {"num_warps": config.warps}, target)
    assert made.spilled in (0, None)
    if target == "sm_90":
        assert "st.global.v4" in made.asm["ptx"]
