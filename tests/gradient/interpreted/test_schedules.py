"""Every schedule, over shapes, strides, dtypes, scales and configurations: as right as eager against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.dataflow import Dataflow
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.launch import Prepared
from fxfuse.program import Program
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME, CASES

DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
SCALES = st.sampled_from([1e-3, 1.0, 1e3])


def kinds(program: Program) -> list[str]:
    """The schedules that can hold a program."""
    summed = any(o.sums_rows for o in program.outputs)
    flow = Dataflow(program)
    found = ["rows"]
    if len(program.axes) == 1 and not flow.has_reductions:
        found.append("tiled")
    return found if summed and len(program.axes) > 1 else [*found, "looped"]


def laid_out(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values lying differently in memory: sliced from something larger, misaligned, transposed, or with strided columns."""
    way = draw(st.sampled_from(["dense", "dense", "rows apart", "misaligned", "transposed", "columns apart", "reversed dims"]))
    if way == "rows apart":
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=tensor.dtype)
        return wide[..., 2:2 + tensor.shape[-1]].copy_(tensor)
    if way == "misaligned":
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    if way == "transposed" and tensor.dim() > 2:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if way == "columns apart":
        return torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)[..., 1].copy_(tensor)
    if way == "reversed dims":
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    return tensor


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"functions"}))
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), dtype=DTYPES, scale=SCALES, seed=st.integers(0, 2**20))
def test_a_kernel_is_as_right_as_eager(name: str, data: st.DataObject, dtype: str, scale: float, seed: int) -> None:
    case, draw = BY_NAME[name], data.draw
    program = case.program(dtype)
    leading = tuple(draw(st.integers(1, 5 if program.rank > 1 else 20)) for _ in range(program.rank))
    torch.manual_seed(seed)
    columns = dict(program.axes).get("a") or draw(st.integers(1, 70))
    tensors = [laid_out(draw, t) for t in case.inputs(program, leading, columns, scale)]
    kind = draw(st.sampled_from([None, *kinds(program)]))
    config = None
    if kind is not None:
        rows = 1 if kind == "looped" else draw(st.sampled_from([1, 2, 4]))
        config = Config(rows, draw(st.sampled_from([8, 32, 64])), 4, per_unit=draw(st.sampled_from([1, 3])),
                        reload=draw(st.booleans()), hints=draw(st.sampled_from(["", "loads", "all"])), early=draw(st.booleans()))
    assert not failures(program, tensors, Prepared(program, kind, config)(tensors))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_every_function_is_as_right_as_eager(scale: float) -> None:
    case = BY_NAME["functions"]
    program = case.program("float32")
    tensors = case.inputs(program, (40,), 50, scale)
    assert not failures(program, tensors, Prepared(program)(tensors))


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("packed_swiglu", "cross_entropy", "smoothed_cross_entropy",
                                                                       "cross_entropy_backward")], ids=lambda c: c.name)
def test_nan_and_infinities_go_where_they_go_in_eager(case) -> None:
    program = case.program("float32")
    for kind in kinds(program):
        leading = (6,) if program.rank == 1 else (2, 2, 3)
        tensors = case.inputs(program, leading, 24, 1.0)
        first = next(t for t, a in zip(tensors, program.arguments, strict=True) if all(a.rows) and a.columns is not None)
        poisoned = first.view(-1, first.shape[-1])
        poisoned[0, 3], poisoned[2, 5], poisoned[4, 1] = float("nan"), float("inf"), float("-inf")
        for reload in (False, True) if kind == "rows" else (False,):
            config = Config(1 if kind == "looped" else 2, 8, 4, reload=reload)
            assert not failures(program, tensors, Prepared(program, kind, config)(tensors)), kind


@pytest.mark.parametrize("kind", ["rows", "looped"])
@pytest.mark.parametrize("name", ["cross_entropy", "shifted_cross_entropy"])
def test_exponentials_of_infinities(name: str, kind: str) -> None:
    program = BY_NAME[name].program("float32")
    x = torch.randn(5, 20)
    x[0] = float("-inf")
    x[1, 3] = float("inf")
    x[2, :17] = float("-inf")
    x[3] = 1e4
    x[4, 0], x[4, 19] = float("nan"), float("inf")
    tensors = [x, torch.tensor([[0], [1], [18], [2], [-100]]), torch.randn(20)][:len(program.arguments)]
    for block in (4, 8, 16, 32):
        assert not failures(program, tensors, Prepared(program, kind, Config(1, block, 4))(tensors)), block


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]), seed=st.integers(0, 2**20))
def test_a_maximum_and_the_sums_it_shifts_are_found_in_one_walk(data: st.DataObject, scale: float, seed: int) -> None:
    """Whatever the order in which a row rises, and wherever it holds infinities; rows of -inf alone are NaN, as in eager."""
    torch.manual_seed(seed)
    name = data.draw(st.sampled_from(["shifted_softmax", "shifted_cross_entropy"]))
    program, columns = BY_NAME[name].program("float32"), data.draw(st.integers(1, 90))
    tensors = BY_NAME[name].inputs(program, (12,), columns, scale)
    order = data.draw(st.sampled_from(["random", "rising", "falling"]))
    if order != "random":
        tensors[0] = tensors[0].sort(dim=-1, descending=order == "falling").values.contiguous()
    tensors[0][torch.rand(tensors[0].shape) < data.draw(st.sampled_from([0.0, 0.3, 0.95]))] = float("-inf")
    if data.draw(st.booleans()):
        tensors[0][5, data.draw(st.integers(0, columns - 1))] = float("inf")
    prepared = Prepared(program, "looped", Config(1, data.draw(st.sampled_from([4, 8, 32, 64])), 4))
    assert not failures(program, tensors, prepared(tensors))


@pytest.mark.parametrize(("name", "walks"), [("shifted_cross_entropy", 1), ("shifted_softmax", 2), ("cross_entropy", 1)])
def test_how_often_a_long_row_is_read(name: str, walks: int) -> None:
    program = BY_NAME[name].program("float32")
    prepared = Prepared(program, "looped", Config(1, 8, 4))
    prepared(BY_NAME[name].inputs(program, (3,), 64, 1.0))
    made, = prepared.launches.values()
    assert made.variant.source.count("for start in") == walks
