"""Validation kills planted faults: in a forward program, in its derived backward, in the lowering. And lets right ones live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fxfuse import fused_op, reference
from fxfuse.backend import Backend
from fxfuse.program import Lane, Node, Program
from fxfuse.site_graph import SiteGraph
from fxfuse.trial import Compared, Trial
from fxfuse.validation import error_ratio, forget_verdicts, judged, same_overflow
from tests.gradient.captured_sites import SITES


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("mode", ["fast", "full"])
def test_what_is_right_passes(name: str, mode: str) -> None:
    verdict = SITES[name]().judge(mode=mode)
    assert verdict.reason == ""
    assert verdict.error_ratio is not None
    assert verdict.error_ratio <= 2


# Faults. Each takes a program and gives one that is wrong in one place.


def nodes_where(program: Program, test: Callable[[Node], bool]) -> list[int]:
    return [i for i, node in enumerate(program.nodes) if test(node)]


def changed(program: Program, index: int, node: Node) -> Program:
    return replace(program, nodes=(*program.nodes[:index], node, *program.nodes[index + 1:])).verify()


def with_constant(before: float, after: float) -> Callable[[Program], Program]:
    def fault(program: Program) -> Program:
        at = nodes_where(program, lambda n: n.op == "const" and n.attributes[0] == pytest.approx(before, rel=1e-6))
        return changed(program, at[0], Node("const", (), (after,)))

    return fault


def operand_instead(op: str, which: int = 0, occurrence: int = 0) -> Callable[[Program], Program]:
    """``op(a, b)`` becomes ``a`` (or ``b``): a term or a factor is missing."""

    def fault(program: Program) -> Program:
        at = nodes_where(program, lambda n: n.op == op)[occurrence]
        operand = program.nodes[at].operands[which]
        nodes = [replace(n, operands=tuple(operand if v == at else v for v in n.operands)) for n in program.nodes]
        outputs = tuple(replace(o, stores=tuple((operand if v == at else v, lane) for v, lane in o.stores))
                        for o in program.outputs)
        return replace(program, nodes=tuple(nodes), outputs=outputs).verify()

    return fault


def another_op(before: str, after: str, occurrence: int = 0) -> Callable[[Program], Program]:
    def fault(program: Program) -> Program:
        at = nodes_where(program, lambda n: n.op == before)[occurrence]
        return changed(program, at, replace(program.nodes[at], op=after))

    return fault


def rounded(op: str, occurrence: int = 0) -> Callable[[Program], Program]:
    """What ``op`` gives is rounded to bfloat16 too early."""

    def fault(program: Program) -> Program:
        at = nodes_where(program, lambda n: n.op == op)[occurrence]
        nodes = [*program.nodes[:at + 1], Node("cast", (at,), ("bfloat16",)), *program.nodes[at + 1:]]
        shift = lambda v: v + 1 if v >= at else v  # noqa: E731
        moved = [n if i <= at or i == at + 1 else replace(n, operands=tuple(map(shift, n.operands)))
                 for i, n in enumerate(nodes)]
        outputs = tuple(replace(o, stores=tuple((shift(v), lane) for v, lane in o.stores)) for o in program.outputs)
        return replace(program, nodes=tuple(moved), outputs=outputs).verify()

    return fault


def swapped_lanes(program: Program) -> Program:
    """The two halves of the result change places."""
    output = program.outputs[0]
    (a, lane_a), (b, lane_b) = output.stores
    return replace(program, outputs=(replace(output, stores=((a, Lane(lane_a.axis, lane_b.offset, lane_b.stride)),
                                                             (b, Lane(lane_b.axis, lane_a.offset, lane_a.stride)))),))


def scaled_output(name_part: str, factor: float) -> Callable[[Program], Program]:
    """An output is off by a factor."""

    def fault(program: Program) -> Program:
        at = next(i for i, o in enumerate(program.outputs) if name_part in o.name)
        output = program.outputs[at]
        n = len(program.nodes)
        extra = [Node("const", (), (factor,)), *(Node("mul", (n, value)) for value, _ in output.stores)]
        stores = tuple((n + 1 + i, lane) for i, (_, lane) in enumerate(output.stores))
        outputs = (*program.outputs[:at], replace(output, stores=stores), *program.outputs[at + 1:])
        return replace(program, nodes=(*program.nodes, *extra), outputs=outputs).verify()

    return fault


FORWARD_FAULTS = {
    "rms_norm: another eps": ("rms_norm", with_constant(1e-6, 1e-5)),
    "rms_norm: sum in place of mean": ("rms_norm", operand_instead("div")),
    "rms_norm: no weight": ("rms_norm", operand_instead("mul", 1, -1)),
    "rms_norm: sum of values, not of squares": ("rms_norm", another_op("square", "abs")),
    "rms_norm in float32: squares rounded too early": ("rms_norm in float32", rounded("square")),
    "rms_norm in float32: statistic rounded too early": ("rms_norm in float32", rounded("rsqrt")),
    "rms_norm: maximum in place of sum": ("rms_norm", another_op("sum", "max")),
    "layer_norm: mean not taken off": ("layer_norm", operand_instead("sub")),
    "layer_norm: no bias": ("layer_norm", operand_instead("add", 0, -1)),
    "layer_norm: another eps": ("layer_norm", with_constant(1e-5, 1e-6)),
    "gate: another activation": ("gate", another_op("sigmoid", "tanh")),
    "gate: gate and product confused": ("gate", operand_instead("mul", 0, -1)),
    "gelu_tanh: a digit lost": ("gelu_tanh", with_constant(0.044715, 0.0447)),
    "gelu_tanh: constant factor lost": ("gelu_tanh", with_constant(1.5, 1.0)),
    "residual_norm: difference in place of sum": ("residual_norm", another_op("add", "sub")),
    "residual_norm: residual dropped": ("residual_norm", operand_instead("add")),
    "rope: sign": ("rope", operand_instead("neg")),
    "rope: halves transposed": ("rope", swapped_lanes),
    "loss: logarithm rounded too early": ("loss", rounded("log")),
    "loss: no logarithm of the sum": ("loss", operand_instead("log")),
    "loss: exponentials of what is not shifted": ("loss", operand_instead("sub")),
    "softcap: another cap": ("softcap", with_constant(30.0, 29.9)),
    "relu_squared: sign lost": ("relu_squared", another_op("relu", "abs")),
}


@pytest.mark.parametrize("name", FORWARD_FAULTS)
def test_a_fault_in_a_forward_program_is_found(name: str) -> None:
    site, fault = FORWARD_FAULTS[name]
    captured = SITES[site]()
    verdict = captured.judge(fault(captured.program))
    assert verdict.reason != "", f"passed with ratio {verdict.error_ratio}"


BACKWARD_FAULTS = {
    "rms_norm: mean term missing": ("rms_norm", operand_instead("sub", 0, -1)),
    "rms_norm: half of the mean term": ("rms_norm", with_constant(2.0, 1.0)),
    "rms_norm: mean term added": ("rms_norm", another_op("sub", "add", -1)),
    "rms_norm: weight gradient doubled": ("rms_norm", scaled_output("d_a1", 2.0)),
    "layer_norm: a thousandth off": ("layer_norm", scaled_output("d_a0", 1.001)),
    "gate: derivative of the sigmoid dropped": ("gate", operand_instead("add", 0, -1)),
    "gate: sign": ("gate", another_op("sub", "add")),
    "residual_norm: the residual's own cotangent dropped": ("residual_norm", operand_instead("add", 1, 0)),
    "rope: rotated the same way again": ("rope", another_op("sub", "add")),
    "rope: halves transposed": ("rope", swapped_lanes),
    "loss: the label's term dropped": ("loss", operand_instead("sub", 0, -1)),
    "softcap: square of tanh dropped": ("softcap", operand_instead("sub", 0, -1)),
    "relu_squared: factor 2": ("relu_squared", with_constant(2.0, 1.0)),
}


@pytest.fixture
def derived_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Program], Program]], None]]:
    """Let every derived backward be changed by a fault."""
    derive = fused_op.derive_backward

    def plant(fault: Callable[[Program], Program]) -> None:
        monkeypatch.setattr(fused_op, "derive_backward", lambda *args: fault(derive(*args)))
        forget_derivations()

    yield plant
    monkeypatch.undo()
    forget_derivations()


def forget_derivations() -> None:
    fused_op.backward_of.cache_clear()
    fused_op._read_by_backward.cache_clear()


@pytest.mark.parametrize("name", BACKWARD_FAULTS)
def test_a_fault_in_a_derived_backward_is_found(name: str, derived_with: Callable[..., None]) -> None:
    site, fault = BACKWARD_FAULTS[name]
    captured = SITES[site]()
    derived_with(fault)
    verdict = captured.judge()
    assert "gradient" in verdict.reason, f"passed with ratio {verdict.error_ratio}"


def drop_last_row(program: Program, outputs: list[Tensor]) -> None:
    for output, declared in zip(outputs, program.outputs, strict=True):
        if not declared.sums_rows:
            output.flatten(0, -2)[-1].zero_()


def stale_columns(program: Program, outputs: list[Tensor]) -> None:
    for output in outputs:
        if output.shape[-1] > 32:
            output[..., 32:] = 1.0


def row_left_out_of_sums(program: Program, outputs: list[Tensor]) -> None:
    for output, declared in zip(outputs, program.outputs, strict=True):
        if declared.sums_rows:
            output.mul_(0.99)


def unwritten(program: Program, outputs: list[Tensor]) -> None:
    outputs[0].view(-1)[0] = float("nan")


LOWERING_FAULTS = [drop_last_row, stale_columns, row_left_out_of_sums, unwritten]


@pytest.fixture
def lowering_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let the CPU lowering, as a kernel might, leave something undone."""
    execute = reference.execute

    def plant(fault: Callable[[Program, list[Tensor]], None]) -> None:
        def faulty(program: Program, tensors: list[Tensor]) -> list[Tensor]:
            outputs = execute(program, tensors)
            fault(program, outputs)
            return outputs

        forget_verdicts()
        monkeypatch.setattr(reference, "execute", faulty)

    yield plant
    monkeypatch.undo()
    forget_verdicts()


