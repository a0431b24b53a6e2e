"""Which linears end in a loss: the examples of patterns/linear_loss.py, spellings of a model's head, near misses and wishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse.backend import Backend, new_record
from fxfuse.linear_loss.lazy_output import LAZY_OUTPUTS, LazyOutput
from fxfuse.linear_loss.op import linear_loss
from fxfuse.patterns.linear_loss import MATCHING, NEAR_MISSES, flat
from fxfuse.reporting.records import Site

CLASSES, WIDTH = 29, 16


class Seen:
    """A backend that rewrites graphs, keeps what came of it, and runs them as they were."""

    def __init__(self, **options: Any) -> None:
        self.backend = Backend(**{"strict": True, "validate": "off", **options})
        self.sites: list[Site] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        record = new_record()
        rewritten = self.backend.rewrite(gm, record)
        assert rewritten is not None
        self.sites += record.sites
        self.graphs.append(rewritten)
        return gm.forward

    def ops(self) -> list[fx.Node]:
        return [node for gm in self.graphs for node in gm.graph.nodes if node.target is linear_loss]

    def modes(self) -> list[str]:
        return [str(node.args[7]) for node in self.ops()]

    def reasons(self) -> list[str]:
        return [site.reason for site in self.sites if site.rule == "linear_loss" and site.status == "declined"]

    def logits_left(self) -> list[fx.Node]:
        """What is as wide as the logits and computed."""
        return [n for gm in self.graphs for n in gm.graph.nodes if n.op == "call_function" and
                isinstance(t := n.meta.get("example_value"), Tensor) and t.dim() > 1 and t.shape[-1] == CLASSES and t.requires_grad]

    def lazy(self) -> list[LazyOutput]:
        return [lazy for gm in self.graphs for lazy in gm.meta.get(LAZY_OUTPUTS, ())]


class Head(nn.Module):
    def __init__(self, function: Callable[..., Any], trained: bool = True, classes: int = CLASSES) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(classes, WIDTH), requires_grad=trained)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.function(x, self.weight, labels)


def look(function: Callable[..., Any], trained: bool = True, dynamic: bool = True, length: int = 7, **options: Any) -> Seen:
    seen = Seen(**options)
    x = torch.randn(2, length, WIDTH, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, length))
    torch.compile(Head(function, trained), backend=seen, dynamic=dynamic)(x, labels)
    return seen


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("function", MATCHING, ids=lambda f: f.__name__)
def test_examples_match(function: Callable[..., Any], dynamic: bool) -> None:
    seen = look(function, dynamic=dynamic)
    assert seen.modes() == [MATCHING[function]]
    assert not seen.logits_left()


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_do_not(function: Callable[..., Any]) -> None:
    seen = look(function)
    assert not seen.ops()
    assert any(NEAR_MISSES[function] in site.reason for site in seen.sites), [site.reason for site in seen.sites]


def test_a_frozen_head_needs_no_second_computation_of_the_logits() -> None:
    from fxfuse.patterns.linear_loss import log_probabilities

    seen = look(log_probabilities, trained=False)
    assert seen.modes() == ["rows"]
    assert seen.ops()[0].args[8] == ["hidden"]


def returned(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w)
    return F.cross_entropy(*flat(z.float(), labels)), z


def returned_capped(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.tanh(F.linear(x, w) / 9.0) * 9.0
    return F.cross_entropy(*flat(z.float(), labels)), z


def returned_and_shifted(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The output is what the loss was computed from, before the shift."""
    z = F.linear(x, w) * 0.5
    return F.cross_entropy(*flat(z[..., :-1, :].contiguous(), labels[..., 1:].contiguous())), z


def returned_first(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss, z = returned(x, w, labels)
    return z, loss


def returned_of_the_last(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``logits_to_keep``: fewer logits than hidden states."""
    z = F.linear(x[:, -3:, :], w)
    return F.cross_entropy(*flat(z, labels[:, -3:])), z


RETURNING = [returned, returned_capped, returned_and_shifted, returned_first, returned_of_the_last]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("function", RETURNING, ids=lambda f: f.__name__)
def test_logits_that_are_an_output_can_be_had_on_demand(function: Callable[..., Any], dynamic: bool) -> None:
    seen = look(function, dynamic=dynamic)
    assert seen.modes() == ["total"]
    lazy, = seen.lazy()
    outputs = seen.graphs[0].graph.output_node().args[0]
    assert [position for position, value in enumerate(outputs) if value is None] == [lazy.index]  # type: ignore
    head = Head(function)
    x, labels = torch.randn(2, 7, WIDTH), torch.randint(0, CLASSES, (2, 7))
    arguments = _arguments(seen.graphs[0], head, x, labels)
    expected = head(x, labels)[lazy.index]
    picked = lazy.pick(arguments)
    assert lazy.sizes(picked) == tuple(expected.shape)
    torch.testing.assert_close(lazy.compute(picked), expected, rtol=0, atol=0)


def _arguments(gm: fx.GraphModule, head: Head, x: Tensor, labels: Tensor) -> list[Any]:
    """Values for the placeholders, by what they stand for."""
    values: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if not isinstance(value, Tensor):
            values.append(value.node.hint if hasattr(value, "node") else value)
        else:
            values.append(head.weight if value.dim() == 2 and value.requires_grad else x if value.is_floating_point() else labels)
    return values


@pytest.mark.parametrize(("options", "sentence"), [
    ({"logits": "always"}, "outputs are real"),
    ({"exclude": ("linear_loss",)}, "excluded by the caller"),
    ({"rules": ("cross_entropy",)}, "not among the rules"),
])
def test_logits_stay_where_they_are_wished_for(options: dict[str, Any], sentence: str) -> None:
    """The loss is then fused on the logits, as it always was."""
    seen = look(returned, **options)
    assert not seen.ops()
    assert not seen.lazy()
    assert any(sentence in reason for reason in seen.reasons())
    assert [site.status for site in seen.sites if site.rule == "cross_entropy"] == ["fused"]


def test_without_gradients_only_the_losses_are_computed() -> None:
    with torch.no_grad():
        seen = look(returned)
    assert seen.modes() == ["value"]
    assert seen.ops()[0].args[8] == []


def test_logits_of_a_whole_model_are_not_had_by_running_it_again() -> None:
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    seen = look(lambda x, w, labels: returned(layers(x), w, labels))
    assert not seen.ops()
    assert any("running all of it again" in reason for reason in seen.reasons())


def adapted() -> Callable[..., Tensor]:
    """A linear and an adapter, as PEFT writes it."""
    down, up = nn.Parameter(torch.randn(4, WIDTH)), nn.Parameter(torch.randn(CLASSES, 4))

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        z = F.linear(x, w) + 2.0 * F.linear(F.linear(x, down), up)
        return F.cross_entropy(*flat(z.float(), labels))

    return loss


def test_an_adapter_on_the_head_is_one_more_term() -> None:
    op, = look(adapted(), trained=False).ops()
    assert list(op.args[8]) == ["hidden", "left0", "right0"]
    assert list(op.args[11]) == [2.0]


def test_an_adapter_that_is_not_to_be_fused_is_declined_by_name() -> None:
    seen = look(adapted(), trained=False, exclude=("lora_linear",))
    assert not seen.ops()
    assert any("several linears" in reason for reason in seen.reasons())


def test_autocast_leaves_no_trace_but_the_dtypes() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        seen = look(returned)
    op, = seen.ops()
    assert [operand.meta["example_value"].dtype for operand in op.args[:2]] == [torch.bfloat16] * 2  # type: ignore[union-attr]
