"""The report as one plain page: no script, no network, readable when mailed to someone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxfuse.memory.plan import MemoryPlan, size_text
from fxfuse.reporting import frontier_svg, memory
from fxfuse.reporting.records import Report, Site
from fxfuse.reporting.text import headline, ratio, saved_change

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 2rem; width: 100% }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd }
td { vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
code, pre { font: 13px/1.4 ui-monospace, monospace }
pre { background: #f6f6f4; padding: .8rem; overflow-x: auto }
.error { color: #a00 }
@media (prefers-color-scheme: dark) {
  body { background: #171717; color: #ddd } th, td { border-color: #3a3a3a } pre { background: #222 }
  .error { color: #f77 }
}
""" + frontier_svg.STYLE

FUSED = ("rule", "where", "#sites", "#launches", "#error", "#saved, each", "by")
REST = ("rule", "where", "#sites", "status", "reason")


def page(report: Report) -> str:
    """The page as text."""
    fused = [site for site in report.sites if site.status == "fused"]
    rest = [site for site in report.sites if site.status != "fused"]
    body = [f"<h1>fxfuse report</h1><p>{escape(headline(report))}</p>"]
    body += [f'<p class="error">{escape(error)}</p>' for error in report.errors]
    if fused:
        body.append("<h2>Fused</h2>" + _table(FUSED, map(_fused_row, fused)))
    if rest:
        body.append("<h2>Not fused</h2>" + _table(REST, map(_rest_row, rest)))
    if report.memory is not None:
        body += _memory(report.memory)
    near = [f"{site.rule} at {site.module}: {site.near_miss}" for site in report.sites if site.near_miss]
    body += _list("Near misses", near)
    body += _list("Notes", report.notes)
    body += _sources(report)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fxfuse report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _fused_row(site: Site) -> Sequence[str]:
    numbers = (str(site.count), str(site.launches), ratio(site), saved_change(site))
    return (site.rule, site.module or "(top)", *numbers, site.implementation)


def _rest_row(site: Site) -> Sequence[str]:
    return (site.rule, site.module or "(top)", str(site.count), site.status, site.reason)


def _memory(plan: MemoryPlan) -> list[str]:
    """The plan: peak and its parts, the frontier with this plan on it, blocks by point, and what each point decides."""
    told = [memory.headline(plan), memory.time_line(plan)]
    body = ["<h2>Memory</h2>", *(f"<p>{escape(line)}</p>" for line in told if line), frontier_svg.drawing(plan)]
    parts = [(name, size_text(size), f"{share:.0%}") for name, size, share in memory.parts_lines(plan)]
    body.append(_table(("the peak is made of", "#", "#share"), parts))
    if plan.blocks:
        body.append(_table(memory.COLUMNS, memory.rows(plan)))
    for group in memory.groups(plan):
        title = escape(f"{group.point.name}: each of {group.where}")
        tensors = _table(("", "tensor", "#bytes"), memory.tensor_lines(group.point))
        body.append(f"<details><summary>{title}</summary>{tensors}</details>")
    return [*body, *_list("Notes on memory", plan.notes)]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a title that starts with # is a column of numbers."""
    kinds = [' class="n"' if title.startswith("#") else "" for title in titles]
    lines = [_line("th", kinds, [title.removeprefix("#") for title in titles])]
    lines += [_line("td", kinds, row) for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _line(tag: str, kinds: Sequence[str], texts: Sequence[str]) -> str:
    cells = (f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
    return "<tr>" + "".join(cells) + "</tr>"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [f"<h2>{escape(title)}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"]


def _sources(report: Report) -> list[str]:
    """Each graph as it runs, folded away."""
    parts = []
    for graph in report.graphs:
        for title, source in (("forward", graph.forward_source), ("backward", graph.backward_source)):
            if source:
                name = escape(f"{graph.kind} {graph.module}: {title}")
                parts.append(f"<details><summary>{name}</summary><pre>{escape(source)}</pre></details>")
    return ["<h2>Graphs</h2>", *parts] if parts else []
