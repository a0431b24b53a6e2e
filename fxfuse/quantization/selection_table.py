"""A selection for people: the table and the plot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..memory.plan import size_text

if TYPE_CHECKING:
    from .selection import Selection

_SHOWN = 12


def as_text(selection: Selection) -> str:
    """The kept linears, then the most sensitive of those that were not, and the sums."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(selection), title_justify="left")
    for name in ("linear", "stored in", "weight error", "activation error", "divergence, nats", "nats per MiB kept"):
        table.add_column(name, justify="left" if name in ("linear", "stored in") else "right")
    ranked = sorted(selection.rows, key=lambda row: (not row.kept, -row.gain))
    shown = [row for row in ranked if row.kept][: 2 * _SHOWN] + [row for row in ranked if not row.kept][:_SHOWN]
    for row in shown:
        found = row.sensitivity
        table.add_row(row.name, "16 bits" if row.kept else "4 bits", f"{found.weight_error:.2e}",
                      f"{found.activation_error:.2e}", f"{found.divergence:.2e}", f"{row.gain:.2e}")  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, width=140)
    console.print(table)
    if len(shown) < len(ranked):
        console.print(f"{len(ranked) - len(shown)} more linears")
    for note in selection.notes:
        console.print(note)
    return text.getvalue().rstrip()


def _title(selection: Selection) -> str:
    title = (f"{len(selection.kept)} of {len(selection.rows)} linears stay in 16 bits; {size_text(selection.bytes)} "
             f"of {size_text(selection.budget)}")
    if selection.uniform is not None and selection.selected is not None:
        title += f"; divergence {selection.selected:.2e} nats a token, all in 4 bits {selection.uniform:.2e}"
    return title


def as_plot(selection: Selection, path: Path) -> Path:
    """Bars in the model's order, on a logarithmic scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib (pip install matplotlib); str(selection) and to_json() need nothing") from error

    figure = Figure(figsize=(max(6.0, 0.09 * len(selection.rows)), 3.6), layout="constrained")
    axes = figure.subplots()
    smallest = min((row.sensitivity.divergence for row in selection.rows if row.sensitivity.divergence > 0), default=1e-9)
    for kept, colour, label in ((False, "#9aa5b1", "4 bits"), (True, "#c2410c", "16 bits")):
        places = [place for place, row in enumerate(selection.rows) if row.kept == kept]
        heights = [max(selection.rows[place].sensitivity.divergence, smallest) for place in places]
        axes.bar(places, heights, color=colour, label=label, width=0.9)
    axes.set_yscale("log")
    axes.set_xlabel("linear, in the model's order")
    axes.set_ylabel("divergence when it alone is in 4 bits, nats a token")
    axes.set_title(_title(selection), fontsize=9, loc="left")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
