"""A map beside thin products compiles for GPUs that are not here; what the registers of an H200 hold."""

from __future__ import annotations

import pytest
import torch
import triton

from benchmarks.thin_map import BACKWARD, FORWARD
from fxfuse.kernels import thin_map
from fxfuse.kernels.abilities import Abilities
from fxfuse.kernels.offline import Compiled, compile_kernel
from fxfuse.kernels.thin_map import BOTH, CONFIGS, TERMS, Config, Operands, ThinMap, sizes_of
from fxfuse.kernels.thin_map_source import Beside, Thin
from fxfuse.products.map_terms import with_sums
from fxfuse.program import parse

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")
ROWS, WIDTH, RANK = 8192, 14336, 16


def operands(kind: str) -> tuple[str, Beside, Operands]:
    def form(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    matrix, left, right, wide = form(ROWS, WIDTH), form(ROWS, RANK), form(WIDTH, RANK), form(ROWS, 2 * RANK)
    if kind == "forward":
        program = with_sums(parse(FORWARD.replace("WIDTH", str(WIDTH))), [0, 1])
        beside = Beside((Thin("a0", RANK, 2.0), Thin("a1", RANK, 2.0)), ("y0", "sum_a0", "sum_a1"), (), ())
        return str(program), beside, Operands((matrix,) * 2, (left, right.t()) * 2, (), (), (matrix,) * 3, ())
    thin = tuple(Thin(name, RANK, 2.0) for name in ("d_a0", "d_a1"))
    terms = (Thin("g_y0", RANK, 1.0),) if kind == "both" else ()
    results = (wide[:, :RANK], wide[:, RANK:], form(RANK, WIDTH, dtype=torch.float32).t(), right, right)
    added = (left, right.t()) * len(terms)
    beside = Beside(terms, ("d_a0", "d_a1"), thin, (Thin("y0", RANK, 1.0), *thin))
    text, matrices = BACKWARD.replace("WIDTH", str(WIDTH)), (matrix,) * 3
    return text, beside, Operands(matrices, added, (right,) * 2, (left,) * 3, matrices[:2], results)


def launch(kind: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[ThinMap, Operands]:
    monkeypatch.setattr(thin_map, "of_device", lambda device: Abilities(pairs=True, early=True))
    monkeypatch.setattr(thin_map, "multiprocessors", lambda device: 132)
    text, beside, o = operands(kind)
    sizes = sizes_of(text, beside, o)
    assert sizes is not None
    return ThinMap(sizes, config, torch.device("cpu")), o


def compiled(made: ThinMap, o: Operands, second: bool = False) -> Compiled:
    part = torch.empty(16, dtype=torch.float32, device="meta")
    tensors = made.arranged(o.tensors, [part] * len(made.offsets))[second]
    kernel = made.total if second else made.partial
    assert kernel is not None
    return compile_kernel(kernel.jit, tensors, kernel.numbers, {k: v for k, v in kernel.options.items() if k != "launch_pdl"}, "sm_90")


@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
def test_the_first_configuration_computes_each_element_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile has 16 elements a thread; what the compiler computes again where stores or products want it would show here."""
    config = {"both": BOTH, "forward": TERMS, "backward": CONFIGS}[kind][0]
    made = compiled(*launch(kind, config, monkeypatch))
    exponentials = made.asm["ptx"].count("ex2.approx")
    assert exponentials == config.spans * config.rows * config.columns // (32 * config.warps)
    assert made.spilled is None or made.spilled <= 256


@pytest.mark.parametrize(("kind", "config"), [*(("backward", c) for c in CONFIGS), *(("forward", c) for c in TERMS),
                                              *(("both", c) for c in BOTH)],
                         ids=lambda c: c if isinstance(c, str) else f"{c.rows}x{c.columns}x{c.spans}w{c.warps}s{c.stages}")  # fmt: skip
def test_every_configuration_compiles(kind: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(*launch(kind, config, monkeypatch))
    assert made.spilled is None or made.spilled <= 288


def test_the_sums_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(*launch("backward", CONFIGS[0], monkeypatch), second=True)
    assert made.spilled in (0, None)
