"""A map beside thin products on a device: every configuration is as right as the products apart, and chosen by timing at its place."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.thin_map import BACKWARD, FORWARD
from fxfuse.kernels import thin_choice
from fxfuse.kernels.thin_map import BOTH, CONFIGS, TERMS, Config, ThinMap, sizes_of
from fxfuse.kernels.thin_map_sites import Down, Given, Site, Written, _Place
from fxfuse.kernels.thin_map_source import Beside, Thin
from fxfuse.products.map_terms import with_sums
from fxfuse.program import parse
from fxfuse.validation import error_ratio


def place_of(kind: str, width: int, rank: int) -> _Place:
    if kind == "forward":
        program = with_sums(parse(FORWARD.replace("WIDTH", str(width))), [0, 1])
        beside = Beside((Thin("a0", rank, 2.0), Thin("a1", rank, 2.0)), ("y0", "sum_a0", "sum_a1"), (), ())
        return _Place(Site(str(program), beside, (), (), (), (None, 0, 1), (), 2))
    thin = tuple(Thin(name, rank, 2.0) for name in ("d_a0", "d_a1"))
    terms = (Thin("g_y0", rank, 1.0),) if kind == "both" else ()
    beside = Beside(terms, ("d_a0", "d_a1"), thin, (Thin("y0", rank, 1.0), *thin))
    downs = (Down(True, True, None), Down(True, False, 0), Down(False, False, 1))
    return _Place(Site(BACKWARD.replace("WIDTH", str(width)), beside, ((0, 0), (0, rank)), (2 * rank,), downs, (None, 0, 1)))


def drawn(kind: str, rows: int, width: int, rank: int) -> Given:
    def matrix(a: int, b: int) -> Tensor:
        return torch.randn(a, b, device="cuda", dtype=torch.bfloat16)

    if kind == "forward":
        wide = matrix(rows, 2 * rank)
        return Given([matrix(rows, width)[None] for _ in range(2)],
                     [wide[:, :rank], matrix(width, rank).t(), wide[:, rank:], matrix(width, rank).t()], [], [], [])  # fmt: skip
    added = [matrix(rows, rank), matrix(rank, width)] if kind == "both" else []
    return Given([matrix(rows, width)[None] for _ in range(3)], added, [matrix(width, rank) for _ in range(2)],
                 [matrix(rows, rank) for _ in range(3)], [None])  # fmt: skip


def copied(given: Given) -> Given:
    return given._replace(ins=[t.clone() for t in given.ins])


def apart(place: _Place, given: Given) -> list[Tensor | None]:
    to = place.allocated(given, [None] * len(place.stored))
    place.apart(given, Written([torch.empty_like(given.ins[0]) if out is None else out for out in to.outs], to.buffers, to.downs))
    return [*to.outs, *to.buffers, *to.downs]


def exact(kind: str, given: Given) -> list[Tensor | None]:
    """The same in float64."""
    ins = [t[0].double() for t in given.ins]
    terms = [left.double() @ right.double() for left, right in zip(given.added[::2], given.added[1::2], strict=True)]
    if kind == "forward":
        a, b = (t + 2.0 * term for t, term in zip(ins, terms, strict=True))
        return [torch.nn.functional.silu(a) * b, a, b]
    a, b = (t.requires_grad_() for t in ins[:2])
    y = torch.nn.functional.silu(a) * b
    grads = torch.autograd.grad(y, (a, b), ins[2] + sum(terms))
    across = [2.0 * g @ right.double() for g, right in zip(grads, given.rights, strict=True)]
    lefts = [left.double() for left in given.lefts]
    return [None, *grads, torch.cat(across, 1), lefts[0].t() @ y.detach(), 2.0 * grads[0].t() @ lefts[1], 2.0 * grads[1].t() @ lefts[2]]


def check(ours: list[Tensor | None], theirs: list[Tensor | None], truth: list[Tensor | None]) -> None:
    """Each result is as near to float64 as the library's, products apart."""
    assert len(ours) == len(theirs) == len(truth)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert (a is None) == (b is None) == (t is None)
        if a is not None and b is not None and t is not None:
            assert error_ratio(a.reshape(t.shape), b.reshape(t.shape), t) <= 1.2


@pytest.mark.parametrize(("kind", "config"), [*(("forward", c) for c in TERMS), *(("backward", c) for c in CONFIGS),
                                              *(("both", c) for c in BOTH)],
                         ids=lambda c: c if isinstance(c, str) else f"{c.rows}x{c.columns}x{c.spans}w{c.warps}s{c.stages}")  # fmt: skip
@pytest.mark.parametrize(("rows", "width", "rank"), [(2048, 14336, 16), (777, 1000, 8)])
def test_every_configuration(rows: int, width: int, rank: int, kind: str, config: Config) -> None:
    place, given = place_of(kind, width, rank), drawn(kind, rows, width, rank)
    to = place.allocated(given, [None] * len(place.stored))
    operands = place.operands(given, to)
    sizes = sizes_of(place.site.text, place.site.beside, operands)
    assert sizes is not None
    launch = ThinMap(sizes, config, torch.device("cuda", 0))
    try:
        launch.load(*operands.tensors)
    except OutOfResources as lacking:
        pytest.skip(str(lacking))
    launch(*operands.tensors)
    check([*to.outs, *to.buffers, *to.downs], apart(place, given), exact(kind, given))
    first = [t.clone() for t in operands.results]
    launch(*operands.tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, operands.results, strict=True))


@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
def test_chosen_at_its_place(kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is chosen, results are right, also where they lie over operands, and the choice is on disk."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(thin_choice, "_chosen", {})
    place, given = place_of(kind, 14336, 16), drawn(kind, 4096, 14336, 16)
    expected = apart(place, given)
    for _ in range(2):
        check(place(copied(given)), expected, exact(kind, given))
    found = [json.loads(path.read_text()) for path in (tmp_path / "tuned").glob("thin-*.json")]
    assert any("spans" in (row["config"] or {}) for choice in found for row in choice["times"])