@pytest.mark.parametrize("fault", LOWERING_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_the_lowering_is_found(fault: Callable[..., None], lowering_with: Callable[..., None]) -> None:
    captured = SITES["rms_norm"]()
    lowering_with(fault)
    assert captured.judge().reason != ""


def test_a_faulty_site_is_declined_and_the_model_stays_right(lowering_with: Callable[..., None]) -> None:
    module = nn.Sequential(nn.Linear(8, 48), nn.SiLU(), nn.LayerNorm(48), nn.Linear(48, 8))
    x = torch.randn(5, 8, requires_grad=True)
    expected, = torch.autograd.grad(module(x).square().sum(), x)
    lowering_with(drop_last_row)
    from fxfuse import backend

    records = []
    make = backend.new_record
    backend.new_record = lambda: records.append(make()) or records[-1]  # type: ignore[func-returns-value]
    try:
        compiled = torch.compile(module, backend=Backend(strict=True, remainder="eager"))
        ours, = torch.autograd.grad(compiled(x).square().sum(), x)
    finally:
        backend.new_record = make
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert records[0].sites
    for site in records[0].sites:
        assert site.status == "declined"
        assert "times as far from float64 as eager's" in site.reason


def test_error_ratio_is_in_units_of_eagers_error() -> None:
    truth = torch.randn(1000, dtype=torch.float64)
    eager = (truth + 1e-3 * torch.randn(1000)).float()
    assert error_ratio(eager, eager, truth) == pytest.approx(1)
    assert error_ratio((truth + 3 * (eager - truth)).float(), eager, truth) == pytest.approx(3, rel=1e-3)
    assert error_ratio(truth.float(), truth.float(), truth) <= 4  # the floor: a quarter of an ulp


def test_an_exact_zero_must_stay_zero() -> None:
    zero = torch.zeros(4)
    assert error_ratio(zero, zero, zero.double()) == 0
    assert error_ratio(zero + 1e-30, zero, zero.double()) == float("inf")


def test_overflow_only_where_eager_overflows() -> None:
    truth = torch.tensor([1.0, 1e6, 2.0], dtype=torch.float64)
    eager = truth.half()
    assert same_overflow(eager, eager, truth)
    assert not same_overflow(torch.tensor([1.0, 65504.0, 2.0]).half(), eager, truth)
    assert not same_overflow(torch.tensor([1.0, float("inf"), float("nan")]).half(), eager, truth)
    # Eager lost an intermediate that the truth does not need: ours may be better.
    assert same_overflow(torch.ones(1).half(), torch.full((1,), float("inf")).half(), torch.ones(1).double())


def test_verdicts_do_not_disturb_random_state() -> None:
    captured = SITES["gate"]()
    state = torch.get_rng_state()
    captured.judge()
    assert torch.equal(state, torch.get_rng_state())


def test_under_no_grad_and_inference_mode_too() -> None:
    captured = SITES["rms_norm"]()
    with torch.no_grad():
        assert captured.judge().reason == ""
    with torch.inference_mode():
        assert captured.judge().reason == ""


@pytest.mark.parametrize(("error", "accepted"), [(1.0, True), (3.0, False)])
def test_one_number_is_judged_over_draws_where_eager_was_lucky_once(error: float, accepted: bool) -> None:
    """Both losses scatter by 1e-3 around the truth, ours `error` times as far; eager's first draw happens to be right."""

    class Loss(Trial):
        def run(self, scale: float, rows: int) -> Iterator[Compared]:
            generator = torch.Generator().manual_seed(self.seed)
            ours, eager = torch.randn(2, 1, generator=generator, dtype=torch.float64) * 1e-3
            truth = torch.ones(1, dtype=torch.float64)
            eager = truth + (eager if self.seed != Trial.seed else 0)
            yield Compared("loss", (truth + error * ours).float(), eager.float(), truth)

    trial = Loss(None, None, torch.device("cpu"), {})  # type: ignore[arg-type]
    verdict = judged(("one number", error), lambda: iter([trial]), torch.device("cpu"), "fast")
    assert (not verdict.reason) == accepted, verdict


@pytest.mark.parametrize(("asked", "most", "least", "largest"), [(256, 1 << 30, 200, 300), (37, 1 << 30, 30, 45), (256, 6, 6, 7)])
@pytest.mark.parametrize("name", ["rms_norm", "loss"])
def test_a_trial_has_about_as_many_rows_as_it_is_asked_for(name: str, asked: int, most: int, least: int, largest: int) -> None:
    site = SITES[name]()
    graph = SiteGraph(site.region, site.differentiable)
    (result, *_) = Trial(graph, site.program, torch.device("cpu"), {}, most_rows=most).run(1.0, asked)
    assert least <= result.truth.numel() // (48 if name == "rms_norm" else 1) <= largest
