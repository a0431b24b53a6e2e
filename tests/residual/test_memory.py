"""The floors: what a captured graph keeps for its backward, at the sizes of an 8B model, in bfloat16, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import aot
from fxfuse.backend import Backend
from fxfuse.fake_model import fake_mode
from fxfuse.memory.recompute import RECOMPUTED
from tests.saved_storages import saved_storages

TOKENS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD = 8192, 4096, 14336, 32, 8, 128
MIB = 2**20


def kept_mib(function: Callable[..., Tensor], *inputs: Tensor) -> float:
    """MiB of the distinct storages that autograd keeps, beyond inputs, parameters and outputs."""
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    with saved_storages([*inputs, *parameters]) as saved:
        function(*inputs)
    return saved.bytes() / MIB


def fused(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return torch.compile(function, backend=Backend(validate="off", strict=True, remainder="eager", **options), fullgraph=True)


class RMSNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class NormedLinear(nn.Module):
    """The consumer of a norm keeps its output, unless it can be had again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = RMSNorm(), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class ResidualNorm(NormedLinear):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = x + r
        return h, self.linear(self.norm(h))


class GatedMLP(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class QKNormRope(nn.Module):
    """Normed and rotated queries and keys, of attention that keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(HEAD), RMSNorm(HEAD)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = self.rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return torch.matmul(q, k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2)[..., :HEAD])


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Fake tensors, bfloat16 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield fake_mode()
    torch.set_default_dtype(before)


def data(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)


def test_norm_keeps_one_number_a_row(fake: FakeTensorMode) -> None:
    with fake:
        module, x = NormedLinear(), data(TOKENS, WIDTH)
        assert kept_mib(module, x) >= 192
        assert kept_mib(fused(module), x) == TOKENS * 4 / MIB


def test_residual_norm_keeps_the_new_residual(fake: FakeTensorMode) -> None:
    with fake:
        module, x, r = ResidualNorm(), data(TOKENS, WIDTH), data(TOKENS, WIDTH)
        assert kept_mib(module, x, r) >= 192
        assert kept_mib(fused(module), x, r) == 64 + TOKENS * 4 / MIB


@pytest.mark.parametrize("act", [F.silu, F.gelu, lambda z: F.gelu(z, approximate="tanh")], ids=["silu", "gelu", "gelu_tanh"])
def test_gated_mlp_keeps_gate_and_up(fake: FakeTensorMode, act: Callable[[Tensor], Tensor]) -> None:
    with fake:
        module, x = GatedMLP(act), data(TOKENS, WIDTH)
        assert kept_mib(module, x) == 896
        assert kept_mib(fused(module), x) == 448
        assert kept_mib(fused(module, plan="save"), x) == 672


def test_qk_norm_and_rope_keep_statistics_of_the_heads(fake: FakeTensorMode) -> None:
    with fake:
        module = QKNormRope()
        q, k = data(1, TOKENS, HEADS, HEAD), data(1, TOKENS, KV_HEADS, HEAD)
        cos, sin = data(1, 1, TOKENS, HEAD).detach(), data(1, 1, TOKENS, HEAD).detach()
        floor = TOKENS * (HEADS + KV_HEADS) * 4 / MIB
        assert kept_mib(module, q, k, cos, sin) > 241
        assert kept_mib(fused(module), q, k, cos, sin) <= floor + 64  # and the repeated keys, which eager keeps too


class Stream(nn.Module):
    """A residual stream of normed branches: every sum could be had again from the one before, and so from the first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm() for _ in range(layers))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + norm(linear(F.silu(x) * 2))
        return x


def test_recomputation_does_not_run_through_a_whole_model(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    split = aot.min_cut_partition
    monkeypatch.setattr(aot, "min_cut_partition", lambda *a, **k: graphs.append((pair := split(*a, **k))[1]) or pair)
    with fake:
        fused(Stream(9))(data(TOKENS, WIDTH))
    depth: dict[torch.fx.Node, int] = {}
    for node in graphs[0].graph.nodes:
        before = max((depth[operand] for operand in node.all_input_nodes), default=0)
        depth[node] = before + (RECOMPUTED in node.meta)
    assert 0 < max(depth.values()) <= 2


def test_no_matmul_or_attention_is_computed_twice(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    split = aot.min_cut_partition
    monkeypatch.setattr(aot, "min_cut_partition", lambda *a, **k: graphs.extend(pair := split(*a, **k)) or pair)
    with fake:
        fused(GatedMLP())(data(TOKENS, WIDTH))
    forward, backward = ([str(node.target) for node in gm.graph.nodes].count("aten.mm.default") for gm in graphs)
    assert (forward, backward) == (3, 6)


def test_a_recomputed_product_and_its_adjoint_are_one_pass(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[int] = []
    merge = aot.merge_recomputed
    monkeypatch.setattr(aot, "merge_recomputed", lambda gm: merged.append(merge(gm)))
    with fake:
        fused(GatedMLP())(data(TOKENS, WIDTH))
        fused(NormedLinear())(data(TOKENS, WIDTH))
    assert merged == [1, 1]
