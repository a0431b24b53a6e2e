"""The cost gate: what was measured faster elsewhere is left there, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fxfuse import cost_gate
from fxfuse.backend import Backend
from fxfuse.canonical.facts import tensor_of
from fxfuse.reporting.records import GraphRecord
from fxfuse.rules import load_patterns
from fxfuse.tracing import trace_function


def mlp(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.silu(x) * y, F.gelu(y)


def sites(backend: Backend) -> dict[str, object]:
    gm = trace_function(mlp, torch.randn(4, 16), torch.randn(4, 16))
    assert tensor_of(next(iter(gm.graph.nodes))) is not None
    record = GraphRecord("block", "mlp")
    backend.rewrite(gm, record)
    return {site.rule: site for site in record.sites}


@pytest.fixture
def slow_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"cpu": {"activation": {"implementation": "eager", "ratio": "1.25", "run": "20261121-000000"}}}
    monkeypatch.setattr(cost_gate, "site_costs", lambda: table)


@pytest.mark.usefixtures("slow_activations")
def test_a_site_that_eager_runs_faster_is_served_by_eager() -> None:
    found = sites(Backend())
    assert found["activation"].status == "served"
    assert found["activation"].implementation == "eager"
    assert "1.25 times as fast" in found["activation"].reason
    assert found["gated_activation"].status == "fused"


@pytest.mark.usefixtures("slow_activations")
def test_a_rule_that_is_asked_for_is_not_gated() -> None:
    assert sites(Backend(rules=("activation",)))["activation"].status == "fused"


def test_without_a_measurement_nothing_is_gated() -> None:
    assert {site.status for site in sites(Backend()).values()} == {"fused"}


def test_the_recorded_table_names_rules_and_runs() -> None:
    table = json.loads((Path(cost_gate.__file__).parent / "site_costs.json").read_text())["faster"]
    for rows in table.values():
        assert rows.keys() <= load_patterns().keys()
        assert all(float(row["ratio"]) > 1 and row["run"] for row in rows.values())
