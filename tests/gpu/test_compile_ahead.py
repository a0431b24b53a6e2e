"""What other processes compiled is what Triton loads here; without them nothing changes but the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import nn

import fxfuse
from fxfuse.kernels import tuning, workers
from fxfuse.kernels.launch import Prepared
from tests.kernel_judge import failures
from tests.kernel_programs import BY_NAME


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing has been compiled before this file; its tests share the processes, which take seconds to start."""
    cached = workers._pool, workers._folder
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FXFUSE_CACHE_DIR", str(tmp_path_factory.mktemp("fxfuse")))
        patched.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        patched.setattr(workers, "count", lambda: 6)
        for function in cached:
            function.cache_clear()
        yield
        workers._pool().shutdown()
        for function in cached:
            function.cache_clear()


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "_pending", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._stored.cache_clear()
    yield
    tuning._stored.cache_clear()


@pytest.mark.parametrize(("name", "columns", "autotune"), [
    ("rms_norm", 4096, "0"), ("rms_norm_backward", 4096, "0"), ("layer_norm_backward", 4096, "0"), ("swiglu", 4096, "0"),
    ("rms_norm", 2048, "1"), ("layer_norm_backward", 2048, "1"), ("softmax", 2048, "1")])
def test_a_launch_loads_what_was_compiled_ahead(name: str, columns: int, autotune: str, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_AUTOTUNE", autotune)
    monkeypatch.setenv("FXFUSE_TUNING_PATIENCE", "inf")
    program = BY_NAME[name].program("bfloat16")
    tensors = [t.cuda() for t in BY_NAME[name].inputs(program, (2048,), columns, 1.0)]
    forms = [torch.empty_like(t, device="meta") for t in tensors]
    before = len(list(workers._folder().iterdir()))
    Prepared(program).compile_ahead(forms, None, tensors[0].device)
    assert workers._pending
    for future in workers._pending.values():
        future.result()
    assert len(list(workers._folder().iterdir())) == before + len(workers._pending), "some were not compiled: see the log"
    with monkeypatch.context() as patched:
        patched.setattr(triton.compiler.compiler.ASTSource, "make_ir", lambda *_, **__: pytest.fail("compiled in this process"))
        results = Prepared(program)(tensors)
    assert not failures(program, tensors, results)


class Block(nn.Module):
    """A norm and a gate around a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(1024, eps=1e-6)
        self.up = nn.Linear(1024, 2048, bias=False)
        self.down = nn.Linear(1024, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def step(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.backward(torch.randn_like(y))
    return [y, x.grad, *(p.grad for p in model.parameters())]


def test_a_model_computes_the_same_with_and_without_processes(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")
    found = []
    for count in (6, 0):
        monkeypatch.setattr(workers, "count", lambda count=count: count)
        if not count:
            monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
        torch.manual_seed(0)
        model = fxfuse.optimize(nn.Sequential(Block(), Block()).cuda().bfloat16())
        found.append(step(model))
        fxfuse.report(model).assert_fused("rms_norm")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
