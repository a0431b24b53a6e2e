"""Every spelling becomes the same canonical operations, and computes the same bits and gradients."""

from __future__ import annotations

import operator
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

sys.path.insert(0, str(Path(__file__).parent))
from canonical_checks import assert_canonicalization_changes_nothing, capture, targets

from fxfuse.canonical import canonicalize
from fxfuse.canonical.facts import module_path, requires_grad, user_line
from fxfuse.leaf_modules import open_leaf_modules
from fxfuse.tracing import trace_function

CAST = "to.dtype"

ONE_OPERAND = [
    (["pow.Tensor_Scalar"], [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, 2), lambda x: x.square(), torch.square,
                             lambda x: operator.pow(x, 2)]),
    (["rsqrt.default"], [torch.rsqrt, lambda x: x.rsqrt()]),
    (["sqrt.default", "reciprocal.default"], [lambda x: 1 / torch.sqrt(x), lambda x: 1.0 / x.sqrt(),
                                              lambda x: x.sqrt().reciprocal()]),
    (["reciprocal.default", "mul.Tensor"], [lambda x: 3.0 / x]),
    (["neg.default"], [lambda x: -x, torch.neg, lambda x: x.negative()]),
    (["add.Tensor"], [lambda x: x + 1.5, lambda x: 1.5 + x, lambda x: torch.add(x, 1.5), lambda x: x.add(1.5)]),
    (["sub.Tensor"], [lambda x: x - 1.5, lambda x: torch.sub(x, 1.5), lambda x: 1.5 - x, lambda x: torch.rsub(x, 1.5)]),
    (["mul.Tensor"], [lambda x: x * 1.5, lambda x: 1.5 * x, lambda x: x.multiply(1.5)]),
    (["div.Tensor"], [lambda x: x / 1.5, lambda x: torch.div(x, 1.5), lambda x: x.true_divide(1.5)]),
    (["sigmoid.default"], [torch.sigmoid, lambda x: x.sigmoid(), F.sigmoid, torch.special.expit]),
    (["tanh.default"], [torch.tanh, F.tanh, lambda x: x.tanh()]),
    (["silu.default"], [F.silu, nn.SiLU()]),
    (["mul.Tensor", "silu.default"], [lambda x: F.silu(x * 3, inplace=True), lambda x: nn.SiLU(inplace=True)(x * 3)]),
    (["mul.Tensor", "relu.default"], [lambda x: (x * 3).relu_(), lambda x: F.relu(x * 3, True), lambda x: F.relu_(x * 3)]),
    (["relu.default"], [F.relu, torch.relu, lambda x: x.relu(), nn.ReLU()]),
    (["gelu.default"], [F.gelu, lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")]),
    (["softplus.default"], [F.softplus, lambda x: F.softplus(x, 2.0, 16.0)]),
    (["clamp.default"], [lambda x: x.clamp(-1, 1), lambda x: torch.clamp(x, max=1.0), lambda x: x.clamp_min(0.5),
                         lambda x: torch.clip(x, 0, 1)]),
    (["exp.default"], [torch.exp, lambda x: x.exp()]),
    (["abs.default"], [torch.abs, abs, lambda x: x.absolute()]),
    (["log1p.default"], [torch.log1p]),
    (["expm1.default"], [torch.expm1, torch.special.expm1]),
    (["erf.default"], [torch.erf, torch.special.erf]),
    (["mean.dim"], [lambda x: x.mean(-1, keepdim=True), lambda x: torch.mean(x, dim=[-1], keepdim=True), lambda x: x.mean(2, True)]),
    (["sum.dim_IntList"], [lambda x: x.sum(-1), lambda x: torch.sum(x, 2), lambda x: x.sum(dim=(-1,))]),
    (["var.dim"], [lambda x: x.var(-1, unbiased=False), lambda x: torch.var(x, -1, correction=0), lambda x: x.var(-1, keepdim=True)]),
    (["amax.default"], [lambda x: x.amax(-1, True), lambda x: x.detach().max(-1)[0],
                        lambda x: x.detach().max(-1, keepdim=True).values]),
    (["logsumexp.default"], [lambda x: x.logsumexp(-1), lambda x: torch.logsumexp(x, 2)]),
    (["linalg_vector_norm.default"], [lambda x: x.norm(dim=-1), lambda x: torch.linalg.norm(x, dim=-1), lambda x: x.norm(2, -1, True),
                                      lambda x: torch.linalg.vector_norm(x, dim=-1)]),
    (["linalg_vector_norm.default", "clamp.default", "div.Tensor"], [lambda x: F.normalize(x, dim=-1),
                                                                     lambda x: F.normalize(x, 2.0, 2)]),
    (["softmax.int"], [lambda x: F.softmax(x, dim=-1), lambda x: x.softmax(-1), lambda x: torch.softmax(x, 2), nn.Softmax(-1)]),
    (["log_softmax.int"], [lambda x: F.log_softmax(x, -1), lambda x: x.log_softmax(dim=-1)]),
    (["rms_norm.default"], [lambda x: F.rms_norm(x, (8,)), lambda x: torch.rms_norm(x, (8,), None, 1e-5),
                            lambda x: nn.RMSNorm(8)(x)]),
    (["layer_norm.default"], [lambda x: F.layer_norm(x, (8,)), lambda x: torch.layer_norm(x, [8], eps=1e-6)]),
    (["gt.Scalar", "where.ScalarOther"], [lambda x: torch.where(x > 0, x, 0.0), lambda x: x.where(x.gt(0), 0.0)]),
    (["gt.Scalar", "where.ScalarSelf"], [lambda x: x.masked_fill(x > 0, 1.0)]),
    (["mul.Tensor", "gt.Scalar", "where.ScalarSelf"], [lambda x: (x * 3).masked_fill_(x > 0, 1.0)]),
    (["lt.Scalar", "gt.Scalar", "logical_and.default"], [lambda x: (x < 1) & (x > 0), lambda x: torch.logical_and(x < 1, x > 0)]),
    (["reshape.default"], [lambda x: x.view(6, 8), lambda x: x.reshape((-1, 8)), lambda x: x.flatten(0, 1),
                           lambda x: x.view(-1, x.size(-1)),
                           lambda x: x.unflatten(-1, (2, 4))]),
    (["permute.default"], [lambda x: x.transpose(1, 2), lambda x: x.permute(0, 2, 1), lambda x: x.mT, lambda x: x.movedim(1, -1),
                           lambda x: torch.swapaxes(x, -1, 1)]),
    (["unsqueeze.default"], [lambda x: x.unsqueeze(1), lambda x: x[:, None], lambda x: x[..., None], lambda x: x[:, None, :, :]]),
    (["slice.Tensor"], [lambda x: x[..., :4], lambda x: x[:, :, 0:4], lambda x: x[..., 1::2], lambda x: x.narrow(-1, 2, 3),
                        lambda x: x[:, 1:],
                        lambda x: x.chunk(2, -1)[0], lambda x: x.split([3, 5], dim=2)[1], lambda x: x[..., -3:],
                                          lambda x: x[:, :-1]]),
    (["slice.Tensor", "slice.Tensor", "mul.Tensor"], [lambda x: operator.mul(*x.chunk(2, -1)),
                                                      lambda x: operator.mul(*torch.split(x, 4, -1)),
                                                      lambda x: x[..., :4] * x[..., 4:]]),
    (["select.int"], [lambda x: x[0], lambda x: x[:, 1], lambda x: x[..., -1], lambda x: x.select(1, 0)]),
    (["unsqueeze.default", "squeeze.dim", "expand.default"], [lambda x: x[:, None].squeeze(1).expand(4, -1, -1, -1)]),
    (["neg.default", "stack.default"], [lambda x: torch.stack([x, -x], -1), lambda x: torch.stack((x, -x), dim=3)]),
    (["repeat_interleave.self_int"], [lambda x: x.repeat_interleave(2, -1), lambda x: torch.repeat_interleave(x, 2, 2)]),
    (["cat.default"], [lambda x: torch.cat((x, x), -1), lambda x: torch.concat([x, x], dim=2),
                       lambda x: torch.cat([x, x, x[..., 8:]], 2)]),
    (["mul.Tensor"], [lambda x: F.dropout(x.contiguous().to(x.dtype)[:, 0:].view(2, 3, 8) * 1.0 + 0, 0.0) * 3]),
]  # fmt: skip
CASES = [pytest.param(words, f, id=f"{'+'.join(words)}-{i}") for words, fs in ONE_OPERAND for i, f in enumerate(fs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("words", "function"), CASES)
def test_a_spelling_becomes_its_words(words: list[str], function, dtype: torch.dtype) -> None:
    x = (torch.rand(2, 3, 8) + 0.1).to(dtype).requires_grad_()
    gm = trace_function(function, x)
    assert_canonicalization_changes_nothing(gm, [x])
    assert [word for word in targets(gm) if word != "detach"] == words
    once = targets(gm)
    assert targets(canonicalize(gm)) == once, "a canonical graph is canonical"


CASTS = [
    lambda x: x.to(torch.bfloat16), lambda x: x.to(dtype=torch.bfloat16), lambda x: x.bfloat16(), lambda x: x.type(torch.bfloat16),
    lambda x: x.to("cpu", torch.bfloat16), lambda x: x.to(device="cpu", dtype=torch.bfloat16),
                   lambda x: x.to(torch.ones((), dtype=torch.bfloat16)),
    lambda x: x.to(torch.bfloat16, memory_format=torch.contiguous_format),
                   lambda x: x.type_as(torch.ones((), dtype=torch.bfloat16)), lambda x: x.to(torch.bfloat16, copy=True),
]  # fmt: skip


@pytest.mark.parametrize("function", CASTS)
def test_every_cast_is_one_word(function) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    gm = assert_canonicalization_changes_nothing(trace_function(function, x), [x])
    assert targets(gm) == [CAST]


@pytest.mark.parametrize("function", [lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.type_as(x),
lambda x: x.to("cpu"),
                                      lambda x: x.contiguous(), lambda x: x[..., :8], lambda x: x.expand(3, 8)])  # fmt: skip
def test_what_changes_nothing_is_dropped(function) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    gm = assert_canonicalization_changes_nothing(trace_function(lambda x: function(x * 2) * 3, x), [x])
    assert targets(gm) == ["mul.Tensor", "mul.Tensor"]


LEFT_ALONE = {
    "sum over the first dimension": (lambda x: x.sum(0), "sum"),
    "alpha rounds once": (lambda x: torch.add(x, x, alpha=2.0), "add"),
    "random": (lambda x: F.dropout(x, 0.5), "dropout"),
    "integer division": (lambda x: torch.div(x, 2, rounding_mode="floor"), "div"),
    "tensor exponent": (lambda x: torch.pow(x, x.abs()), "pow"),
    "place of the maximum": (lambda x: x.max(-1)[1], "max"),
    "gradient of the maximum": (lambda x: x.max(-1)[0], "max"),
    "indexed by a tensor": (lambda x: x[torch.tensor([0, 1])], "getitem"),
    "one norm": (lambda x: F.normalize(x, 1.0, -1), "normalize"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_has_no_word_is_left_as_it_was(name: str) -> None:
    function, target = LEFT_ALONE[name]
    x = torch.randn(3, 8, requires_grad=True)
    gm = assert_canonicalization_changes_nothing(trace_function(function, x), [x])
    assert target in targets(gm)


def test_a_method_that_somebody_replaced_is_not_read_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: x.sigmoid() * 2, raising=False)
    x, graph = torch.randn(2, 3, 8), torch.fx.Graph()
    graph.output(graph.call_method("softmax", (graph.placeholder("x"), -1)))
    for node in graph.nodes:
        node.meta["example_value"] = x
    torch.testing.assert_close(canonicalize(torch.fx.GraphModule(nn.Module(), graph))(x), x.sigmoid() * 2)


@pytest.mark.parametrize(("reduction", "enum"), [("none", 0), ("mean", 1), ("sum", 2)])
def test_cross_entropy_is_bound_by_its_signature(reduction: str, enum: int) -> None:
    x, y = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 1, -100, 3, 4, 7])
    by_name = trace_function(lambda x, y: F.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1), x, y)
    by_place = trace_function(lambda x, y: F.cross_entropy(x, y, None, None, -100, None, reduction, 0.1), x, y)
    for gm in (by_name, by_place):
        assert_canonicalization_changes_nothing(gm, [x, y])
        (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
        assert node.args[2:] == (None, enum, -100, 0.1)


def softcapped_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.tanh(F.linear(hidden, weight) / 30.0) * 30.0
    return F.cross_entropy(logits.float().view(-1, 16), labels.view(-1), ignore_index=-100)


def test_views_of_rows_move_above_the_softcap() -> None:
    inputs = [torch.randn(2, 3, 8, requires_grad=True).bfloat16(), torch.randn(16, 8, requires_grad=True).bfloat16(),
              torch.randint(0, 16, (2, 3))]
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    gm = assert_canonicalization_changes_nothing(trace_function(softcapped_loss, *inputs), inputs)
    words = [word for word in targets(gm) if word != "reshape.default"]
    assert words == ["linear", "div.Tensor", "tanh.default", "mul.Tensor", CAST, "cross_entropy_loss.default"]
    assert targets(gm)[1] == "reshape.default"


def test_views_of_rows_move_above_what_reads_one_tensor_twice() -> None:
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(hidden, weight)
        return (z / (z.abs() / 20.0 + 1.0)).view(-1, 16).exp()

    inputs = [torch.randn(2, 3, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)]
    gm = assert_canonicalization_changes_nothing(trace_function(head, *inputs), inputs)
    assert targets(gm) == ["linear", "reshape.default", "abs.default", "div.Tensor", "add.Tensor", "div.Tensor", "exp.default"]


def test_a_view_of_what_reads_two_tensors_stays() -> None:
    def sizes(hidden: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(hidden, weight)
        return (z / (hidden.abs() + 1.0)).view(-1, 8)

    inputs = [torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    gm = assert_canonicalization_changes_nothing(trace_function(sizes, *inputs), inputs)
    assert targets(gm)[-2:] == ["div.Tensor", "reshape.default"]


def test_logits_that_are_returned_keep_their_shape() -> None:
    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tanh(F.linear(hidden, weight) / 30.0) * 30.0
        return F.cross_entropy(logits.view(-1, 16), labels.view(-1)), logits

    inputs = [torch.randn(2, 3, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True), torch.randint(0, 16, (2, 3))]
    gm = assert_canonicalization_changes_nothing(trace_function(head, *inputs), inputs)
    assert targets(gm)[:2] == ["linear", "reshape.default"]


def test_a_view_after_a_norm_stays_after_it() -> None:
    def norm_then_rows(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).type_as(x).view(-1, 8)

    inputs = [torch.randn(2, 3, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)]
    gm = assert_canonicalization_changes_nothing(trace_function(norm_then_rows, *inputs), inputs)
    assert targets(gm)[-2:] == [CAST, "reshape.default"]


def test_a_complex_rotation_becomes_real_lanes() -> None:
    def rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs[None, None]).flatten(3).type_as(x)

    x = torch.randn(2, 4, 32, 16, requires_grad=True)
    freqs = torch.polar(torch.ones(32, 8), torch.randn(32, 8))
    gm = assert_canonicalization_changes_nothing(trace_function(rotate, x, freqs), [x, freqs])
    assert {"view_as_complex", "mul"}.isdisjoint(targets(gm))
    assert [n.args[1:] for n in gm.graph.nodes if str(n.target) == "aten.slice.Tensor"] == [(-1, 0, 16, 2), (-1, 1, 16, 2)]


# In-place operations


def test_an_in_place_operation_is_seen_through_the_old_name() -> None:
    def f(x: Tensor, b: Tensor) -> Tensor:
        v = x * 2
        v.add_(b)
        v += 1
        v[..., 1:3] = b[1:3]
        v.clamp_(max=2.0).mul_(0.5)
        return F.silu(v, inplace=True) * v

    (gm, inputs), = capture(f, torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    assert not any(word.endswith("_") or word in ("iadd", "setitem") for word in targets(gm))
    assert "slice_scatter.default" in targets(gm)


def test_a_low_precision_accumulator_stays_as_it_was() -> None:
    def f(x: Tensor, b: Tensor) -> Tensor:
        v = x * 2
        v += b
        return v * 3

    (gm, inputs), = capture(f, torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    assert targets(gm) == ["mul.Tensor", "iadd", "mul.Tensor"]


def silu_by_place(x: Tensor, b: Tensor) -> Tensor:
    v = x * b
    F.silu(v, True)
    F.dropout(v, 0.5, True, True)
    return v * b


def test_in_place_by_position() -> None:
    (gm, inputs), = capture(silu_by_place, torch.randn(3, 8, requires_grad=True), torch.randn(8))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    assert targets(gm) == ["mul.Tensor", "silu.default", "dropout", "mul.Tensor"]


def written_input(x: Tensor, b: Tensor) -> Tensor:
    b.add_(1)
    return x * b


def read_through_an_earlier_view(x: Tensor, b: Tensor) -> Tensor:
    v = x * 2
    rows = v.view(-1)
    v.add_(b)
    return rows * 3


def read_before_and_after(x: Tensor, b: Tensor) -> Tensor:
    v = x.detach() * 2
    before = v + 1
    v.add_(b.detach())
    return before * (v + 1) * x


@pytest.mark.parametrize("function", [written_input, read_through_an_earlier_view])
def test_a_write_that_somebody_sees_stays(function) -> None:
    (gm, inputs), = capture(function, torch.randn(3, 8, requires_grad=True), torch.randn(8))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    assert "add_" in targets(gm)


def test_equal_reads_around_a_write_are_not_shared() -> None:
    (gm, inputs), = capture(read_before_and_after, torch.randn(3, 8, requires_grad=True), torch.randn(8))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)


def test_a_copy_that_is_given_out_is_kept() -> None:
    (gm, inputs), = capture(lambda x: (x.clone(), x * 2), torch.randn(3, 8, requires_grad=True))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    assert "clone.default" in targets(gm)


# Autocast, checkpoints, other tracers, facts


def test_casts_that_autocast_makes_become_nodes() -> None:
    linear = nn.Linear(8, 8)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = linear(x)
            return F.mse_loss(h, h.detach()) + (h * x).sum(-1).mean()

    (gm, inputs), = capture(f, torch.randn(3, 8, requires_grad=True))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)


def test_checkpoint_bodies_are_canonical_too() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda h: h * h.sigmoid() + 1, x, use_reentrant=False)

    (gm, inputs), = capture(f, torch.randn(3, 8, requires_grad=True))  # fmt: skip
    assert_canonicalization_changes_nothing(gm, inputs)
    (body,) = [m for m in gm.children() if isinstance(m, torch.fx.GraphModule)]
    assert targets(body) == ["sigmoid.default", "mul.Tensor", "add.Tensor"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return self.act(gate) * up + x


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (torch.randn(2, 3, 8),)).module()],
                         ids=["symbolic_trace", "export"])  # fmt: skip
