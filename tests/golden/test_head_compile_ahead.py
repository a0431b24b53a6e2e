"""What is compiled for a head before it runs is what its first chunk asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import compile_ahead
from fxfuse.backend import Backend
from fxfuse.linear_loss import ahead, chunks, execution
from fxfuse.linear_loss import fuse as fusing
from fxfuse.linear_loss.op import linear_loss

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def forms(tensors: Any) -> list[Form]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


class Head(nn.Module):
    """A head and its loss; ``weighted``: rows count by a number that is given."""

    def __init__(self, dtype: torch.dtype, trained: bool, weighted: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 200, bias=False, dtype=dtype).requires_grad_(trained)
        self.weighted = weighted

    def forward(self, x: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        logits = self.linear(x).flatten(0, 1).float()
        if self.weighted:
            return (F.cross_entropy(logits, labels.flatten(), reduction="none") * share).sum()
        return F.cross_entropy(logits, labels.flatten())


def as_on_a_gpu(graph: fx.Graph) -> int:
    """(On a CPU there is nothing to compile.)"""
    (head,) = graph.find_nodes(op="call_function", target=linear_loss)
    announce = compile_ahead._of_loss(head)
    assert announce is not None
    announce(torch.device("cpu"), *fx.map_arg(head.args, compile_ahead._form))
    return 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [8, 400])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_chunks_launch(
    dtype: torch.dtype, trained: bool, rows: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    announced: list[tuple[list[Form], list[Form]]] = []
    ran: list[tuple[list[Form], list[Form]]] = []
    programs: list[str] = []
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 128 * 256 * dtype.itemsize)  # two blocks of rows, or what a weight adds to that

    def noted(tensors: Any, outputs: Any, device: torch.device) -> None:
        announced.append((forms(tensors), forms(outputs)))

    def runner(program: Any, device: str) -> Any:
        programs.append(str(program))
        return SimpleNamespace(compile_ahead=noted)

    monkeypatch.setattr(ahead, "runner", runner)
    run_into = execution.run_into

    def seen(program: Any, tensors: Any, results: Any) -> None:
        programs.append(str(program))
        ran.append((forms(tensors), forms(results)))
        run_into(program, tensors, results)

    monkeypatch.setattr(execution, "run_into", seen)
    monkeypatch.setattr(fusing, "implementation_on", lambda device: "triton")
    monkeypatch.setattr(fusing, "compile_launches_ahead", as_on_a_gpu)
    backend = Backend(validate="off", remainder="eager", strict=True)
    compiled = torch.compile(Head(dtype, trained, weighted), backend=backend, dynamic=True)
    x = torch.randn(2, rows, 16, dtype=dtype, requires_grad=True)
    compiled(x, torch.randint(0, 200, (2, rows)), torch.rand(2 * rows)).backward()
    assert announced
    assert announced[0] == ran[0]
    assert programs[0] == programs[-1]
