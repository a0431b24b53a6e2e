"""Records: what the compiler decided at each site, what has run since, and the report made of both.

A ``GraphRecord`` is made once per compiled graph and may serve many modules (every layer of a kind, in every
model of a class). So it holds no module; a side table maps each module to the records that ran under it and
how often. The table holds modules weakly and stores nothing on them: state dicts, pickles and deep copies of
a model stay what they were.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from fxfuse.errors import NotFused

if TYPE_CHECKING:
    import torch

    from fxfuse.memory.plan import MemoryPlan

Status = Literal["fused", "served", "declined", "pending"]


@dataclass
class Site:
    """One place where a rule applies, or in a report: equal places of equal blocks, counted."""

    rule: str
    module: str  # path inside the captured module ("" for itself); in a report: in the model, "layers.*.mlp"
    status: Status
    reason: str = ""  # why declined: one sentence
    implementation: str = ""  # what runs it: "triton", "torch", "inductor", the name of a library op
    count: int = 1
    launches: int = 0
    error_ratio: float | None = None  # to float64, over eager's own; the worst of outputs and gradients
    saved_bytes_before: int | None = None  # kept for the backward by eager in one execution
    saved_bytes_after: int | None = None  # and by us
    near_miss: str = ""  # the rule that nearly applied and what differed
    program: str = ""  # the row program, printed

    @property
    def saved_bytes(self) -> tuple[int | None, int | None]:
        """Bytes kept for the backward, (before, after)."""
        return self.saved_bytes_before, self.saved_bytes_after


@dataclass(eq=False)
class GraphRecord:
    """One compiled graph: what it is made of and how often it has run, over all modules."""

    kind: str  # "block", "head", "leaf", "whole"
    module: str = ""  # class or path of the module it was captured from, for people
    sites: list[Site] = field(default_factory=list)
    graphs: int = 1
    calls: int = 0
    forward_source: str = ""
    backward_source: str = ""
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reads: list[Any] = field(default_factory=list)  # of outputs that are computed on demand: output_contract/source.py

    def executed(self, module: torch.nn.Module | None = None) -> None:
        """Count one forward, for the graph and for the module it ran under."""
        self.calls += 1
        if module is None:
            return
        ledger = _ledgers.get(module)
        if ledger is None or self not in ledger:
            ledger = attach(module, self)
        ledger[self] += 1


_ledgers: WeakKeyDictionary[torch.nn.Module, dict[GraphRecord, int]] = WeakKeyDictionary()
_lock = threading.Lock()


def attach(module: torch.nn.Module, record: GraphRecord) -> dict[GraphRecord, int]:
    """Let ``record`` be reported under ``module``; gives the module's ledger. Idempotent."""
    with _lock:
        ledger = _ledgers.setdefault(module, {})
        ledger.setdefault(record, 0)
    return ledger


def withdraw(module: torch.nn.Module, record: GraphRecord) -> None:
    """A graph was thrown away before it ran."""
    with _lock:
        _ledgers.get(module, {}).pop(record, None)


def detach(module: torch.nn.Module) -> None:
    """Forget what ran under ``module`` (``restore`` does this)."""
    with _lock:
        _ledgers.pop(module, None)


def attached(module: torch.nn.Module) -> dict[GraphRecord, int]:
    """The records that ran under ``module``, each with its number of forwards there."""
    return dict(_ledgers.get(module, {}))


