"""What a step under a budget holds beside what the plan decides: seen while it runs, and counted."""

from __future__ import annotations

import pytest
import torch

import fxfuse
from fxfuse.capture import find_installation
from fxfuse.capture.step_shape import Shape
from fxfuse.memory.plan import Choice, Held, Peak, Point, peak_of
from tests.model.builders import HIDDEN, VOCABULARY, llama


@pytest.mark.parametrize(("leaf", "keeps"), [(True, True), (False, False)])
def test_a_leaf_and_what_logits_can_be_had_from_are_seen(leaf: bool, keeps: bool) -> None:
    """As in PEFT's setup with a loop that keeps the output, and in a trainer that keeps the loss alone."""
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    model = llama(layers=2)
    model.get_input_embeddings().requires_grad_(not leaf)
    if leaf:
        model.enable_input_require_grads()
    model = fxfuse.optimize(model, memory=1 << 30, remainder="eager", validate="off", strict=True)
    for _ in range(2):
        out = model(input_ids=ids, labels=ids, use_cache=False)
        loss = out.loss
        if not keeps:
            del out
        loss.backward()
    governor = find_installation(model).governor
    assert governor is not None
    hidden = 4 * HIDDEN  # bytes of a token
    assert governor.held.at(Shape(1, 10)) == Held(leaf, 10 * hidden * keeps)


def test_what_others_hold_is_part_of_the_peak() -> None:
    """A leaf is there beside the plan where the plan sends it away; what the output holds, from the head on."""
    busy = Point(Choice(), saved_bytes=5, forward_transient_bytes=9, backward_transient_bytes=1)
    away = Point(Choice(offload=("x",)), saved_bytes=5, offloaded_bytes=3, away_input_bytes=2, forward_transient_bytes=9)
    assert peak_of([busy, busy], [0, 0], held=Held(leaf=True)) == Peak(14, 5, 0, 9, "forward of block 1")
    assert peak_of([busy, busy], [0, 0], held=Held(outputs=4)) == Peak(15, 10, 0, 1, "backward of block 1", 4)
    assert peak_of([away, busy], [0, 0], held=Held(leaf=True)) == Peak(19, 5, 0, 12, "forward of block 1", 2)
    assert peak_of([busy, away], [0, 0], held=Held(leaf=True)).held == 0
