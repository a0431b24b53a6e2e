"""What each point of a block saves: predicted from the joint graph, and measured; and what is never computed twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import tiny_models
from fxfuse.backend import Backend
from fxfuse.capture import install
from fxfuse.capture.dispatcher import Dispatcher
from fxfuse.memory import surveys
from fxfuse.memory.costs import scratch_bytes
from fxfuse.memory.plan import Choice
from fxfuse.memory.points import LINK, Survey, _coming, _going
from fxfuse.memory.sizes import Sizes
from fxfuse.memory.splits import runs_once
from fxfuse.memory.surveys import surveys_under
from fxfuse.memory.tiles import Memory
from fxfuse.reporting.records import attached
from tests.model.builders import llama
from tests.saved_storages import saved_storages

QUICK = ("llama", "gpt2")
TYPES = (*QUICK, "qwen2", "qwen3", "gemma2", "phi3", "mistral", "gpt_neox", "opt", "olmo2", "cohere", "starcoder2", "falcon", "bert")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def under(model: nn.Module, plan: str) -> nn.Module:
    """``model`` with every block compiled under one plan, the rest as under a budget.

    Compiled anew: a graph that an earlier test left knows the sizes of that test.
    """
    torch.compiler.reset()
    surveys._surveys.clear()
    installation = install(model, Backend(plan="keep", remainder="eager", validate="off", strict=True), strict=True)
    for module in model.modules():
        slot = vars(module).get("_compiled_call_impl")
        if isinstance(slot, Dispatcher) and getattr(getattr(slot, "kind", None), "role", "") == "block":
            slot.compiled = installation.compiled_forward(type(module), plan)
    return model


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """(bytes of the distinct storages kept for the backward beyond the model's and the inputs, gradients)."""
    torch.manual_seed(3)
    given = [value for value in inputs.values() if isinstance(value, Tensor)]
    model.zero_grad()
    with saved_storages([*model.parameters(), *model.buffers(), *given]) as saved:
        loss = model(**inputs).loss
    loss.backward()
    return saved.bytes(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def blocks_of(model: nn.Module) -> list[Survey]:
    """The survey of each block that has run."""
    return [surveys_under(module)[0] for module in model.modules() if any(record.kind == "block" for record in attached(module))]


def saved(survey: Survey, names: tuple[str, ...]) -> int:
    return survey.joint.saved_bytes(survey.joint.split(names), Sizes(survey.compiled_for))


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES])
def test_saved_bytes_are_as_predicted_and_gradients_the_same_bits(name: str) -> None:
    """Between the two ends of the chain: the difference is all of what blocks choose."""
    inputs = tiny_models.inputs_for(name)
    keep = under(tiny_models.build(name), "keep")
    everything, expected = run(keep, inputs)
    found = blocks_of(keep)
    assert found
    least, gradients = run(under(tiny_models.build(name), "least"), inputs)
    predicted = sum(saved(survey, ()) - saved(survey, survey.chain[-1]) for survey in found)
    assert everything - least == pytest.approx(predicted, rel=0.05)
    blocks = sum(saved(survey, ()) for survey in found)
    assert blocks <= 1.05 * everything
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, expected[parameter]), parameter


def test_cheap_outputs_that_are_kept_are_not_computed_again_and_the_same_bits() -> None:
    """The gate's, and those of both norms, which products of the backward read."""
    inputs = tiny_models.inputs_for("llama")
    model = under(tiny_models.build("llama"), "keep")
    before, expected = run(model, inputs)
    survey = blocks_of(model)[1]
    point = survey.roomier(Sizes(survey.compiled_for))[-1]
    assert len(point.choice.keep) == 3
    roomy = under(tiny_models.build("llama"), point.text)
    after, gradients = run(roomy, inputs)
    blocks = blocks_of(roomy)
    assert after - before == len(blocks) * (point.saved_bytes - survey.point(Choice(), Sizes(survey.compiled_for)).saved_bytes) > 0
    assert all(torch.equal(gradient, expected[parameter]) for parameter, gradient in gradients.items())


@pytest.fixture(scope="module")
def survey() -> Survey:
    """Of a llama layer in which all weights are trained."""
    model = under(llama(2), "keep")
    ids = torch.arange(48).reshape(2, 24)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return blocks_of(model)[1]


def test_each_point_saves_less_than_the_one_before(survey: Survey) -> None:
    counts = [saved(survey, names) for names in survey.chain]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts) >= 4
    points = survey.block(Sizes(survey.compiled_for), offload=False).points
    assert [p.saved_bytes for p in points] == sorted((p.saved_bytes for p in points), reverse=True)
    assert [p.ms for p in points] == sorted(p.ms for p in points)