def collapse(path: str) -> str:
    """Numbers in a module path become stars, so that equal layers fall together: h.3.mlp -> h.*.mlp."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def join(*parts: str) -> str:
    """Module paths, joined; empty parts vanish."""
    return ".".join(part for part in parts if part)


@dataclass
class Report:
    """What was done to a model and what has executed since. ``str()`` of it is a table.

    ``memory``: what was planned for the budget that was given (optimize's ``memory``), None where none was.
    """

    sites: list[Site] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: MemoryPlan | None = None

    @classmethod
    def of(cls, model: torch.nn.Module, notes: Iterable[str] = (), errors: Iterable[str] = (),
           memory: MemoryPlan | None = None) -> Report:  # fmt: skip
        """Gather the records of every module of ``model``: a site counts once in each module that runs it."""
        graphs: dict[GraphRecord, int] = {}
        sites: list[Site] = []
        for path, module in model.named_modules():
            ledger = attached(module)
            for record, calls in ledger.items():
                graphs[record] = graphs.get(record, 0) + calls
            sites += _sites_of(path, ledger)
        return cls(
            sites=merge(sites),
            graphs=[replace(record, calls=calls) for record, calls in graphs.items()],
            notes=_unique([*notes, *(str(note) for record in graphs for note in (*record.notes, *record.reads))]),
            errors=_unique([*errors, *(error for record in graphs for error in record.errors)]),
            memory=memory,
        )

    def named(self, rule: str, status: Status = "fused") -> list[Site]:
        """The sites of one rule with one status."""
        return [site for site in self.sites if site.rule == rule and site.status == status]

    def count(self, rule: str, status: Status = "fused") -> int:
        """How many places have this rule and this status."""
        return sum(site.count for site in self.named(rule, status))

    @property
    def saved_bytes(self) -> tuple[int, int]:
        """Bytes kept for the backward by the fused sites that know theirs: (eager, fused)."""
        before = after = 0
        for site in self.sites:
            if site.status != "fused" or site.saved_bytes_before is None or site.saved_bytes_after is None:
                continue
            before += site.count * site.saved_bytes_before
            after += site.count * site.saved_bytes_after
        return before, after

    def assert_fused(self, rule: str, min: int = 1) -> None:
        """Raise ``NotFused`` (an ``AssertionError``) unless at least ``min`` places run fused by ``rule``."""
        found = self.count(rule)
        if found >= min:
            return
        told = [
            f"{site.count} {site.status} at {site.module or 'the top'}: {site.reason or 'no reason recorded'}"
            for site in self.sites
            if site.rule == rule and site.status != "fused"
        ]
        if not told:
            rules = sorted({site.rule for site in self.sites if site.status == "fused"})
            told = [f"no other site of that rule; fused rules here: {', '.join(rules) or 'none'}"]
        what = "; ".join([*told, *self.errors])
        raise NotFused(f"expected at least {min} fused {rule!r}, found {found}; {what}")

    def to_json(self) -> str:
        """The whole report as JSON; ``Report.from_json`` gives an equal one."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote."""
        from fxfuse.reporting import memory

        data = json.loads(text)
        graphs = [GraphRecord(**{**graph, "sites": _load_sites(graph["sites"])}) for graph in data["graphs"]]
        plan = memory.load(data["memory"]) if data.get("memory") else None
        return cls(_load_sites(data["sites"]), graphs, data["notes"], data["errors"], plan)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page; gives its path."""
        from fxfuse.reporting.html import page

        target = Path(path)
        target.write_text(page(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        from fxfuse.reporting.text import table

        return table(self)


def _load_sites(rows: list[dict]) -> list[Site]:
    known = {f.name for f in fields(Site)}
    return [Site(**{key: value for key, value in row.items() if key in known}) for row in rows]


def _sites_of(path: str, ledger: dict[GraphRecord, int]) -> Iterator[Site]:
    """The sites of one module: the same site in two graphs (of two batch sizes, say) is one place."""
    places: dict[tuple, Site] = {}
    for record, calls in ledger.items():
        here = [
            replace(site, module=collapse(join(path, site.module)), launches=calls * site.count)
            for site in record.sites
        ]
        for site in merge(here):
            key = _identity(site)
            seen = places.get(key)
            places[key] = site if seen is None else _together(seen, site, max(seen.count, site.count))
    yield from places.values()


def merge(sites: Iterable[Site]) -> list[Site]:
    """Equal places of different modules become one row with their number."""
    rows: dict[tuple, Site] = {}
    for site in sites:
        key = _identity(site)
        seen = rows.get(key)
        rows[key] = replace(site) if seen is None else _together(seen, site, seen.count + site.count)
    return list(rows.values())


def _identity(site: Site) -> tuple:
    """What makes two sites the same row of a report. Numbers inside a reason (a shape, say) do not."""
    return site.rule, site.module, site.status, re.sub(r"\d+", "#", site.reason), site.implementation


def _together(a: Site, b: Site, count: int) -> Site:
    ratios = [site.error_ratio for site in (a, b) if site.error_ratio is not None]
    return replace(
        a,
        count=count,
        launches=a.launches + b.launches,
        error_ratio=max(ratios, default=None),
        saved_bytes_before=_largest(a.saved_bytes_before, b.saved_bytes_before),
        saved_bytes_after=_largest(a.saved_bytes_after, b.saved_bytes_after),
        near_miss=a.near_miss or b.near_miss,
    )


def _largest(a: int | None, b: int | None) -> int | None:
    """Layers of a kind save the same; where graphs differ in shape, memory must hold the largest."""
    return max((value for value in (a, b) if value is not None), default=None)


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
