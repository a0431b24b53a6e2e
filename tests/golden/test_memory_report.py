"""The memory section of the report: what it says of a plan, in text, JSON and on the page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fxfuse.memory.plan import BlockPlan, Choice, Kept, MemoryPlan, Point
from fxfuse.reporting import frontier_plot, memory
from fxfuse.reporting.frontier_svg import drawing
from fxfuse.reporting.records import Report

GIB, MIB = 1 << 30, 1 << 20
GATE = Kept("mm", "product 8192x18944 (mlp.gate_proj)", 296 * MIB, 1.66)
UP = Kept("mm_1", "product 8192x18944 (mlp.up_proj)", 296 * MIB, 1.66)
SEEN = Kept("sdpa", "attention", 56 * MIB)
ALL = Point(Choice(), "keep all", saved_bytes=648 * MIB, saved=(GATE, UP, SEEN))
LESS = Point(Choice(recompute=("mm", "mm_1")), "without gate, up", saved_bytes=56 * MIB, recompute_ms=3.32, saved=(SEEN,),
             recomputed=(GATE, UP))  # fmt: skip
AWAY = Point(Choice(offload=("sdpa",), tiles=4), "away", offloaded_bytes=56 * MIB, copy_ms=0.4, tiles=4, offloaded=(SEEN,))


@pytest.fixture
def plan() -> MemoryPlan:
    points = [LESS] * 3 + [ALL, AWAY]
    blocks = [BlockPlan(f"model.layers.{i}", "Layer", point) for i, point in enumerate(points)]
    return MemoryPlan(
        budget=12 * GIB, device="cuda:0", blocks=blocks, parts={"weights": 5 * GIB, "saved by blocks": 6 * GIB, "nothing": 0},
        predicted_peak=11 * GIB, measured_peak=10 * GIB, margin=GIB // 4, step_ms=552.0, extra_ms=10.4,
        rates="table: NVIDIA H200", frontier=[(7 * GIB, 140.0), (24 * GIB, 0.0)], notes=["the user's checkpointing is replaced"],
    )  # fmt: skip


def test_the_text_says_peak_parts_points_and_price(plan: MemoryPlan) -> None:
    told = str(Report(memory=plan))
    assert "memory 12.00 GiB on cuda:0: predicted peak 11.00 GiB, measured 10.00 GiB (-10.0%), 256.0 MiB left free" in told
    assert re.search(r"6.00 GiB\s+55%  saved by blocks\n\s+5.00 GiB\s+45%  weights\n", told)
    assert "nothing" not in told.partition("step 552")[0]
    assert "step 552 ms predicted, 10 ms of it for recomputation and copies; rates: table: NVIDIA H200" in told
    assert re.search(r"model.layers.0-2\s+without gate, up\s+3\s+56.0 MiB\s+592.0 MiB\s+\+3.32", told)
    assert re.search(r"recomputed\s+296.0 MiB  product 8192x18944 \(mlp.gate_proj\)", told)
    assert re.search(r"model.layers.4\s+away\s+1\s+0.0 KiB\s+56.0 MiB\s+56.0 MiB\s+\+0.40\s+4", told)
    assert "frontier   7.00 GiB +140 ms, 24.00 GiB +0 ms" in told
    assert "note       the user's checkpointing is replaced" in told


def test_without_a_budget_nothing_is_said() -> None:
    assert "memory" not in str(Report())
    assert Report.from_json(Report().to_json()).memory is None


def test_json_gives_the_plan_back(plan: MemoryPlan) -> None:
    assert Report.from_json(Report(memory=plan).to_json()).memory == plan


def test_the_page_has_the_frontier_with_this_plan_on_it(plan: MemoryPlan, tmp_path: Path) -> None:
    page = Report(memory=plan).to_html(tmp_path / "report.html").read_text()
    assert "<h2>Memory</h2>" in page
    assert "product 8192x18944 (mlp.gate_proj)" in page
    drawn = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL).group())
    circles = drawn.findall("circle")
    assert [circle.find("title").text for circle in circles] == [
        "7.00 GiB, 682 ms", "11.00 GiB, 552 ms", "24.00 GiB, 542 ms"]  # fmt: skip
    assert [circle.get("class") for circle in circles] == ["other", "plan", "other"]
    across, down = ([float(circle.get(c)) for circle in circles] for c in ("cx", "cy"))
    assert across == sorted(across)
    assert down == sorted(down)  # more memory, less time: further down on a page


def test_a_plan_without_other_budgets_has_no_frontier(plan: MemoryPlan, tmp_path: Path) -> None:
    plan.frontier = []
    assert drawing(plan) == ""
    assert "<svg" not in Report(memory=plan).to_html(tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="no frontier to draw"):
        frontier_plot.write(plan, tmp_path / "frontier.svg")


def test_the_frontier_is_written_as_svg_or_png(plan: MemoryPlan, tmp_path: Path) -> None:
    ElementTree.fromstring(frontier_plot.write(plan, tmp_path / "frontier.svg").read_text())
    pytest.importorskip("matplotlib")
    assert frontier_plot.write(plan, tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_many_small_tensors_are_one_line() -> None:
    point = Point(Choice(), saved=tuple(Kept(f"n{i}", f"tensor {i}", MIB - i) for i in range(9)))
    lines = memory.tensor_lines(point)
    assert len(lines) == memory.LISTED + 1
    assert lines[-1][1] == "3 smaller"
    assert memory.tensor_lines(Point(Choice(), saved=(GATE, GATE))) == [
        ("saved", "2 x product 8192x18944 (mlp.gate_proj)", "592.0 MiB")]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["model.layers.0", "model.layers.1", "model.layers.2", "model.layers.7"], "model.layers.0-2,7"),
        (["model.layers.3"], "model.layers.3"),
        (["encoder.0", "decoder.0"], "encoder.0, decoder.0"),
        (["h.1.attn", "h.2.attn"], "h.1-2.attn"),
        (["a", "a.b"], "a, a.b"),
    ],
)
def test_places_are_ranges(paths: list[str], told: str) -> None:
    assert memory.places(paths) == told
