"""The report: what it counts, how it prints, that nothing is lost on the way to JSON and the page."""

from __future__ import annotations

import copy
import gc
import pickle
import re

import pytest
from torch import nn

from fxfuse.errors import NotFused
from fxfuse.reporting import records
from fxfuse.reporting.records import GraphRecord, Report, Site, attach, attached, collapse, detach

MIB = 2**20

PRINTED = """\
fxfuse: 8 of 10 sites fused, 1 declined, 1 pending, 1 error; 3 graphs (2 block + 1 head) ran 15 times

 fused by rule     where          sites  launches  error         saved, each  by
 ───────────────────────────────────────────────────────────────────────────────────
 rms_norm          layers.*.norm      4        12   0.97     512 KiB -> 64 B  triton
 gated_activation  layers.*.mlp       4        12   1.21  512 KiB -> 512 KiB  triton

kept for the backward by these sites: 4.0 MiB in eager, 2.0 MiB fused

 not fused  where          sites  status    reason
 ───────────────────────────────────────────────────────────────────────────────
 rope       layers.*.attn      1  declined  the cosines are overwritten in place
 softmax    (top)              1  pending   not run yet

near miss  rope at layers.*.attn: half-split, but the sine is not negated
note       deep-copied after optimize: the copy runs eager
ERROR      block recompiled 65 times: it runs eager now"""


@pytest.fixture
def report() -> Report:
    sites = [
        Site("rms_norm", "layers.*.norm", "fused", "", "triton", 4, 12, 0.97, MIB // 2, 64),
        Site("gated_activation", "layers.*.mlp", "fused", "", "triton", 4, 12, 1.21, MIB // 2, MIB // 2),
        Site(
            "rope",
            "layers.*.attn",
            "declined",
            "the cosines are overwritten in place",
            near_miss="half-split, but the sine is not negated",
        ),
        Site("softmax", "", "pending", "not run yet"),
    ]
    graphs = [
        GraphRecord("block", "Layer", sites[:3], 2, 12, "return x < 1", "return gy"),
        GraphRecord("head", "Model", sites[3:], 1, 3),
    ]
    notes = ["deep-copied after optimize: the copy runs eager"]
    return Report(sites, graphs, notes, ["block recompiled 65 times: it runs eager now"])


def test_the_table_is_read_in_ten_seconds(report: Report) -> None:
    assert str(report) == PRINTED


def test_no_line_is_wider_than_a_screen(report: Report) -> None:
    report.sites[2].reason = "word " * 200
    report.sites[0].module = "a_very_long_name." * 12
    assert max(map(len, str(report).splitlines())) <= 120


def test_an_empty_report_prints_too() -> None:
    assert str(Report()) == "fxfuse: 0 of 0 sites fused; no graphs yet"


def test_json_loses_nothing(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again.sites == report.sites
    assert [vars(graph) for graph in again.graphs] == [vars(graph) for graph in report.graphs]
    assert (again.notes, again.errors) == (report.notes, report.errors)
    assert str(again) == str(report)


def test_the_page_stands_alone_and_escapes(report: Report, tmp_path) -> None:
    text = report.to_html(tmp_path / "report.html").read_text()
    assert not re.search(r"<script|src=|href=|@import|url\(", text)
    assert "return x &lt; 1" in text
    for site in report.sites:
        assert site.reason in text
    assert text.count("<tr>") == text.count("</tr>") == 2 + len(report.sites)


def test_assert_fused_says_what_was_found_instead(report: Report) -> None:
    report.assert_fused("rms_norm")
    report.assert_fused("rms_norm", min=4)
    with pytest.raises(NotFused, match="at least 5 fused 'rms_norm', found 4"):
        report.assert_fused("rms_norm", min=5)
    with pytest.raises(AssertionError, match=r"1 declined at layers\.\*\.attn: the cosines are overwritten"):
        report.assert_fused("rope")
    with pytest.raises(AssertionError, match="fused rules here: gated_activation, rms_norm"):
        report.assert_fused("layer_norm")


def test_equal_layers_are_one_row_and_their_launches_add_up() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    record = GraphRecord("block", sites=[Site("rms_norm", "norm", "fused", count=2)])
    for layer in model["layers"]:
        record.executed(layer)
    record.executed(model["layers"][0])
    (site,) = Report.of(model).sites
    assert (site.module, site.count, site.launches) == ("layers.*.norm", 6, 8)
    (graph,) = Report.of(model).graphs
    assert graph.calls == record.calls == 4


def test_a_second_graph_of_the_same_module_is_no_second_site() -> None:
    model = nn.Linear(2, 2)
    for batch in (1, 8):
        GraphRecord("whole", notes=[f"batch {batch}"], sites=[Site("rope", "q", "fused")]).executed(model)
    report = Report.of(model)
    assert (report.count("rope"), report.sites[0].launches, len(report.graphs)) == (1, 2, 2)
    assert report.notes == ["batch 1", "batch 8"]


def test_two_sites_of_one_graph_stay_two() -> None:
    model = nn.Linear(2, 2)
    GraphRecord("whole", sites=[Site("rms_norm", "", "fused"), Site("rms_norm", "", "fused")]).executed(model)
    assert Report.of(model).count("rms_norm") == 2


def test_another_model_with_the_same_graph_has_its_own_launches() -> None:
    record = GraphRecord("block", sites=[Site("rope", "", "fused")])
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    record.executed(first)
    record.executed(first)
    record.executed(second)
    assert Report.of(first).sites[0].launches == 2
    assert Report.of(second).sites[0].launches == 1


def test_fused_and_declined_for_two_reasons_are_three_rows() -> None:
    declined = [Site("rope", "a", "declined", reason) for reason in "xyx"]
    assert [site.count for site in records.merge([Site("rope", "a", "fused"), *declined])] == [1, 2, 1]
    numbered = [Site("rope", "a", "declined", f"width {n} is odd") for n in (3, 5)]
    assert [site.count for site in records.merge(numbered)] == [2]


def test_records_leave_no_trace_on_the_module() -> None:
    model = nn.Linear(2, 2)
    before = set(vars(model))
    GraphRecord("block", sites=[Site("rope", "", "fused")]).executed(model)
    assert set(vars(model)) == before
    assert not attached(copy.deepcopy(model))
    assert not attached(pickle.loads(pickle.dumps(model)))
    detach(model)
    assert Report.of(model).sites == []


def test_a_record_does_not_keep_a_model_alive() -> None:
    import weakref

    model = nn.Linear(2, 2)
    record = GraphRecord("block")
    attach(model, record)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("path", "told"),
    [("model.layers.11.mlp", "model.layers.*.mlp"), ("0", "*"), ("", ""), ("h.1.attn.2.q8", "h.*.attn.*.q8")],
)
def test_collapse(path: str, told: str) -> None:
    assert collapse(path) == told
