"""A region is named by what it computes: every spelling of a rule is the rule, and what nearly is it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.naming import UNNAMED, _index, name_of, with_article
from fxfuse.normal_form import normal_form
from fxfuse.pattern_trace import pattern_program
from fxfuse.program import Program
from fxfuse.rules import Full, Rule, Shape, load_patterns, variants
from tests.gradient.row_programs import PROGRAMS
from tests.spelling.model_spellings import (
    LABELS,
    LOGITS,
    SPELLINGS,
    W,
    X,
    divided_by_root,
    gemma3n,
    llama,
    olmo2,
    t5,
    torch_rms_norm,
)

RULES = load_patterns()
NAMES = {"rms_norm", "layer_norm", "l2_norm", "gated_norm", "residual_norm", "rope", "qk_norm_rope", "gated_activation",
         "activation", "cross_entropy", "softmax"}


def traced(function: Callable[..., Any], *shapes: Shape) -> Program:
    return pattern_program(function, {f"p{i}": s.example() for i, s in enumerate(shapes)}, {})


def functions_of(rule: Rule) -> list[Callable[..., Any]]:
    return [rule.function, *rule.spellings]


def test_the_fixed_names_are_there() -> None:
    assert set(RULES) >= NAMES


@pytest.mark.parametrize(("rule", "function"), [
    pytest.param(rule, function, id=f"{rule.name}-{function.__name__}") for rule in RULES.values() for function in functions_of(rule)])
def test_a_rule_is_what_its_functions_are(rule: Rule, function: Callable[..., Any]) -> None:
    for program, _ in variants(function):
        assert name_of(program) == (rule.name, "")


def near_misses() -> Iterator[Any]:
    for rule in RULES.values():
        for sentence, function in rule.near_misses:
            yield pytest.param(rule, sentence, function, id=f"{rule.name}-{function.__name__}")


@pytest.mark.parametrize(("rule", "sentence", "function"), near_misses())
def test_a_near_miss_is_not_the_rule_and_says_why(rule: Rule, sentence: str, function: Callable[..., Any]) -> None:
    for program, _ in variants(function):
        assert name_of(program) == (UNNAMED, f"{with_article(rule.name)} but for: {sentence}")


def test_every_rule_has_near_misses() -> None:
    assert [rule.name for rule in RULES.values() if not rule.near_misses and rule.name in NAMES] == []


@pytest.mark.parametrize(("rule", "function", "shapes"), [
    pytest.param(*spelling, id=f"{spelling[0]}-{spelling[1].__name__}-{i}") for i, spelling in enumerate(SPELLINGS)])
def test_every_spelling_has_the_name(rule: str, function: Callable[..., Any], shapes: tuple[Shape, ...]) -> None:
    assert name_of(traced(function, *shapes)) == (rule, "")


def test_spellings_of_rms_norm_have_one_form() -> None:
    spellings = [llama, olmo2, gemma3n, t5, divided_by_root, torch_rms_norm]
    assert len({normal_form(traced(f, X, W)).skeletons for f in spellings}) == 1


@pytest.mark.parametrize(("name", "rule"), [
    ("rms_norm", "rms_norm"), ("residual_norm", "residual_norm"), ("layer_norm", "layer_norm"), ("l2_norm", "l2_norm"),
    ("rope_interleaved", "rope"), ("rope_partial", "rope"), ("rope_of_a_slice", "rope"), ("qk_norm_rope", "qk_norm_rope"),
    ("swiglu_packed", "gated_activation"), ("clamped_swiglu", "gated_activation"), ("softmax_by_hand", "softmax"),
    ("softmax_capped", "softmax"), ("scalars", UNNAMED)])
def test_programs_are_named_whoever_built_them(name: str, rule: str) -> None:
    assert name_of(PROGRAMS[name]).rule == rule


def test_two_of_a_kind_in_one_region_are_the_kind() -> None:
    def two_norms(x: Tensor, r: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = x + r
        return h, llama(h, w), llama(h, u)

    assert name_of(traced(two_norms, X, X, W, W)).rule == "residual_norm"


def test_what_is_kept_on_the_way_changes_nothing() -> None:
    def loss_and_logits(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tanh(x / 30.0) * 30.0
        return F.cross_entropy(logits.float(), y), logits

    def swiglu_and_gate(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        act = F.silu(gate)
        return act, act * up

    assert name_of(traced(loss_and_logits, LOGITS, LABELS)).rule == "cross_entropy"
    assert name_of(traced(swiglu_and_gate, X, X)).rule == "gated_activation"


def test_rows_masked_out_of_an_operand_change_nothing() -> None:
    def expert(x: Tensor, absent: Tensor) -> Tensor:
        gate, up = x.masked_fill(absent, 0.0).chunk(2, -1)
        return F.silu(gate) * up

    assert name_of(traced(expert, Shape((12, 16)), Shape((12, 1), torch.bool))).rule == "gated_activation"


def test_what_no_rule_names_is_unnamed_and_says_what_is_near() -> None:
    def strange(x: Tensor, w: Tensor) -> Tensor:
        return torch.sin(llama(x, w))

    named = name_of(traced(strange, X, W))
    assert named.rule == UNNAMED
    assert named.near_miss == "an rms_norm but for: with sin besides"


def test_a_rule_of_ones_own() -> None:
    import fxfuse

    @fxfuse.pattern
    def sine_gate(x: Tensor, y: Full) -> Tensor:
        return torch.sin(x) * torch.cos(y)

    try:
        assert name_of(traced(lambda a, b: b.cos() * a.sin(), X, X)).rule == "sine_gate"
    finally:
        del RULES["sine_gate"]


def test_a_pattern_that_cannot_be_traced_is_an_error_every_time() -> None:
    import fxfuse

    @fxfuse.pattern
    def counts(x: Full) -> Tensor:
        return torch.exp(x) * x.cumsum(-1).sort(-1).values.cumsum(-1)[..., :1].bool().nonzero().sum()

    def strange(x: Tensor) -> Tensor:
        return torch.sin(torch.cos(x)) * torch.sin(x)

    try:
        for _ in range(2):
            with pytest.raises(fxfuse.errors.UnsupportedGraph):
                name_of(traced(strange, X))
    finally:
        del RULES["counts"]
        _index.cache_clear()
