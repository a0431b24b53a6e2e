"""A map and the thin products beside it in Triton's interpreter: right for any sizes, with terms, sums and every way results lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.kernels import thin_choice
from fxfuse.kernels.thin_map import Config, ThinMap, suits
from fxfuse.kernels.thin_map_sites import Down, Given, Site, _Place, map_site
from fxfuse.kernels.thin_map_source import Beside, Thin
from fxfuse.products.map_terms import with_sums
from fxfuse.program import Program, parse
from fxfuse.validation import error_ratio

GATE = """program rank=2 math=float32
axis c0 = 72
arg a0 : bfloat16[r,r|c0]
arg a1 : bfloat16[r,r|c0]
%0 = load a0 c0 0 1
%1 = sigmoid %0
%2 = mul %0 %1
%3 = load a1 c0 0 1
%4 = mul %2 %3
%5 = add %1 %3
out y0 : bfloat16[r,r|c0] = %4 @ c0 0 1
out y1 : bfloat16[r,r|c0] = %5 @ c0 0 1
"""
SMALL = Config(16, 32, 2, 4, 2, 2, 0)


def given(rows: int, width: int, rank: int, terms: int, across: int, down: int, dtype: torch.dtype) -> Given:
    """Thin matrices lie in columns of wider ones."""
    generator = torch.Generator().manual_seed(rows)

    def drawn(*sizes: int, room: int = 0) -> Tensor:
        return torch.randn(*sizes[:-1], sizes[-1] + room, generator=generator).to(dtype)[..., room:]

    added = [t for _ in range(terms) for t in (drawn(rows, rank, room=8), drawn(width, rank).t())]
    return Given([drawn(2, rows // 2, width) for _ in range(2)], added, [drawn(width, rank) for _ in range(across)],
                 [drawn(rows, rank, room=16) for _ in range(down)], [None] if across else [])  # fmt: skip


def exact(site: Site, program: Program, tensors: Given, dtype: torch.dtype) -> list[Tensor]:
    """What a place gives, in a dtype; its own roundings, of sums and of results that are multiplied, are those of the inputs."""
    own, width = tensors.ins[0].dtype, tensors.ins[0].shape[-1]
    ins = [t.to(dtype) for t in tensors.ins]
    for k, thin in enumerate(site.beside.added):
        i = [a.name for a in program.arguments].index(thin.name)
        left, right = (t.to(dtype) for t in tensors.added[2 * k : 2 * k + 2])
        ins[i] = (ins[i] + thin.factor * (left @ right).view_as(ins[i])).to(own).to(dtype)
    widened = program.retyped({"bfloat16": "float64", "float16": "float64"}) if dtype == torch.float64 else program
    outs = reference.execute(replace(widened, math="float64") if dtype == torch.float64 else widened, ins)
    named = {o.name: out.to(own).to(dtype).reshape(-1, width) for o, out in zip(program.outputs, outs, strict=True)}
    across = [t.factor * named[t.name] @ right.to(dtype) for t, right in zip(site.beside.across, tensors.rights, strict=True)]
    down = [t.factor * named[t.name].t() @ left.to(dtype) for t, left in zip(site.beside.down, tensors.lefts, strict=True)]
    lying = [d.t() if how.lying else d for d, how in zip(down, site.down, strict=True)]
    return [*outs, *([torch.cat(across, 1)] if across else []), *lying]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "rank", "terms", "across", "down"), [
    (50, 72, 8, 0, 2, 3), (34, 72, 16, 1, 1, 0), (66, 96, 4, 2, 0, 0), (32, 96, 32, 2, 2, 3),
])  # fmt: skip
def test_against_float64(rows: int, width: int, rank: int, terms: int, across: int, down: int, dtype: torch.dtype,
                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(thin_choice, "_choice", lambda *_: SMALL)
    name = str(dtype).removeprefix("torch.")
    program = parse(GATE.replace("bfloat16", name).replace("c0 = 72", f"c0 = {width}"))
    assert suits(program)
    full = with_sums(program, range(terms))
    outputs = [o.name for o in program.outputs]
    beside = Beside(tuple(Thin(f"a{i}", rank, 0.5) for i in range(terms)), tuple(o.name for o in full.outputs),
                    tuple(Thin(outputs[k % 2], rank, 2.0) for k in range(across)),
                    tuple(Thin(outputs[k % 2], rank, 1.0) for k in range(down)))  # fmt: skip
    hows = tuple(Down(k % 2 == 0, k == 2, k if k < across else None) for k in range(down))
    site = Site(str(full), beside, tuple((0, k * rank) for k in range(across)), (across * rank,) if across else (), hows, sums=terms)
    tensors = given(rows, width, rank, terms, across, down, dtype)
    ours = map_site(site)(*tensors)
    truth, eager = (exact(site, full, tensors, d) for d in (torch.float64, dtype))
    assert len(ours) == len(truth)
    for mine, theirs, right in zip(ours, eager, truth, strict=True):
        assert mine is not None
        assert error_ratio(mine.to(dtype), theirs.to(dtype), right) <= 2.0


def test_results_over_operands_and_results_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored lies where it was told to, the same bits; what is not stored is None."""
    monkeypatch.setattr(thin_choice, "_choice", lambda *_: SMALL)
    program = with_sums(parse(GATE), [0])
    site = Site(str(program), Beside((Thin("a0", 8, 1.0),), ("y1", "sum_a0"), (), (Thin("y0", 8, 1.0),)), (), (),
                (Down(True, True, None),), (None, 1, 0), (), 1)  # fmt: skip
    tensors = given(64, 72, 8, 1, 0, 1, torch.bfloat16)
    copies = [t.clone() for t in tensors.ins]
    places = [t.data_ptr() for t in tensors.ins]
    y0, y1, total, down = map_site(site)(*tensors)
    assert y0 is None
    assert y1 is not None
    assert total is not None
    assert (y1.data_ptr(), total.data_ptr()) == (places[1], places[0])
    expected = map_site(site._replace(places=()))(*tensors._replace(ins=copies))
    assert all(torch.equal(mine, other) for mine, other in zip((y1, total, down), expected[1:], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "why"), [
    (GATE.replace("axis c0 = 72", "axis c0 = 36").replace("load a1 c0 0 1", "load a1 c0 36 1")
     .replace("a1 : bfloat16[r,r|c0]", "a1 : bfloat16[r,r|72]"), "lanes"),
    (GATE.replace("a1 : bfloat16[r,r|c0]", "a1 : bfloat16[1,1|c0]"), "a bias"),
    (GATE.replace("a1 : bfloat16", "a1 : float32"), "another dtype"),
    (GATE.replace("%1 = sigmoid %0", "%1 = rsqrt %0"), "infinite at zero"),
    (GATE.replace("%1 = sigmoid %0", "%1 = sum c0 %0"), "a reduction"),
], ids=lambda text: text if len(text) < 30 else "")  # fmt: skip
def test_what_is_no_map_of_matrices(text: str, why: str) -> None:
    assert not suits(parse(text)), why


@pytest.mark.parametrize("terms", [0, 1])
def test_what_is_timed_gives_the_same_both_ways(terms: int) -> None:
    """The question that a choice asks: on some of the rows, into memory of its own, whatever the place may write over."""
    program = with_sums(parse(GATE), range(terms))
    beside = Beside(tuple(Thin("a0", 8, 1.0) for _ in range(terms)), tuple(o.name for o in program.outputs if o.name != "y0"),
                    (Thin("y1", 8, 2.0),), (Thin("y0", 8, 1.0), Thin("y1", 8, 2.0)))  # fmt: skip
    site = Site(str(program), beside, ((0, 8),), (16,), (Down(True, True, None), Down(False, False, 0)),
                (0, 1, *([0] * terms)), (), terms)  # fmt: skip
    place, tensors = _Place(site), given(2 * 30, 72, 8, terms, 1, 2, torch.bfloat16)
    copies = [t.clone() for t in tensors.ins]
    asked = place.trial(tensors)
    assert asked.large.shape[0] == 60
    asked.library()
    apart = [t.clone() for t in asked.results]
    ThinMap(asked.sizes, SMALL, torch.device("cpu"))(*asked.tensors)
    assert thin_choice._agree(apart, asked.results, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors.ins, strict=True))
