"""``explain(memory=...)``: what it says a model will hold is what the model then holds; budgets that cannot be met are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from benchmarks import tiny_models
from benchmarks.workloads import WORKLOADS, config_of
from fxfuse.capture.context import current_call
from fxfuse.capture.dispatcher import Dispatcher
from fxfuse.explanation import Setup, explain_config
from fxfuse.memory.planner import BudgetTooSmall
from fxfuse.prediction import DEVICE_BYTES, bytes_of, rates_for

QUICK = ("llama", "gpt2", "gemma")
OTHERS = ("qwen2", "qwen3", "mistral", "phi", "phi3", "olmo2", "gpt_neox", "starcoder2", "falcon", "stablelm", "granite")


def kept_by_blocks(model: nn.Module, inputs: dict[str, Any]) -> list[int]:
    """Bytes that each captured block's own graph keeps for its backward, without weights; each storage once, where it is first kept."""
    lives = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values()) if torch.is_tensor(t)}
    seen: dict[int, torch.Tensor] = {}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage, call = tensor.untyped_storage(), current_call()
        if call is not None and call.kind.role == "block" and storage.data_ptr() not in lives and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            found[id(call.module)] = found.get(id(call.module), 0) + storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).loss.backward()
    return list(found.values())


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_what_blocks_keep_is_predicted(name: str) -> None:
    model = tiny_models.build(name)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    ids = torch.randint(3, tiny_models.VOCAB, (2, 48))
    plan = fxfuse.explain(model, memory="100GiB", input_ids=ids, labels=ids).memory
    fxfuse.optimize(model, remainder="eager")
    slots = [slot for module in model.modules() if isinstance(slot := vars(module).get("_compiled_call_impl"), Dispatcher)]
    for slot, block in zip((s for s in slots if s.kind.role == "block"), plan.blocks, strict=True):
        slot.follow(block.point.text)
    inputs = dict(input_ids=ids, labels=ids)
    model(**inputs).loss.backward()
    # the first block also keeps what all blocks share (angles, masks), which is no block's own
    measured = kept_by_blocks(model, inputs)[1:]
    predicted = [block.point.saved_bytes for block in plan.blocks][1:]
    assert len(measured) == len(predicted) == tiny_models.LAYERS - 1
    for ours, theirs in zip(predicted, measured, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


def config() -> Any:
    made = tiny_models.config_for("llama")
    made.dtype = torch.bfloat16
    return made


@pytest.fixture(scope="module")
def report() -> Any:
    return explain_config(config(), Setup(memory="1GiB", batch=2, length=64, device="NVIDIA H200"))


def test_the_plan_adds_up_and_names_its_rates(report: Any) -> None:
    plan = report.memory
    assert sum(plan.parts.values()) == plan.predicted_peak
    assert plan.rates == "table: NVIDIA H200"
    assert plan.device == "NVIDIA H200"
    assert [block.module for block in plan.blocks] == ["model.layers.0", "model.layers.1"]
    assert plan.extra_ms == 0  # all fits
    assert plan.parts["optimizer state"] == 2 * plan.parts["weights"] - 2 * sum_of_buffers()
    assert "memory 1.00 GiB on NVIDIA H200: predicted peak" in str(report)


def test_a_link_with_room_is_used_before_products_run_twice() -> None:
    """Llama-3.2-1B, all weights trained, 4 x 4096 tokens, on an H200: a sixth less memory than all that is saved takes."""
    workload = WORKLOADS["W3"]
    setup = Setup(memory="18GiB", batch=workload.batch, length=workload.length, device="NVIDIA H200")
    plan = explain_config(config_of(workload), setup).memory
    again = [block for block in plan.blocks if block.point.choice.recompute]
    assert plan.predicted_peak <= 18 << 30
    assert len(again) <= 8
    assert all(block.point.offloaded_bytes for block in plan.blocks)
    assert plan.waiting_ms == 0
    assert plan.extra_ms < 0.045 * (plan.step_ms - plan.extra_ms)


def sum_of_buffers() -> int:
    """Bytes of rotary frequencies, which no optimizer holds state for."""
    return sum(t.nbytes for t in tiny_models.build("llama").buffers())


def test_less_memory_costs_time_and_the_frontier_says_how_much(report: Any) -> None:
    frontier = report.memory.frontier
    peaks, costs = zip(*frontier, strict=True)
    assert list(peaks) == sorted(peaks)
    assert list(costs) == sorted(costs, reverse=True)
    assert costs[-1] == 0
    tight = explain_config(config(), Setup(memory=int(peaks[0] * 1.02), batch=2, length=64)).memory
    assert tight.predicted_peak <= peaks[0] * 1.02
    assert tight.extra_ms > 0
    away = sum(block.point.offloaded_bytes for block in tight.blocks)
    assert any("wait on the host" in note for note in tight.notes) == bool(away)
    assert not any("wait on the host" in note for note in report.memory.notes)


def test_a_budget_below_the_least_names_the_least_and_its_parts() -> None:
    with pytest.raises(BudgetTooSmall, match=r"the least possible is \d.*weights .*optimizer state"):
        explain_config(config(), Setup(memory="10KiB", batch=2, length=64))


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        (Setup(memory="200GiB", device="NVIDIA H200"), "is more than NVIDIA H200 has"),
        (Setup(memory="many"), "memory takes None, 'auto'"),
        (Setup(memory=1.5), "no fraction"),
        (Setup(memory="1GiB", optimizer="lion"), "nothing is known of an optimizer 'lion'"),
        (Setup(memory="1GiB", device="abacus"), "nothing is known of a device 'abacus'"),
    ],
)
def test_bad_input_is_a_sentence(setup: Setup, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        explain_config(config(), setup)


def test_budgets_of_a_device_that_is_not_here() -> None:
    from fxfuse.memory.budget import parse_budget

    assert bytes_of(parse_budget("auto"), "NVIDIA H200") == DEVICE_BYTES["NVIDIA H200"]
    assert bytes_of(parse_budget(0.5), "NVIDIA H200") == DEVICE_BYTES["NVIDIA H200"] // 2
    assert rates_for("NVIDIA H200").name == "table: NVIDIA H200"
