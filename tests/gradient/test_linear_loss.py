"""A fused linear and loss against float64: every option, every mode, both precisions; and what a trainer does with the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import DoubleBackwardError
from fxfuse.linear_loss import adjoint, chunks, execution
from fxfuse.linear_loss.op import linear_loss
from fxfuse.linear_loss.reading import guarded
from fxfuse.program import Program, parse
from fxfuse.regions.trace import trace_region
from fxfuse.residuals import plan_residuals
from tests.gradient import loss_heads
from tests.gradient.loss_heads import CLASSES, WIDTH, Head, Loss, compiled, recorded_plans, worst_ratio

TRAINED_TOTAL = ["mean", "total_by_items", "shifted", "sliced", "smoothed", "other_ignored", "capped", "scaled", "divided",
                 "masked_mean", "policy", "divergence", "divergence_by_row"]
MODES = [
    *((name, trained, "total") for name in TRAINED_TOTAL for trained in (True,)),
    ("sliced", False, "total"),
    ("log_probabilities", False, "rows"),
    ("log_probabilities", True, "recompute"),
    ("selected", True, "recompute"),
    ("by_sequence", False, "rows"),
    ("by_sequence", True, "recompute"),
    ("with_z_loss", False, "recompute"),
    ("with_z_loss", True, "recompute"),
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """303 rows in chunks of 128."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)


def loss(name: str) -> Loss:
    return getattr(loss_heads, name)


@pytest.mark.parametrize(("name", "trained", "mode"), MODES)
def test_every_loss_is_right_in_its_mode(name: str, trained: bool, mode: str) -> None:
    with recorded_plans() as plans:
        assert worst_ratio(Head(loss(name), trained=trained)) <= 1
    assert [plan.mode for plan in plans] == [mode]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("name", ["shifted", "by_sequence"])
def test_small_and_large_hidden_states(name: str, scale: float) -> None:
    assert worst_ratio(Head(loss(name), biased=True), scale) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mean", "capped", "with_z_loss"])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """The mean is inside: what the forward stores has no 1/N in it, so float16 holds it."""
    assert worst_ratio(Head(loss(name), dtype, biased=True)) <= 1


def test_beside_rows_of_logits_lie_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 on CPUs with AMX read beyond rows of no multiple of 4: not a number there, and a gradient is none."""
    beside: list[Tensor] = []
    product = execution.multiply

    def noted(text: str, a: Tensor, b: Tensor, out: Tensor) -> None:
        product(text, a, b, out=out)
        if out.shape[1] == CLASSES:
            beside.append(out.as_strided((len(out), out.stride(0) - CLASSES), out.stride(), CLASSES))

    monkeypatch.setattr(execution, "multiply", noted)
    module = loss_heads.Module(Head(loss("mean"), torch.bfloat16), 1.0, batch=3, length=101)
    module.results(compiled(module), 1.0)
    assert beside
    assert all(part.numel() and not part.any() for part in beside)


def test_a_scaled_float16_loss_is_as_good_as_that_of_the_sum() -> None:
    """GradScaler multiplies the loss; a frozen head's gradient of 1/4096 th parts comes out right."""
    assert worst_ratio(Head(loss("mean"), torch.float16, trained=False), factor=1024.0, batch=8, length=512) <= 1


def test_a_weight_gradient_over_many_chunks_is_added_up_in_float32() -> None:
    assert worst_ratio(Head(loss("mean"), torch.bfloat16), batch=16, length=256) <= 1


@pytest.mark.parametrize("factor", [2.0, 0.0, -3.5])
def test_the_loss_may_be_multiplied(factor: float) -> None:
    assert worst_ratio(Head(loss("masked_mean")), factor=factor) <= 1


def test_gradients_accumulate_over_micro_batches() -> None:
    modules = [Head(loss("total_by_items")).module() for _ in range(2)]
    run = compiled(modules[1])
    for forward in (modules[0], run):
        module = modules[forward is run]
        for part in (slice(0, 2), slice(2, 3)):
            forward(module.hidden[part].contiguous(), module.labels[part]).backward()
    ours, eager = modules[1].linear.weight.grad, modules[0].linear.weight.grad
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7)


def test_a_kept_graph_gives_its_gradients_again() -> None:
    module = Head(loss("mean")).module()
    hidden = module.hidden.detach().requires_grad_()
    out = compiled(module)(hidden, module.labels)
    first, = torch.autograd.grad(out, hidden, retain_graph=True)
    second, = torch.autograd.grad(3 * out, hidden)
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("name", ["mean", "total_by_items", "masked_mean"])
def test_all_rows_ignored(name: str) -> None:
    """0/0 where eager has it, and no gradient where it has none."""
    module = Head(loss(name)).module()
    labels = torch.full_like(module.labels, -100)
    results = []
    for forward in (module, compiled(module)):
        hidden = module.hidden.detach().requires_grad_()
        out = forward(hidden, labels)
        results.append([out.detach(), *torch.autograd.grad(out, [hidden, module.linear.weight])])
    for ours, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=0, atol=0)


