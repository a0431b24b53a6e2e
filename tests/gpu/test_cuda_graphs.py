"""Blocks as CUDA graphs on a GPU: the same bits as launched kernel by kernel, and hardly anything left to launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import _torch
from fxfuse.cuda_graphs import checkpoints
from fxfuse.cuda_graphs.pool import pool_of
from fxfuse.reporting.records import attached
from tests import recorded_steps as scripts
from tests.model.builders import VOCABULARY, causal_lm, with_lora
from tests.recorded_steps import Run, Script, Stack, batch, results, told

DEVICE = torch.device("cuda", 0)
WIDTH, ROWS, LENGTH = 256, 512, 64


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not after each test: the models share their graphs."""


@pytest.fixture(autouse=True, scope="module")
def graphs_shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "RECORDED", True)
        yield
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def stack() -> nn.Module:
    return Stack(WIDTH, 4)


def llama() -> nn.Module:
    return with_lora(causal_lm("llama", layers=3))


def experts() -> nn.Module:
    return with_lora(causal_lm("qwen3_moe", layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16))


def rows(model: nn.Module, index: int, length: int) -> Tensor:
    return model(batch(index, length, WIDTH).to(DEVICE, torch.bfloat16))


def tokens(model: nn.Module, index: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator).to(DEVICE)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def run_of(make: Callable[[], nn.Module], cuda_graphs: bool) -> Run:
    torch.manual_seed(0)
    model = make().to(DEVICE, torch.bfloat16)
    fxfuse.optimize(model, cuda_graphs=cuda_graphs)
    on_rows = isinstance(model, Stack)
    return Run(model, rows if on_rows else tokens, ROWS if on_rows else LENGTH)


@cache
def wanted(make: Callable[[], nn.Module], script: Script) -> list[Tensor]:
    return results(script, run_of(make, cuda_graphs=False))


def replays(model: nn.Module) -> int:
    tallies = {id(t): t for module in model.modules() for record in attached(module) for t in record.reads if hasattr(t, "replayed")}
    return sum(tally.replayed for tally in tallies.values())


def assert_same(make: Callable[[], nn.Module], script: Script) -> nn.Module:
    run = run_of(make, cuda_graphs=True)
    before = replays(run.model)
    ours = results(script, run)
    assert "recording failed" not in told(run.model)
    assert replays(run.model) > before, told(run.model)
    for index, (a, b) in enumerate(zip(ours, wanted(make, script), strict=True)):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, index=index: f"value {index}: {text}")
    return run.model


ON_BLOCKS = [*scripts.ON_ANY_MODEL, scripts.gradient_of_the_input, scripts.skipped_blocks, scripts.checkpointed,
             scripts.checkpointed_twice]


@pytest.mark.parametrize("script", ON_BLOCKS, ids=lambda script: script.__name__)
def test_plain_blocks(script: Script) -> None:
    assert_same(stack, script)


WITH_ADAPTERS = [(llama, scripts.steps), (llama, scripts.accumulated), (experts, scripts.steps), (experts, scripts.lengths)]


@pytest.mark.parametrize(("make", "script"), WITH_ADAPTERS, ids=lambda part: part.__name__)
def test_language_models_with_adapters(make: Callable[[], nn.Module], script: Script) -> None:
    assert_same(make, script)


def test_while_the_device_lags() -> None:
    """The host is steps ahead."""
    run, plain = run_of(stack, cuda_graphs=True), run_of(stack, cuda_graphs=False)
    for index in range(4):
        for one in (run, plain):
            one.step(index)
    torch.cuda._sleep(500_000_000)
    losses = [[one.step(index) for index in range(4, 10)] for one in (run, plain)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_on_another_stream_blocks_are_launched() -> None:
    run = run_of(stack, cuda_graphs=True)
    for index in range(4):
        run.step(index)
    with torch.cuda.stream(torch.cuda.Stream()):
        run.step(4)
    assert "another stream" in told(run.model)


def test_a_step_launches_few_kernels_itself() -> None:
    run = run_of(llama, cuda_graphs=True)
    for index in range(4):
        run.step(index)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.step(4)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaGraphLaunch", 0) == 2 * 3, counts


def allocated() -> int:
    """Bytes, without the workspaces that cuBLAS keeps."""
    gc.collect()
    pool_of(0).forget_unheld()
    _torch.clear_cublas_workspaces()
    return torch.cuda.memory_allocated()


def test_what_checkpointed_blocks_save_is_shared() -> None:
    """Twice as many blocks take as much more memory as their outputs do."""
    kept = []
    for depth in (4, 8):
        before = allocated()
        run = run_of(partial(Stack, WIDTH, depth), cuda_graphs=True)
        for _ in scripts.checkpointed(run):
            pass
        assert replays(run.model) > 0, told(run.model)
        weights = sum(p.nbytes for p in run.model.parameters())
        kept.append(allocated() - before - 2 * weights)  # they have gradients, copied out of recordings that own them
        del run
    outputs = ROWS * WIDTH * 2
    assert kept[1] - kept[0] < 4 * 4 * outputs  # what a block saves is six times its output


def test_memory_goes_with_the_model() -> None:
    before = allocated()
    run = run_of(stack, cuda_graphs=True)
    for index in range(4):
        run.step(index)
    assert allocated() - before > 2**20
    del run
    assert allocated() - before < 2**20
