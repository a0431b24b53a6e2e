"""Of a 4-bit linear nothing is kept for the backward: the dequantized weight lives while its product runs, and no longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import aot, quantized_op
from fxfuse.backend import Backend
from fxfuse.fake_model import fake_mode
from fxfuse.quantized_op import is_dequantization
from tests.model.quantized_models import in_4bit
from tests.saved_storages import saved_storages

bnb = pytest.importorskip("bitsandbytes")
TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336
MIB = 2**20


def fused(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    settings = {"remainder": "eager", **options}
    return torch.compile(function, backend=Backend(validate="off", strict=True, **settings), fullgraph=True, dynamic=True)


class Stack(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The forward and backward graphs as the partitioner gives them."""
    graphs: list[torch.fx.GraphModule] = []
    original = aot.min_cut_partition
    monkeypatch.setattr(aot, "min_cut_partition", lambda *a, **k: graphs.extend(pair := original(*a, **k)) or pair)
    return graphs


def saved(forward: torch.fx.GraphModule, outputs: int = 1) -> list[torch.fx.Node]:
    return [node for node in list(forward.graph.output_node().args[0])[outputs:] if isinstance(node, torch.fx.Node)]


@pytest.mark.parametrize("plan", ["none", "save"])
def test_the_packed_weight_is_what_is_saved(plan: str, split: list[torch.fx.GraphModule]) -> None:
    module, x = in_4bit(Stack(), torch.float32), torch.randn(4, 128, requires_grad=True)
    fused(module, plan=plan)(x).sum().backward()
    forward, backward = split
    assert sum(map(is_dequantization, forward.graph.nodes)) == 2
    assert sum(map(is_dequantization, backward.graph.nodes)) == 2
    tensors = [node for node in saved(forward) if isinstance(node.meta["val"], Tensor)]
    assert all(node.op == "placeholder" or node.meta["val"].shape[-1] != 128 for node in tensors)
    assert not any(is_dequantization(node) or node.meta["val"].shape in ((256, 128), (128, 256)) for node in tensors)
    assert sum(node.meta["val"].dtype == torch.uint8 for node in tensors) == 4  # two packed weights, two sets of scales


def test_with_inductor_too(split: list[torch.fx.GraphModule]) -> None:
    module, x = in_4bit(Stack(), torch.float32), torch.randn(4, 128, requires_grad=True)
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph is not partitioned again
        fused(module, remainder="inductor")(x).sum().backward()
    forward, _ = split
    assert not any(is_dequantization(node) for node in saved(forward))


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many dequantized weights are alive whenever another has been made."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    original = quantized_op.by_bitsandbytes

    def watched(*arguments: object) -> Tensor:
        weight = original(*arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(weight.untyped_storage()))
        counts.append(sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(quantized_op, "by_bitsandbytes", watched)
    return counts


def test_one_weight_lives_at_a_time(weights: list[int]) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Stack() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return x

    module, x = in_4bit(Deep(), torch.float32), torch.randn(4, 128, requires_grad=True)
    run = fused(module)
    run(x).sum().backward()
    weights.clear()
    y = run(x)
    assert weights == [1] * 6
    y.sum().backward()
    assert weights == [1] * 12


def test_the_backward_can_be_run_again() -> None:
    module, x = in_4bit(Stack(), torch.float32), torch.randn(4, 128, requires_grad=True)
    y = fused(module)(x).sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


# ---- at the sizes of an 8B model, on fake tensors ------------------------------------------------------------


class Packed(nn.Module):
    """A 4-bit linear without numbers."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        blocks = rows * columns // 64
        self.weight = nn.Parameter(torch.empty(rows * columns // 2, 1, dtype=torch.uint8), requires_grad=False)
        state2 = bnb.functional.QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        self.state = bnb.functional.QuantState(
            torch.empty(blocks, dtype=torch.uint8), torch.Size([rows, columns]), None, 64, "nf4", torch.bfloat16,
            torch.empty(()), state2)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x, self.weight, self.state)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = Packed(WIDTH, HIDDEN), Packed(WIDTH, HIDDEN), Packed(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def fake() -> FakeTensorMode:
    return fake_mode()


def test_a_gated_mlp_keeps_gate_and_up(fake: FakeTensorMode) -> None:
    with fake:
        module, x = GatedMLP(), torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        states = [p.state for p in (module.gate, module.up, module.down)]
        scales = [t for s in states for t in (s.absmax, s.offset, s.state2.absmax, s.state2.code)]
        with saved_storages([x, *module.parameters(), *scales]) as saved:
            fused(module)(x)
    assert saved.bytes() / MIB == 2 * TOKENS * HIDDEN * 2 / MIB