def test_graphs_of_other_tracers(trace) -> None:
    x = torch.randn(2, 3, 8)
    gm = trace(Block())
    open_leaf_modules(gm)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    assert_canonicalization_changes_nothing(gm, [x])
    words = [w for w in targets(gm) if w not in ("up", "linear.default", "_guards_fn")]
    assert words == ["layer_norm.default", "slice.Tensor", "slice.Tensor", "gelu.default", "mul.Tensor", "add.Tensor"]


def test_new_nodes_keep_the_facts_of_the_old_ones() -> None:
    (gm, _), = capture(Block(), torch.randn(2, 3, 8, requires_grad=True))  # fmt: skip
    canonicalize(gm)
    (gelu,) = [n for n in gm.graph.nodes if str(n.target) == "aten.gelu.default"]
    assert module_path(gelu) == "act"
    assert "self.act(gate)" in user_line(gelu) or "gelu" in user_line(gelu)
    assert requires_grad(gelu)
    assert all("example_value" in n.meta for n in gm.graph.nodes if n.op == "call_function")


def test_symbolic_sizes_add_no_guard() -> None:
    def f(x: Tensor) -> Tensor:
        b, s, d = x.shape
        q = x.view(b, s, 2, d // 2).transpose(1, 2)
        a, c = q[..., :2], q[..., 2:]
        return torch.cat((-c, a), -1).transpose(1, 2).reshape(b, s, -1).float().view(-1, d)[1:]

    x = torch.randn(3, 5, 8, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    (gm, inputs), = capture(f, x)  # fmt: skip
    mode = next(n.meta["example_value"].fake_mode for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), Tensor))
    before = len(mode.shape_env.guards)
    assert_canonicalization_changes_nothing(gm, inputs)
    assert len(mode.shape_env.guards) == before
    assert "neg.default" in targets(gm)


def test_a_graph_that_says_nothing_of_gradients_may_need_them() -> None:
    gm = torch.fx.symbolic_trace(lambda x: (x.max(-1)[0], (x * 2).sin() + (x * 2).cos()))
    x = torch.tensor([[1.0, 2.0, 2.0]], requires_grad=True)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    assert_canonicalization_changes_nothing(gm, [x])
    assert "max" in targets(gm)
    assert targets(gm).count("mul.Tensor") == 2
