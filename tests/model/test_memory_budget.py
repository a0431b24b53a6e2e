"""Models under a budget: what they save, that gradients do not change, and that training as people do it goes on working."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse.capture import find_installation
from fxfuse.memory import surveys
from fxfuse.memory.planner import BudgetTooSmall
from tests.model.builders import VOCABULARY, gpt2, llama
from tests.saved_storages import saved_storages

TIGHT = 130_000  # bytes: between the least and the most that these models save
OPTIONS: dict[str, Any] = dict(remainder="eager", validate="off", strict=True)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """A plan keeps to what was compiled for blocks of this class in the process, so in other tests as well."""
    gc.collect()  # models of other tests, whose graphs would be taken as they are
    surveys._surveys.clear()
    surveys._compiled.clear()


def batch(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, ids).backward()
    return gradients(model)


def plan_of(model: nn.Module) -> Any:
    return fxfuse.report(model).memory


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved_by(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps for the backward, beyond the model's own."""
    with saved_storages([*model.parameters(), *model.buffers()]) as saved:
        loss = loss_of(model, ids)
    loss.backward()
    return saved.bytes()


def test_a_budget_is_kept_used_up_and_changes_no_gradient() -> None:
    ids = batch()
    free = fxfuse.optimize(llama(4), memory=100_000_000, **OPTIONS)
    step(free, ids)
    expected = step(free, ids)
    everything = saved_by(free, ids)
    tight = fxfuse.optimize(llama(4), memory=int(0.6 * everything), **OPTIONS)
    assert equal(step(tight, ids), expected)  # the first step, which saves least
    assert equal(step(tight, ids), expected)  # planned
    plan = plan_of(tight)
    assert plan.predicted_peak <= plan.budget
    assert plan.predicted_peak > 0.85 * plan.budget
    difference = everything - saved_by(tight, ids)
    predicted = plan_of(free).predicted_peak - plan.predicted_peak
    assert difference == pytest.approx(predicted, rel=0.05)
    assert len(plan.points()) in (2, 3)


def test_too_small_a_budget_is_an_error_before_anything_is_trained() -> None:
    model = fxfuse.optimize(llama(2), memory=1000, **OPTIONS)
    with pytest.raises(BudgetTooSmall, match=r"the least possible is .* KiB"):
        loss_of(model, batch())
    assert all(p.grad is None for p in model.parameters())


def test_the_users_checkpointing_is_off_for_the_step_and_back_after_it() -> None:
    model = llama(2)
    expected = step(fxfuse.optimize(llama(2), memory=10_000_000, **OPTIONS), batch())
    fxfuse.optimize(model, memory=10_000_000, **OPTIONS)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        flags = [m.gradient_checkpointing for m in model.modules() if "gradient_checkpointing" in vars(m)]
        assert equal(step(model, batch()), expected)
        assert [m.gradient_checkpointing for m in model.modules() if "gradient_checkpointing" in vars(m)] == flags
        assert any(flags)
    assert any("gradient checkpointing of" in note for note in fxfuse.report(model).notes)
    assert not any("recomputed without" in note for note in fxfuse.report(model).notes)


def test_flags_come_back_on_exceptions_and_the_next_step_is_right() -> None:
    model = fxfuse.optimize(llama(2), memory=10_000_000, **OPTIONS)
    model.gradient_checkpointing_enable()
    expected = step(model, batch())
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in mid-step")))
    with pytest.raises(RuntimeError, match="in mid-step"):
        loss_of(model, batch())
    handle.remove()
    assert layer.gradient_checkpointing
    for _ in range(2):
        assert equal(step(model, batch()), expected)


@pytest.mark.slow
def test_without_a_budget_checkpointing_is_left_alone() -> None:
    model = fxfuse.optimize(llama(2), **OPTIONS)
    model.gradient_checkpointing_enable()
    step(model, batch())
    assert plan_of(model) is None
    assert any("recomputed without" in note for note in fxfuse.report(model).notes)


@pytest.mark.slow
def test_plans_change_between_steps_alone() -> None:
    """Two forwards before their backwards: the second, though larger, runs under the plan of the first."""
    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    step(model, batch())
    first = loss_of(model, batch())
    made = plan_of(model)
    assert made is not None
    second = loss_of(model, batch(2, 40))
    assert plan_of(model) is made
    (first + second).backward()
    model.zero_grad()
    loss_of(model, batch(2, 40)).backward()
    assert plan_of(model) is not made