def test_attention_is_never_run_again(survey: Survey) -> None:
    attention = [node for node in survey.joint.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert attention
    assert runs_once(attention[0])
    for names in survey.chain:
        split = survey.joint.split(names)
        assert not set(attention) & set(split.again)
        assert any(node.args[0] is attention[0] for node in split.saved)


def test_products_that_nobody_needs_are_not_run_again(survey: Survey) -> None:
    """Of the seven products of a layer the last leads to the output alone; the least point runs six again, and saves no product."""
    split = survey.joint.split(survey.chain[-1])
    products = {node for node in survey.joint.forward if "aten.mm" in str(node.target)}
    again = products & set(split.again)
    assert len(products) == 7
    assert len(again) == 6
    assert not products & set(split.saved)


def test_norms_and_gates_are_recomputed_at_every_point(survey: Survey) -> None:
    """Of what fused ops make, saved are one residual sum, what attention reads, and statistics: one number a row."""
    plain = survey.joint.split(())
    made = [node for node in plain.saved if "getitem" in str(node.target) and "fxfuse" in str(node.args[0].target)]
    read = {used for node in survey.joint.graph.nodes if "scaled_dot_product" in str(node.target) for used in node.all_input_nodes}
    wide = [node for node in made if node.meta["val"].shape[-1] > 1 and node not in read]
    assert [node.meta["val"].shape[-1] for node in wide] == [64]


def test_offload_leaves_next_to_nothing_on_the_device(survey: Survey) -> None:
    sizes = Sizes(survey.compiled_for)
    away = [p for p in survey.block(sizes).points if p.offloaded_bytes]
    assert away
    for point in away:
        on_device = next(saved(survey, names) for names in survey.chain if names == point.choice.recompute)
        assert point.saved_bytes + point.offloaded_bytes == on_device


def test_a_block_sends_all_or_what_its_forward_hides_or_its_largest_tensor(survey: Survey) -> None:
    sizes = Sizes(survey.compiled_for)
    everything = survey.point(survey.offloaded(Choice(), sizes)[0], sizes)
    slow = copy.copy(survey)  # half of it leaves while a block's forward runs
    slow.rates = replace(survey.rates, to_host=everything.offloaded_bytes / 2 / LINK / (survey.block(sizes).forward_ms / 1e3))
    points = [slow.point(choice, sizes) for choice in slow.offloaded(Choice(), sizes)]
    assert points[0].choice == everything.choice
    assert everything.offloaded_bytes / 4 < points[1].offloaded_bytes <= everything.offloaded_bytes / 2 + 1
    assert [point.offloaded_bytes for point in points[2:]] == [max(tensor.bytes for tensor in everything.offloaded)]


def test_points_at_other_sizes_scale_with_them(survey: Survey) -> None:
    once = survey.block(Sizes(survey.compiled_for), offload=False).points
    length = max(survey.compiled_for.values())  # the graph may be one that an earlier test compiled, at another length
    longer = {symbol: 2 * value if value == length else value for symbol, value in survey.compiled_for.items()}
    twice = survey.block(Sizes(longer), offload=False).points
    assert [p.saved_bytes for p in twice][:3] == [2 * p.saved_bytes for p in once][:3]


def test_tiles_begin_where_the_simulation_without_them_ends(survey: Survey) -> None:
    """Two simulations of the same graphs, one by node and one by parts, count the same to the byte."""
    sizes = Sizes(survey.compiled_for)
    for names in survey.chain:
        first, second = survey._halves(names)
        forward, backward = Memory(first.graph, sizes), Memory(second.graph, sizes)
        for choice in (Choice(recompute=names), *survey.offloaded(Choice(recompute=names), sizes)):
            going, coming = _going(first.graph, choice.offload, sizes), _coming(second.graph, choice.offload, sizes)
            assert survey._peaks(choice, sizes) == (
                forward.peak(accounts=first.accounts).bytes, backward.peak(accounts=second.accounts).bytes,
                forward.peak(accounts=first.accounts, moving=going).bytes, backward.peak(accounts=second.accounts, moving=coming).bytes)


def test_what_comes_and_goes_piece_by_piece_is_never_there_at_once(survey: Survey) -> None:
    """A block among others like it: what the one before sends leaves as this one sends, and comes back as this one takes."""
    sizes = Sizes(survey.compiled_for)
    away = survey.point(survey.offloaded(Choice(), sizes)[0], sizes)
    assert 0 < away.forward_spared_bytes <= away.offloaded_bytes
    assert 0 < away.backward_spared_bytes <= away.offloaded_bytes
    assert survey.point(Choice(), sizes).forward_spared_bytes == survey.point(Choice(), sizes).backward_spared_bytes == 0


def test_what_attention_needs_is_counted_beside_tiles(survey: Survey) -> None:
    """However few rows a tile has, attention's backward has the gradient of the query in float32, those of repeated keys and values
    for each query head, and its results. (4 query heads and 2 of keys, of 16 float32 columns.)"""
    length = max(survey.compiled_for.values())
    rows = 64 * length
    sizes = Sizes({symbol: rows if value == length else value for symbol, value in survey.compiled_for.items()})
    tokens, width = sizes.shape(survey.joint.tangents[0].meta["val"])[0] * rows, 64 * 4
    scratch = tokens * width * 3  # the query's, and of keys and values 2 heads each for 4
    results = tokens * width * 2
    point = survey.point(Choice(recompute=survey.chain[-1], tiles=16), sizes)
    assert point.saved_bytes + point.backward_transient_bytes > scratch + results + tokens * width * 4  # and what it reads
    node = next(node for node in survey.joint.graph.nodes if "attention" in str(node.target) and "backward" in str(node.target))
    assert scratch_bytes(node, sizes) == scratch
