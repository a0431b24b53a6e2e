"""The instrument behind the coverage table: what it counts, and that names do not matter to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

import fxfuse
from benchmarks import accounting, oracle, renaming, tiny_models
from benchmarks.census import Census

SEEN = {
    "llama": {"norm": 5, "activation": 2, "rotary": 4, "loss": 1},
    "gemma2": {"norm": 9, "activation": 5, "rotary": 4, "softmax": 2, "loss": 1},  # two caps on scores, one on logits
    "gptj": {"norm": 3, "activation": 2, "rotary": 4, "softmax": 2, "loss": 1},  # its rotary table is a buffer
    "gpt_neox": {"norm": 5, "activation": 2, "rotary": 4, "loss": 1},  # q, k and v packed; part of a head rotated
    "cohere": {"norm": 7, "activation": 2, "rotary": 4, "loss": 1},  # interleaved
    "t5": {"norm": 12, "activation": 4, "loss": 1},
}


@pytest.mark.parametrize("name", SEEN)
def test_every_site_of_an_eager_forward_is_counted_once(name: str) -> None:
    model = tiny_models.build(name)
    with Census.of(model) as census:
        model(**tiny_models.inputs_for(name))
    assert census.counts() == SEEN[name]


def test_sites_carry_the_module_that_ran_them() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU())
    with Census.of(model) as census:
        model(torch.randn(2, 3, 8))
    assert [(s.kind, s.module) for s in census.sites] == [("norm", "0"), ("activation", "2")]


def test_a_product_with_a_table_is_no_rotation_unless_the_table_came_from_angles() -> None:
    x, table = torch.randn(2, 4, 8), torch.randn(4, 8)
    with Census() as census:
        x * table
        x * table.cos()
    assert census.counts() == {"rotary": 1}


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_a_renamed_model_is_the_same_model(name: str) -> None:
    original, renamed = tiny_models.build(name), renaming.build(name)  # build compares weights and loss, bit for bit
    assert not {n for n, _ in original.named_parameters()} & {n for n, _ in renamed.named_parameters()}
    shared = {type(m).__name__ for m in original.modules()} & {type(m).__name__ for m in renamed.modules()}
    assert shared <= {*dir(nn), "SiLUActivation"}  # torch's own, and an activation of transformers' library
    assert renamed.config.model_type != original.config.model_type


def test_nothing_under_the_oracle_rounds_to_a_narrower_type() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x.to(torch.float32), dim=-1, dtype=torch.float32) + x.float().type(torch.bfloat16)

    with oracle.InFloat64():
        assert function(torch.randn(4, dtype=torch.float64)).dtype == torch.float64


def _watched(name: str, **options: object) -> tuple[dict[str, int], dict[str, int]]:
    """(what was left, what the fused sites that ran contain) in one forward of the optimized model."""
    model = fxfuse.optimize(tiny_models.build(name), remainder="eager", **options)
    inputs = tiny_models.inputs_for(name)
    model(**inputs).loss.backward()
    before = accounting.ledger(model)
    with Census.of(model) as left:
        model(**inputs)
    return left.counts(), accounting.contained(before, accounting.ledger(model))


def test_what_is_gone_is_inside_a_fused_site_that_ran() -> None:
    left, inside = _watched("gemma2")  # its softmaxes are in attention, its loss and the cap on its logits in linear_loss
    assert not left
    assert inside == SEEN["gemma2"]


def test_a_rule_that_is_excluded_accounts_for_nothing() -> None:
    left, inside = _watched("gemma2", exclude=("attention", "softmax", "linear_loss", "cross_entropy"))
    assert {kind: left[kind] for kind in ("softmax", "loss")} == {"softmax": 2, "loss": 1}
    assert not inside.keys() & {"softmax", "loss"}


def test_what_no_program_contains_is_not_counted() -> None:
    seen = {"softmax": 2, "loss": 1, "norm": 3}
    assert accounting.unaccounted(seen, {"norm": 1}, {"softmax": 1, "norm": 2}) == {"softmax": 1, "loss": 1}
    assert accounting.contained({}, {"": {}}) == {}
