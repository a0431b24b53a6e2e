"""benchmarks/frontier.py: what its verdict says of rows, its search for the longest sequence, and a dry run at toy widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import frontier_plot, frontier_tables, longest
from benchmarks.jobs import Contender, split
from benchmarks.rows import read
from fxfuse.memory.plan import Choice, Point

ROOT = Path(__file__).resolve().parents[2]


def _row(contender: str, ms: float, gib: float, run: str = "a", **more: Any) -> dict[str, Any]:
    base = dict(kind="step", workload="W1", contender=contender, repeat=0, whole=True, setup="a model, b1, kept")
    told = dict(ms=ms, ms_min=ms, ms_max=ms, peak_gib=gib, tokens_s=1.0, first_step_s=1.0, loss0=2.0, grad_norm=1.0)
    return base | told | dict(run=run, gpu="g", versions={}, commit="c") | more


OURS = [_row("fxfuse[memory=8GiB]", 600, 8.0), _row("fxfuse[memory=24GiB]", 500, 23.0)]


@pytest.mark.parametrize(
    ("ms", "gib", "is_below"),
    [
        (620, 8.0, False),  # slower at the same memory
        (600, 9.0, False),  # as fast in more
        (590, 8.1, True),  # faster, and no point of ours is as small and as fast
        (700, 7.0, True),  # smaller than any of ours
        (501, 24.0, False),
        (593, 8.0, False),  # within noise
    ],
)
def test_a_peer_is_below_ours_where_none_of_ours_is_as_fast_and_as_small(ms: float, gib: float, is_below: bool) -> None:
    assert frontier_tables.below(_row("unsloth[checkpointing=off]", ms, gib), OURS) is is_below


def test_complaints_name_what_acceptance_would_refuse() -> None:
    rows = [
        *OURS,
        _row("unsloth[checkpointing=on]", 480, 23.0),
        _row("hf", 1100.0, 23.4),  # an anchor that is off
        _row("fxfuse[memory=12GiB]", 560, 12.5, memory="12GiB", predicted_gib=11.5),
        _row("fxfuse[memory=16GiB]", 540, 15.0, memory="16GiB", predicted_gib=15.1, first_peak_gib=17.0),
    ]
    told = [line.split(" W1")[0] for line in frontier_tables.complaints(rows)]
    assert told == ["BELOW OURS", "PREDICTION", "OVER BUDGET", "OVER BUDGET in its first step", "ANCHOR OFF"]
    assert frontier_tables.complaints([*OURS, _row("hf", 921.0, 23.4)]) == []


def test_the_table_shows_the_last_run_whose_anchors_hold(tmp_path: Path) -> None:
    rows = [
        *OURS,
        _row("hf", 921.0, 23.4),
        _row("fxfuse[memory=8GiB]", 300, 8.0, run="slow"),
        _row("hf", 1200.0, 23.4, run="slow"),
        _row("fxfuse[memory=8GiB]", 200, 8.0, run="cut", whole=False),
        dict(_row("unsloth", 1, 1), ms=None, failed="no memory", kind="step"),
    ]
    del rows[-1]["ms"]
    (tmp_path / "frontier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = frontier_tables.frontier(tmp_path)
    assert "| W1, c | **fxfuse[memory=8GiB]** | 8.00 | 600.0 |" in table
    assert "| W1, c | hf | 23.40 | 921.0 |" in table
    assert "300.0" not in table
    assert "200.0" not in table
    assert "peers below our frontier: none" in table


def test_the_plot_is_drawn_from_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    frontier_plot.draw([[*OURS, _row("unsloth", 723.0, 8.2)]], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("limit", [100, 1000, 78_475, 400_000])
def test_the_longest_sequence_is_found_within_one_part_in_64(limit: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = longest.bisect(fits, *longest.grow(fits, 8192))
    assert found <= limit
    assert limit - found <= max(2 * longest.STEP, limit // 32)
    assert len(tried) == len(set(tried)) < 24


def test_the_search_goes_on_from_a_length_that_is_known_to_fit() -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= 70_000

    found = longest.bisect(fits, *longest.grow(fits, 8192, longest=65_536))
    assert min(tried) > 65_536
    assert 69_000 < found <= 70_000


def test_the_search_lies_between_lengths_that_were_tried() -> None:
    def never(length: int) -> bool:
        raise AssertionError

    assert longest.between(never, 8192, {65_536: True, 98_304: True, 114_688: False, 131_072: False}) == (98_304, 114_688)
    assert longest.between(lambda length: length < 150_000, 8192, {98_304: True})[0] > 98_304
    assert longest.between(lambda length: length < 10_000, 8192, {98_304: False}) == (8192, 12_288)


def test_layers_left_out_keep_what_their_share_of_the_host_does_not_hold() -> None:
    point = Point(Choice(offload=("x",)), saved_bytes=3, offloaded_bytes=100)
    assert longest.kept_beside_host(24, point, share=None, layers=8) == 24 * 3
    assert longest.kept_beside_host(24, point, share=800, layers=8) == 24 * 3
    assert longest.kept_beside_host(24, point, share=640, layers=8) == 24 * (3 + 20)


def test_layers_left_out_are_at_the_point_that_keeps_least_in_all() -> None:
    """Where the host is full, a point that sends more keeps more."""
    much = Point(Choice(offload=("x", "y")), saved_bytes=1, offloaded_bytes=100)
    little = Point(Choice(offload=("x",)), saved_bytes=3, offloaded_bytes=30)
    assert longest.least_beside_host(24, [much, little], share=None, layers=8) == 24
    assert longest.least_beside_host(24, [much, little], share=80, layers=8) == 24 * (3 + 20)


def test_longest_is_of_the_last_run_with_two_contenders_and_says_time_a_token(tmp_path: Path) -> None:
    def trial(contender: str, length: int, us: float) -> dict[str, Any]:
        return _row(contender, us, 20.0) | dict(kind="longest", workload="long", cap_gib=24.0, length=length, us_a_token=us)

    failed = trial("unsloth", 98304, 0.0) | dict(failed="OutOfMemoryError")
    alone = trial("fxfuse", 131072, 300.0) | dict(run="later")
    rows = [trial("unsloth", 8192, 90.0), trial("unsloth", 65536, 200.0), failed,
            trial("fxfuse", 8192, 70.0), trial("fxfuse", 65536, 180.0), trial("fxfuse", 98304, 240.0), alone]
    (tmp_path / "frontier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = frontier_tables.longest(tmp_path)
    assert "| 24 GiB | unsloth | 65,536 | 98,304 | 90.0 at 8,192, 200.0 at 65,536 |" in table
    assert "| 24 GiB | fxfuse | 98,304 |  | 70.0 at 8,192, 180.0 at 65,536, 240.0 at 98,304 |" in table


def test_budgets_and_checkpointing_are_options_of_a_name() -> None:
    ours = Contender.of("fxfuse[memory=8.2GiB|auto|0.5;exclude=rope]")
    assert ours.budgets == ("8.2GiB", "auto", 0.5)
    assert ours.arguments == dict(exclude=("rope",))
    assert ours.at("auto") == "fxfuse[memory=auto;exclude=rope]"
    assert Contender.of("unsloth[checkpointing=offload]").checkpointing == "offload"
    assert [job.workload for job in split("W1:hf[checkpointing=off],long:unsloth")] == ["W1", "long"]
    for wrong in ("hf[checkpointing=offload]", "hf[checkpointing=maybe]", "hf[memory=8GiB]"):
        with pytest.raises(ValueError, match=r"checkpointing is on or off|takes options"):
            Contender.of(wrong)


def test_a_dry_run_of_two_budgets_and_a_peer(tmp_path: Path) -> None:
    out = tmp_path / "frontier.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "frontier.py"), "--out", str(out), "--logs", str(tmp_path)]
    command += ["--tiny", "--cpu", "--layers", "2", "--length", "32", "--warmup", "1", "--steps", "1", "--workloads", "W3"]
    command += ["--budgets", "1B,1GiB", "--peers", "hf", "--ours", "remainder=eager"]
    environment = dict(os.environ, RUN="test", COMMIT="test")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    found = {row["contender"]: row for row in read(out)}
    refused, planned = (found[f"fxfuse[memory={budget};remainder=eager]"] for budget in ("1B", "1GiB"))
    assert "failed" in refused  # a budget below the least possible is a row, and the next one still runs
    assert planned["saved_gib"] < found["hf"]["saved_gib"]
    assert planned["loss0"] == pytest.approx(found["hf"]["loss0"], rel=1e-3)
    assert planned["memory"] == "1GiB"
    assert {"predicted_gib", "points", "parts_gib"} <= planned.keys()
    assert done.returncode == 1
