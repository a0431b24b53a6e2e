"""The report as a table that a person reads in ten seconds: what is fused, then what is not and why."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fxfuse.reporting import memory
from fxfuse.reporting.records import GraphRecord, Report, Site

WIDTH = 120


def table(report: Report) -> str:
    """The whole report as plain text, at most ``WIDTH`` columns wide."""
    fused = [site for site in report.sites if site.status == "fused"]
    rest = [site for site in report.sites if site.status != "fused"]
    parts: list[RenderableType] = [Text(headline(report))]
    if fused:
        parts.append(_fused_table(fused))
        parts.append(Text(_saved_line(report)))
    if rest:
        parts.append(_rest_table(rest))
    if report.memory is not None:
        parts += memory.section(report.memory)
    for site in report.sites:
        if site.near_miss:
            parts.append(Text(f"near miss  {site.rule} at {site.module or '(top)'}: {site.near_miss}"))
    parts += [Text(f"note       {note}") for note in report.notes]
    parts += [Text(f"ERROR      {error}") for error in report.errors]
    return render(parts)


def headline(report: Report) -> str:
    """How many places are fused and how many not; which graphs ran; bytes kept by the fused sites."""
    counts = Counter[str]()
    for site in report.sites:
        counts[site.status] += site.count
    told = [f"fxfuse: {counts['fused']} of {counts.total()} sites fused"]
    told += [f"{counts[status]} {status}" for status in ("served", "declined", "pending") if counts[status]]
    if report.errors:
        told.append(plural(len(report.errors), "error"))
    return ", ".join(told) + "; " + graph_line(report.graphs)


def graph_line(graphs: Iterable[GraphRecord]) -> str:
    """How many graphs of which kind, and how often they ran."""
    kinds, calls = Counter[str](), 0
    for graph in graphs:
        kinds[graph.kind] += graph.graphs
        calls += graph.calls
    if not kinds:
        return "no graphs yet"
    parts = " + ".join(f"{number} {kind}" for kind, number in kinds.items())
    ran = f"ran {plural(calls, 'time')}" if calls else "not run"
    return f"{plural(kinds.total(), 'graph')} ({parts}) {ran}"


def _saved_line(report: Report) -> str:
    before, after = report.saved_bytes
    if not before and not after:
        return ""
    return f"kept for the backward by these sites: {quantity(before)} in eager, {quantity(after)} fused\n"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quantity(size: int | None) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    if size is None:
        return ""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def saved_change(site: Site) -> str:
    """What one execution of a site keeps for the backward: eager's bytes -> ours."""
    if site.saved_bytes_before is None and site.saved_bytes_after is None:
        return ""
    return f"{quantity(site.saved_bytes_before) or '?'} -> {quantity(site.saved_bytes_after) or '?'}"


def ratio(site: Site) -> str:
    """Our error over eager's, both against float64."""
    return "" if site.error_ratio is None else f"{site.error_ratio:.2f}"


def _fused_table(sites: list[Site]) -> Table:
    """One row a rule and place. A column of numbers that says nothing (a model that has not run) is left out."""
    ran = any(site.launches for site in sites)
    numbers = {
        "sites": [str(site.count) for site in sites],
        "launches": [str(site.launches) if ran else "" for site in sites],
        "error": [ratio(site) for site in sites],
        "saved, each": [saved_change(site) for site in sites],
    }
    telling = {title: cells for title, cells in numbers.items() if any(cells)}
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    grid.add_column("fused by rule", no_wrap=True)
    grid.add_column("where", overflow="fold")
    for title in telling:
        grid.add_column(title, justify="right", no_wrap=True)
    grid.add_column("by", no_wrap=True)
    for site, *cells in zip(sites, *telling.values(), strict=True):
        grid.add_row(site.rule, Text(site.module or "(top)"), *cells, site.implementation)
    return grid


def _rest_table(sites: list[Site]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    grid.add_column("not fused", no_wrap=True)
    grid.add_column("where", overflow="fold")
    grid.add_column("sites", justify="right", no_wrap=True)
    grid.add_column("status", no_wrap=True)
    grid.add_column("reason", overflow="fold")
    for site in sites:
        where, reason = Text(site.module or "(top)"), Text(site.reason.partition("\n")[0])
        grid.add_row(site.rule, where, str(site.count), site.status, reason)
    return grid


def render(parts: Iterable[RenderableType]) -> str:
    """Rich renderables as plain text: no colour, no trailing blanks, no two blank lines together."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    for part in parts:
        console.print(part)
    lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).rstrip("\n")
