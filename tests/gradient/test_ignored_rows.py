"""Rows whose loss does not read their logits: they are found in the program, and stay out of every product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.linear_loss import chunks, counted, execution, products, selection
from fxfuse.linear_loss.reading import guarded, is_guarded, reading_condition, reading_rows
from fxfuse.program import Program, parse
from fxfuse.reference import execute
from fxfuse.regions.trace import trace_region
from fxfuse.residuals import plan_residuals
from tests.gradient import loss_heads
from tests.gradient.loss_heads import CLASSES, Head, worst_ratio

Spy = Callable[[], list[int]]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """303 rows in chunks of 128."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)


def as_on_a_device(monkeypatch: pytest.MonkeyPatch, expected: int) -> list[int]:
    """The host does not know how many rows count, and expects a number of them. Returns the counts of the grouped products."""
    monkeypatch.setattr(selection, "_number_is_here", lambda tensor: False)
    monkeypatch.setattr(selection, "groups_on_device", lambda hidden, weight: True)
    monkeypatch.setattr(selection, "_all_expected", lambda *rest: False)
    monkeypatch.setattr(selection, "_expected", lambda program, hidden, *rest: min(expected, len(hidden)))
    asked: list[int] = []
    original = products.multiply_counted

    def spy(product: str, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
        asked.append(int(count))
        found = original(product, a, b, count)
        found[int(count):] = float("nan")  # undefined is the worst that it can be
        # What lies beside rows is read by bfloat16's products on CPUs with AMX (by none on a device): so numbers lie there.
        return F.pad(found, (0, -found.shape[1] % 64))[:, : found.shape[1]]

    monkeypatch.setattr(execution, "multiply_counted", spy)
    return asked


@pytest.mark.parametrize("expected", [0, 128, 200, 256, 302])
@pytest.mark.parametrize(("name", "trained"), [("mean", True), ("shifted", False), ("by_row", False), ("by_row", True)])
def test_any_expectation_gives_the_same_results(name: str, trained: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = as_on_a_device(monkeypatch, expected)
    assert worst_ratio(Head(loss(name), trained=trained, biased=trained)) <= 1
    assert asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_gradient_of_one_grouped_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one chunk, as trained heads have it; float16 is stored wider."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1 << 20)
    as_on_a_device(monkeypatch, 0)
    assert worst_ratio(Head(loss_heads.mean, dtype)) <= 1


def by_row(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*loss_heads.flat(z.float(), labels), reduction="none")


def loss(name: str) -> loss_heads.Loss:
    return by_row if name == "by_row" else getattr(loss_heads, name)


@pytest.mark.parametrize("device_like", [False, True])
def test_all_rows_ignored(device_like: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if device_like:
        as_on_a_device(monkeypatch, 128)
    module = Head(loss_heads.mean, biased=True).module()
    labels = torch.full_like(module.labels, -100)
    hidden = module.hidden.detach().requires_grad_()
    out = loss_heads.compiled(module)(hidden, labels)
    gradients = torch.autograd.grad(out, [hidden, *module.parameters()])
    assert torch.isnan(out)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("device_like", [False, True])
def test_gradients_of_ignored_rows_are_zero_whatever_they_hold(device_like: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite hidden state of a row that does not count; eager has NaN in the gradient of the weight then, by 0 * inf."""
    if device_like:
        as_on_a_device(monkeypatch, 0)
    module = Head(loss_heads.mean, trained=False).module()
    module.hidden[module.labels == -100] = float("inf")
    hidden = module.hidden.detach().requires_grad_()
    out = loss_heads.compiled(module)(hidden, module.labels)
    gradient, = torch.autograd.grad(out, hidden)
    assert torch.isfinite(out)
    assert not gradient[module.labels == -100].any()
    assert torch.isfinite(gradient).all()


def test_only_rows_that_count_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = products.multiply
    monkeypatch.setattr(execution, "multiply", lambda product, a, b, out: (sizes.append(len(a)), original(product, a, b, out)))
    module = Head(loss_heads.mean, trained=False).module()
    hidden = module.hidden.detach().requires_grad_()
    loss_heads.compiled(module)(hidden, module.labels).backward()
    assert sum(sizes) == 2 * int((module.labels != -100).sum())


def row_program(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Program, str]:
    z, labels = torch.zeros(6, CLASSES, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.int64)
    program = trace_region(function, z, labels)[1].program
    return program, next(a.name for a in program.arguments if a.kind == "real")


def test_the_condition_is_read_off_the_program() -> None:
    program, logits = row_program(lambda z, y: F.cross_entropy(z.float(), y, reduction="none", label_smoothing=0.1))
    safe = guarded(program, logits)
    assert not is_guarded(program, logits)
    assert is_guarded(safe, logits)
    assert guarded(safe, logits) is safe
    reads = reading_rows(safe, logits)
    assert reads is not None
    labels = torch.tensor([[3], [-100], [0]])
    assert execute(reads, [labels])[0].view(-1).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("function", [
    lambda z, y: torch.logsumexp(z.float(), -1) * torch.where(y == 3, 1.0, 2.0),
    lambda z, y: torch.where(z.float().sum(-1) > 0, torch.logsumexp(z.float(), -1), 0.0),
])
def test_rows_that_may_read_their_logits_are_kept(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Near-misses: a choice of factors, a condition of the logits themselves."""
    program, logits = row_program(function)
    assert reading_condition(program, logits) is None
    assert guarded(program, logits) is program


def test_an_output_of_every_row_keeps_all_rows() -> None:
    """Row statistics that a program hands out are those of real logits, unless it is guarded."""
    program, logits = row_program(lambda z, y: F.cross_entropy(z.float(), y, reduction="none"))
    assert reading_condition(plan_residuals(program, (logits,)), logits) is None
    assert is_guarded(plan_residuals(guarded(program, logits), (logits,)), logits)


def chosen(comparison: str, branches: str) -> Program:
    """A sum of exponentials of each row, or a constant or sum, as a label says."""
    return parse(
        "program rank=1 math=float32\naxis c0 = 5\narg y : int64[r|]\narg z : bfloat16[r|c0]\n%0 = load y None\n%1 = const 7\n"
        f"%2 = {comparison} %0 %1\n%3 = load z c0 0 1\n%4 = exp %3\n%5 = sum c0 %4\n%6 = const 0.5\n%7 = max c0 %3\n"
        f"%8 = select %2 {branches}\nout loss : float32[r|] = %8\n"
    )


@pytest.mark.parametrize(("comparison", "branches"), [("eq", "%6 %5"), ("ne", "%5 %6")])
def test_a_condition_either_way_round(comparison: str, branches: str) -> None:
    safe = guarded(chosen(comparison, branches), "z")
    reads = reading_rows(safe, "z")
    assert reads is not None
    labels = torch.tensor([[7], [8]])
    assert execute(reads, [labels])[0].view(-1).tolist() == [0.0, 1.0]
    undefined = torch.tensor([[float("nan")] * 5, [0.0] * 5], dtype=torch.bfloat16)
    assert execute(safe, [labels, undefined])[0].view(-1).tolist() == [0.5, 5.0]


def test_a_choice_between_two_things_that_both_read() -> None:
    assert reading_condition(chosen("eq", "%7 %5"), "z") is None


def test_what_is_expected_is_what_arrived_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits: a count is looked at when its event says that it is there."""

    class Event:
        done = False

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(counted.torch, "empty", lambda shape, dtype, pin_memory: torch.zeros(shape, dtype=dtype))
    known = counted.Counted()
    known.send(torch.tensor(30, dtype=torch.int32), 100)
    assert known.look() is None
    Event.done = True
    assert known.look() == 0.3
    known.send(torch.tensor(80, dtype=torch.int32), 100)
    assert known.look() == 0.8
    assert not known.passes(0.9)
    assert [known.passes(0.7) for _ in range(4)].count(False) == 1


def forgotten_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grouped product left undefined is handed out."""
    monkeypatch.setattr(Tensor, "masked_fill_", lambda self, mask, value: self)


def rows_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the rows are not put back in order."""
    monkeypatch.setattr(execution.Head, "as_given", lambda self, result: result)


def one_row_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    original = selection.select

    def faulty(*args: object) -> selection.Selection | None:
        found = original(*args)  # type: ignore[arg-type]
        return found and selection.Selection(found.order, found.count - 1, max(found.dense - 1, 0), found.asked)

    monkeypatch.setattr(execution, "select", faulty)


@pytest.mark.parametrize("fault", [forgotten_zero, rows_as_they_lie, one_row_too_few])
def test_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch, 128)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert worst_ratio(Head(by_row)) <= 1