@pytest.mark.slow
def test_a_longer_batch_is_planned_for_before_it_runs() -> None:
    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    for length in (24, 24, 32):
        step(model, batch(2, length))
    plan = plan_of(model)
    assert "larger than what was planned for" in plan.notes[0]
    assert plan.predicted_peak <= TIGHT
    step(model, batch(2, 8))
    assert plan_of(model) is plan


@pytest.mark.slow
def test_evaluation_accumulation_and_forwards_without_a_backward() -> None:
    ids = batch()
    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    plain = fxfuse.optimize(llama(2), memory=100_000_000, **OPTIONS)
    for candidate in (model, plain):
        for _ in range(2):
            step(candidate, ids)
        candidate.zero_grad()
        with torch.no_grad():
            loss_of(candidate, ids)
        loss_of(candidate, ids)  # and thrown away
        for _ in range(3):
            loss_of(candidate, ids).backward()
    assert equal(gradients(model), gradients(plain))


@pytest.mark.slow
def test_dropout_draws_what_it_would_have_drawn() -> None:
    """What random numbers made is saved, never drawn again: gradients and the generator's state are those without a budget."""
    made = []
    for budget in (100_000_000, 260_000):
        model = fxfuse.optimize(gpt2(2, resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0), memory=budget, **OPTIONS)
        step(model, batch())
        torch.manual_seed(5)
        made.append((step(model, batch()), torch.get_rng_state(), plan_of(model)))
    assert equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert made[1][2].extra_ms > 0


@pytest.mark.slow
def test_somebody_elses_checkpoint_around_the_blocks() -> None:
    """A user's own checkpoint over two blocks, inside of a model that has a plan."""
    class Wrapped(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def run(x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = layer(x)
                return x

            return torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2))

        def forward(self, hidden: Tensor) -> Tensor:
            return Wrapped.forward(self, hidden).square().mean()  # type: ignore[arg-type]

    hidden = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = Net()
    expected(hidden).backward()
    model = fxfuse.optimize(Net(), memory=10_000_000, remainder="eager", validate="off")
    for _ in range(2):
        model.zero_grad()
        model(hidden).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_transforms_of_functions_and_dispatch_modes_run_what_they_run_without_a_budget() -> None:
    """Blocks run eager there: nothing is planned for, and the user's checkpointing is on."""
    def found(model: nn.Module) -> tuple[dict[str, Tensor], int]:
        model.set_attn_implementation("eager")
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, kwargs=dict(input_ids=batch(), labels=batch(), use_cache=False)).loss

        gradients = torch.func.grad(loss)(weights)
        model.gradient_checkpointing_enable()
        with FlopCounterMode(display=False) as counter:
            step(model, batch())
        model.gradient_checkpointing_disable()
        return gradients, counter.get_total_flops()

    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    step(model, batch())
    (gradients, flops), (expected, expected_flops) = found(model), found(llama(2))
    assert equal(gradients, expected)
    assert flops == expected_flops
    assert plan_of(model) is None  # which the next step makes


def test_forwards_without_gradients_round_as_training_does() -> None:
    """A reference's, before the first step and after it; they are no steps, and are not planned for."""
    model = fxfuse.optimize(llama(2).bfloat16(), memory=100_000_000, **OPTIONS)
    for planned in (False, True):
        with torch.no_grad():
            reference = model(input_ids=batch(), use_cache=False).logits
        assert (plan_of(model) is not None) is planned
        assert torch.equal(model(input_ids=batch(), use_cache=False).logits, reference)
        step(model, batch())


def test_restore_copies_and_pickles() -> None:
    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    step(model, batch())
    keys = list(model.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert list(twin.state_dict()) == keys
    step(twin, batch())
    assert plan_of(twin) is None
    fxfuse.restore(model)
    model.gradient_checkpointing_enable()
    step(model, batch())
    assert find_installation(model) is None


@pytest.mark.slow
def test_another_budget_is_another_installation() -> None:
    model = fxfuse.optimize(llama(2), memory=TIGHT, **OPTIONS)
    first = find_installation(model)
    assert find_installation(fxfuse.optimize(model, memory=TIGHT, **OPTIONS)) is first
    assert find_installation(fxfuse.optimize(model, memory=2 * TIGHT, **OPTIONS)) is not first
