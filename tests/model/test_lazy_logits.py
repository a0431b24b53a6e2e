"""Logits of a fused loss: a tensor like eager's in all that can be asked of it, computed when its values are read.

The backend here (giving_up.py) runs graphs as they are and gives the logits up, so values and gradients are eager's, bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.output_contract.tensor import LazyTensor
from fxfuse.reporting.records import GraphRecord
from tests.model.builders import VOCABULARY
from tests.model.lazy_heads import Model, gradients, lazy, reads, recording, tokens  # noqa: F401

QUERIES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "last size": lambda x: x.shape[-1],
    "size": lambda x: x.size(),
    "size of a dim": lambda x: x.size(-1),
    "dtype": lambda x: x.dtype,
    "device": lambda x: x.device,
    "requires_grad": lambda x: x.requires_grad,
    "has a grad_fn": lambda x: x.grad_fn is not None,
    "is_leaf": lambda x: x.is_leaf,
    "is no view": lambda x: x._base is None,
    "dim": lambda x: (x.dim(), x.ndim, x.ndimension()),
    "numel": lambda x: (x.numel(), x.nelement(), torch.numel(x)),
    "len": len,
    "stride": lambda x: (x.stride(), x.stride(0), x.is_contiguous(), x.storage_offset()),
    "floating": lambda x: (x.is_floating_point(), torch.is_floating_point(x), x.is_complex(), x.is_signed()),
    "bytes": lambda x: (x.element_size(), x.itemsize, x.nbytes),
    "place": lambda x: (x.is_cuda, x.is_cpu, x.layout, x.is_sparse, x.is_quantized, x.get_device()),
    "type": lambda x: (isinstance(x, Tensor), torch.is_tensor(x), x.type()),
}


def test_a_question_about_the_tensor_reads_nothing(records: list[GraphRecord]) -> None:
    model, eager = lazy(), Model()
    for length in (7, 5, 9):
        logits, real = model(tokens(length))[1], eager(tokens(length))[1]
        assert type(logits) is LazyTensor
        assert [name for name, ask in QUERIES.items() if ask(logits) != ask(real)] == []
    assert reads(records) == (0, 0)


STAYS_LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "to a dtype": lambda x: x.to(torch.float64),
    "to a dtype, named": lambda x: x.to(dtype=torch.float16, non_blocking=True),
    "to a place and dtype": lambda x: x.to("cpu", torch.float64),
    "to another": lambda x: x.to(torch.zeros((), dtype=torch.bfloat16)),
    "type": lambda x: x.type(torch.float64),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "several": lambda x: x.detach().clone().double().to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casts_and_copies_read_nothing(dtype: torch.dtype, records: list[GraphRecord]) -> None:
    model, eager = lazy(dtype=dtype), Model(dtype)
    for name, change in STAYS_LAZY.items():
        before = reads(records)
        ours, theirs = change(model(tokens())[1]), change(eager(tokens())[1])
        assert type(ours) is LazyTensor, name
        assert (ours.dtype, ours.shape, ours.requires_grad) == (theirs.dtype, theirs.shape, theirs.requires_grad), name
        assert reads(records) == before, name
        assert torch.equal(ours, theirs), name
        assert reads(records)[1] == before[1] + 1, name
        if theirs.requires_grad:
            got, want = (gradients(m, x.double().square().sum()) for m, x in ((model, ours), (eager, theirs)))
            assert all(map(torch.equal, got, want)), name


def test_what_only_looks_like_a_cast_reads() -> None:
    model = lazy()
    for call in (lambda x: x.to(torch.float64, copy=True), lambda x: x.to("meta"), lambda x: x.cpu() * 1):
        assert type(call(model(tokens())[1])) is Tensor


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "function": lambda x: F.log_softmax(x, -1),
    "comparison": lambda x: x == x,
    "comparison with a number": lambda x: x > 0.1,
    "arithmetic": lambda x: 2 * x - x / 3,
    "with another": lambda x: torch.ones(VOCABULARY) * x,
    "print": repr,
    "format": lambda x: f"{x}",
    "format of a number": lambda x: f"{x.sum():.3f}",
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy().tolist(),
    "array": lambda x: __import__("numpy").asarray(x.detach()).tolist(),
    "list": lambda x: x.tolist(),
    "indexing": lambda x: x[0, 1],
    "slicing": lambda x: x[..., :-1, :].contiguous(),
    "iteration": list,
    "unpacking": lambda x: x.unbind(1),
    "view": lambda x: x.view(-1, VOCABULARY),
    "concatenation": lambda x: torch.cat([x, x]),
    "stack of mixed": lambda x: torch.stack([x, torch.zeros_like(x)]),
    "einsum": lambda x: torch.einsum("btv,btv->bt", x, x),
    "loss": lambda x: F.cross_entropy(x.view(-1, VOCABULARY), tokens().view(-1)),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x.detach() < 100).all()),
    "save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "in place": lambda x: x.mul_(2),
    "assignment": lambda x: x.__setitem__(0, 1.0) or x.clone(),  # type: ignore[func-returns-value]
    "transpose": lambda x: x.mT,
    "gather": lambda x: x.gather(-1, tokens()[..., None]),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "out": lambda x: torch.exp(x.detach(), out=torch.empty(0)),
}


def test_what_reads_it_gets_what_eager_gets(records: list[GraphRecord]) -> None:
    model, eager = lazy(), Model()
    for name, use in READERS.items():
        before = reads(records)
        ours, theirs = use(model(tokens())[1]), use(eager(tokens())[1])
        after = reads(records)
        assert after[0] > before[0], name
        assert after[1] == before[1] + 1, name
        for a, b in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (ours, theirs)), strict=True):
            if isinstance(b, Tensor):
                assert torch.equal(a, b), name
                assert a.requires_grad == b.requires_grad, name
            else:
                assert str(a) == str(b), name


def test_deepcopy_is_refused_as_in_eager() -> None:
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(lazy()(tokens())[1])


def test_gradients_of_what_was_read_are_eagers() -> None:
    model, eager = lazy(), Model()
    for use in (lambda x: x.square().mean(), lambda x: x.float().logsumexp(-1).sum(), lambda x: (x.softmax(-1) * x).sum()):
        got, want = (gradients(m, use(m(tokens())[1])) for m in (model, eager))
        assert all(map(torch.equal, got, want))


def test_gradients_of_the_loss_and_of_what_was_read_add_up() -> None:
    model, eager, wide = lazy(), Model(), Model(torch.float64)
    got, want, truth = (gradients(m, sum(x.square().mean() if x.dim() else x for x in m(tokens()))) for m in (model, eager, wide))
    for a, b, t in zip(got, want, truth, strict=True):
        assert (a - t).norm() <= 1.5 * max(float((b - t).norm()), float(1e-7 * t.norm()))


def test_backward_of_the_loss_then_a_read_then_another_forward() -> None:
    model, eager = lazy(), Model()
    for length in (4, 6, 4):
        loss, logits = model(tokens(length))
        want, real = eager(tokens(length))
        for m, value in ((model, loss), (eager, want)):
            m.zero_grad()
            value.backward()
        assert torch.equal(logits.argmax(-1), real.argmax(-1))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), eager.parameters(), strict=True))


def test_it_is_computed_once_however_often_it_is_read(records: list[GraphRecord]) -> None:
    logits = lazy()(tokens())[1]
    assert torch.equal(logits.argmax(-1), logits.softmax(-1).argmax(-1))
    assert torch.equal(logits.detach(), logits.float())
    assert reads(records)[1] == 1
    assert str(records[0].reads[0]).startswith("logits of lm_head: lazy, read 4 times (materialised: 1, first by test_lazy_logits.py:")


# What is made of logits before they are read: the steps, each of which somebody holds.
MADE_BEFORE: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "clone": lambda x: [x.clone()],
    "cast": lambda x: [x.double()],
    "cast of a detached one": lambda x: [x.detach().double()],
    "clone of a detached one": lambda x: [y := x.detach(), y.clone()],
    "detached": lambda x: [x.detach()],
}
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.div_(2.0),
    "through a view": lambda x: x[:, :-1].mul_(3.0),
    "through data": lambda x: x.data.fill_(1.0),
    "through data, after a read": lambda x: (x.sum(), x.data.fill_(1.0)),
    "through numpy": lambda x: x.detach().numpy().fill(1.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", MADE_BEFORE)
def test_a_write_leaves_copies_made_before_it_as_they_were(make: str, write: str) -> None:
    """Whenever they are read: a copy has the values from before the write, what shares the memory has those that were written."""
    found = []
    for model in (lazy(), Model()):
        logits = model(tokens())[1]
        made = MADE_BEFORE[make](logits)
        WRITES[write](logits)
        values = [each[:] for each in (*made, logits)]
        copied = values[-2]
        gradients = torch.autograd.grad(copied.square().sum(), [*model.parameters()]) if copied.requires_grad else []
        found.append([*values, *gradients])
    assert all(map(torch.equal, *found))


def test_of_a_written_alias_a_copy_is_what_was_written() -> None:
    for model in (lazy(), Model()):
        logits = model(tokens())[1]
        first, second = logits.detach(), logits.detach()
        first[:, 0] = 7.0
        assert (second.detach().clone()[:, 0] == 7.0).all()