def operands(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels [rows, 1]."""
    make = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((rows, WIDTH), (CLASSES, WIDTH), (CLASSES,))]
    labels = torch.randint(0, CLASSES, (rows, 1))
    labels[::4] = -100
    return make[0], make[1], make[2], labels


def row_program(dtype: torch.dtype = torch.float32, smoothing: float = 0.0) -> tuple[Program, str]:
    """Cross-entropy of each row, and the name of the logits in it."""
    z, labels = torch.zeros(6, CLASSES, dtype=dtype), torch.zeros(6, dtype=torch.int64)
    each = lambda z, y: F.cross_entropy(z.float(), y, reduction="none", label_smoothing=smoothing)  # noqa: E731
    program = trace_region(each, z, labels)[1].program
    return program, next(a.name for a in program.arguments if a.kind == "real")


def test_no_rows() -> None:
    hidden, weight, bias, labels = operands(0)
    program, logits = row_program()
    losses, total, *_ = linear_loss(hidden, weight, bias, [labels], None, str(program), logits, "total", ["hidden", "weight", "bias"],
                                    [], [], [])
    assert losses.shape == (0, 1)
    gradients = torch.autograd.grad(total, [hidden, weight, bias])
    assert total.item() == 0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_out_of_range_fail_as_in_eager(label: int) -> None:
    module = Head(loss("mean")).module()
    module.labels[0, 3] = label
    with pytest.raises(IndexError):
        module(module.hidden, module.labels)
    with pytest.raises(IndexError):
        compiled(module)(module.hidden, module.labels)


@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize("mode", ["value", "total", "rows", "recompute"])
def test_the_op_is_a_good_citizen(mode: str, terms: int) -> None:
    program, logits = row_program(torch.bfloat16)
    program = guarded(program, logits) if terms else program
    hidden, weight, bias, labels = operands(10, torch.bfloat16)
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for k in range(terms):
        named |= {f"left{k}": torch.randn(10, 3).bfloat16().requires_grad_(),
                  f"right{k}": torch.randn(CLASSES, 3).bfloat16().requires_grad_()}
    by_row = [name for name in named if name == "hidden" or name.startswith("left")]
    wanted = {"value": [], "rows": by_row}.get(mode, list(named))
    tensors = [tensor if name in wanted else tensor.detach() for name, tensor in named.items()]
    text = str(plan_residuals(program, (logits,)) if mode == "recompute" else program)
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    # Where only one output is differentiable, AOT's check of the sum of all cannot be used.
    checks += ["test_aot_dispatch_dynamic"] if mode in ("recompute", "value") else []
    weights = torch.rand(10, 1) if mode == "rows" else None
    arguments = (*tensors[:3], [labels], weights, text, logits, mode, wanted, tensors[3::2], tensors[4::2], [0.5] * terms)
    torch.library.opcheck(linear_loss, arguments, test_utils=checks)


def test_a_second_derivative_is_an_error_by_name() -> None:
    program, logits = row_program()
    hidden, weight, bias, labels = operands(10)
    _, total, *_ = linear_loss(hidden, weight, bias, [labels], None, str(program), logits, "total", ["hidden", "weight"],
                                [], [], [])
    gradient, = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="linear_loss"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("weighted", [False, True])
def test_one_program_gives_losses_and_their_gradient(weighted: bool) -> None:
    """It overwrites the logits, so nothing may read them after the walk that stores."""
    program, logits = row_program(torch.bfloat16, smoothing=0.1)
    joint = adjoint.loss_and_gradient(program, logits, weighted)
    assert [o.name for o in joint.outputs] == [*(o.name for o in program.outputs), f"d_{logits}"]
    assert adjoint.in_place(joint, logits)


def test_a_program_that_reads_the_logits_after_the_gradient_is_not_run_in_place() -> None:
    late = parse(
        "program rank=1 math=float32\naxis a = 8\narg z : float32[r|a]\n%0 = load z a 0 1\n%1 = max a %0\n%2 = sub %0 %1\n"
        "%3 = square %2\n%4 = sum a %3\n%5 = sub %0 %4\n%6 = square %5\n%7 = sum a %6\nout y : float32[r|] = %7\n"
        "out d_z : float32[r|a] = %2 @ a 0 1"
    )
    assert not adjoint.in_place(late, "z")
