"""The loss head of models: found in every kind of causal model, and as exact as eager."""

from __future__ import annotations

import copy

import pytest

import fxfuse
from tests.model.heads import TYPES, assert_as_exact, batch, model_of, optimized


@pytest.mark.parametrize("kind", TYPES)
def test_the_head_is_fused_and_exact(kind: str) -> None:
    eager = model_of(kind)
    ours = optimized(copy.deepcopy(eager))
    assert_as_exact(ours, eager, **batch())
    fxfuse.report(ours).assert_fused("linear_loss")
