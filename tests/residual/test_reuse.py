"""Outputs in the memory of operands that die: only where it is proven, and never to be seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import bufferize, lowering
from fxfuse.backend import Backend
from fxfuse.program import parse
from fxfuse.reuse import Reuse, plan_reuse, possible


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Reuse]:
    """Reuse happens on the CPU too; what was planned is recorded."""
    made: list[Reuse] = []

    def record(graph: torch.fx.Graph) -> dict[torch.fx.Node, Reuse]:
        plan = plan_reuse(graph)
        made.extend(plan.values())
        return plan

    monkeypatch.setattr(lowering, "REUSE_ON_CPU", True)
    monkeypatch.setattr(bufferize, "plan_reuse", record)
    return made


def program(body: str, outputs: str) -> str:
    return f"program rank=1 math=float32\naxis a = ?\narg x : float32[r|a]\narg y : float32[r|a]\n{body}\n{outputs}"


def test_an_output_may_lie_where_the_elements_lay_that_it_needs() -> None:
    text = program("%0 = load x a 0 1\n%1 = load y a 0 1\n%2 = mul %0 %1", "out z : float32[r|a] = %2 @ a 0 1")
    assert possible(parse(text)) == ((0, 1),)


def test_an_output_that_does_not_need_an_element_may_not_overwrite_it() -> None:
    """Another thread may not have read it yet: a row's sum alone does not say that every element was."""
    text = program("%0 = load x a 0 1\n%1 = load y a 0 1\n%2 = sum a %1\n%3 = mul %0 %2\n%4 = sigmoid %1",
                   "out z : float32[r|a] = %3 @ a 0 1\nout v : float32[r|a] = %4 @ a 0 1")
    assert possible(parse(text)) == ((0,), (1,))


def test_another_dtype_or_a_sum_over_rows_has_no_place() -> None:
    text = program("%0 = load x a 0 1\n%1 = load y a 0 1\n%2 = mul %0 %1",
                   "out z : bfloat16[r|a] = %2 @ a 0 1\nout s : float32[1|a] = %2 @ a 0 1")
    assert possible(parse(text)) == ((), ())


def test_what_is_gathered_from_may_not_be_overwritten() -> None:
    """A label's logit is read on its own, by whoever needs it, at a place that the label tells."""
    body = "%0 = load x a 0 1\n%1 = load y a 0 1\n%2 = load label None\n%3 = iota a\n%4 = eq %2 %3\n%5 = const 0\n"
    text = program(body + "%6 = select %4 %0 %5\n%7 = sum a %6\n%8 = sub %0 %7\n%9 = mul %8 %1", "out z : float32[r|a] = %9 @ a 0 1")
    text = text.replace("arg y : float32[r|a]", "arg y : float32[r|a]\narg label : int64[r|]")
    assert possible(parse(text)) == ((1,),)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gradients(function: nn.Module, x: Tensor, call: object = None, again: int = 1) -> list[Tensor]:
    """Of every parameter and the input, by the last of ``again`` backwards through one graph."""
    loss = (function if call is None else call)(x).square().sum()  # type: ignore[operator]
    wanted = [x, *function.parameters()]
    for remaining in reversed(range(again)):
        grads = torch.autograd.grad(loss, wanted, retain_graph=remaining > 0)
    return list(grads)


def fused(function: nn.Module) -> object:
    return torch.compile(function, backend=Backend(validate="off", strict=True, remainder="eager"), fullgraph=True)


def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_the_backward_of_a_gate_needs_no_memory_of_its_own(plans: list[Reuse]) -> None:
    """Product and both gradients lie where gate, up and the gradient of the product lay."""
    mlp, x = GatedMLP(), torch.randn(6, 8, requires_grad=True)
    assert agree(gradients(mlp, x, fused(mlp)), gradients(mlp, x))
    whole = [plan for plan in plans if len(plan.outputs) == 3]
    assert [sorted(plan.outputs) for plan in whole] == [[0, 1, 2]]  # type: ignore[type-var]
    assert len(whole[0].saved) == 2


def test_a_kept_graph_is_not_overwritten(plans: list[Reuse]) -> None:
    mlp, x = GatedMLP(), torch.randn(6, 8, requires_grad=True)
    assert agree(gradients(mlp, x, fused(mlp), again=3), gradients(mlp, x))
    assert any(plan.saved for plan in plans)


def test_checkpointed_and_offloaded_tensors_give_the_same_gradients(plans: list[Reuse]) -> None:
    mlp, x = GatedMLP(), torch.randn(6, 8, requires_grad=True)
    compiled = fused(mlp)
    for reentrant in (False, True):
        checkpointed = lambda t, kind=reentrant: torch.utils.checkpoint.checkpoint(compiled, t, use_reentrant=kind)  # noqa: E731
        loss = checkpointed(x).square().sum()
        loss.backward()
        ours = [x.grad, *[p.grad for p in mlp.parameters()]]
        assert agree(ours, gradients(mlp, x))  # type: ignore[arg-type]
        x.grad = None
        mlp.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        ours = gradients(mlp, x, compiled)
    assert agree(ours, gradients(mlp, x))
    assert any(plan.saved for plan in plans)


def test_memory_that_somebody_holds_is_left_alone() -> None:
    tensor = torch.randn(4, 4)
    assert not lowering.is_held(tensor)
    other = tensor.detach()
    assert lowering.is_held(tensor)
    del other
    assert not lowering.is_held(tensor)


class Branches(nn.Module):
    """What a fused op reads is read again later, returned, or lies in a view's memory: none of it may be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.linear(x).chunk(2, dim=-1)
        c = self.linear(x)
        gated = F.silu(a) * b
        returned = self.linear(F.silu(c) * 2) + c
        return torch.cat([gated, gated], -1) + returned, c


def test_what_is_read_later_or_returned_stays() -> None:
    module, x = Branches(), torch.randn(6, 8, requires_grad=True)
    compiled = fused(module)

    def both(run: object) -> list[Tensor]:
        out, c = run(x)  # type: ignore[operator]
        loss = out.square().sum() + c.sin().sum()
        return [out.detach(), c.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]

    assert agree(both(compiled), both(module))
