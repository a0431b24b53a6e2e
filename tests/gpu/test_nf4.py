"""The 4-bit kernel on a device: every number is that of bitsandbytes' kernels, in every configuration, on streams and in graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fxfuse import quantized_linears
from fxfuse.backend import Backend
from fxfuse.kernels.nf4 import BLOCKSIZES, CONFIGS, Config, Dequantizer, Weight, dequantize
from fxfuse.quantized_op import by_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized(rows: int, columns: int, blocksize: int = 64, quant_type: str = "nf4", nested: bool = True,
              storage: torch.dtype = torch.uint8) -> list[Tensor | None]:  # fmt: skip
    weight = torch.randn(rows, columns, device="cuda") * 0.02
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested,
                                                 quant_storage=storage)  # fmt: skip
    if not nested:
        return [packed, state.absmax, None, None, None]
    return [packed, state.state2.absmax, state.absmax, state.state2.code, state.offset]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("quant_type", "dtype"), itertools.product(("nf4", "fp4"), DTYPES), ids=str)
def test_every_configuration_is_exact(config: Config, quant_type: str, dtype: torch.dtype) -> None:
    for nested in (True, False):
        tensors = quantized(384, 1088, quant_type=quant_type, nested=nested)
        ours = Dequantizer(Weight(64, quant_type, 384, 1088, dtype, nested), config)(*tensors)
        assert torch.equal(ours, by_bitsandbytes(*tensors, 64, quant_type, (384, 1088), dtype))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_block_size_and_storage(blocksize: int, storage: torch.dtype) -> None:
    tensors = quantized(256, 4096, blocksize=blocksize, storage=storage)
    ours = dequantize(*tensors, blocksize=blocksize, quant_type="nf4", shape=(256, 4096), dtype=torch.bfloat16)
    assert torch.equal(ours, by_bitsandbytes(*tensors, blocksize, "nf4", (256, 4096), torch.bfloat16))


@pytest.mark.parametrize("shape", [(7, 36), (5, 31), (130, 100), (14336, 4096), (18944, 3584), (3584, 18944)], ids=str)
def test_shapes_with_and_without_room(shape: tuple[int, int]) -> None:
    tensors = quantized(*shape)
    expected = by_bitsandbytes(*tensors, 64, "nf4", shape, torch.bfloat16)
    arguments = dict(blocksize=64, quant_type="nf4", shape=shape, dtype=torch.bfloat16)
    assert torch.equal(dequantize(*tensors, **arguments), expected)
    buffer = torch.full((shape[0] + 16, shape[1] + 16), 7.0, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(dequantize(*tensors, **arguments, out=buffer[: shape[0], : shape[1]]), expected)
    assert (buffer[shape[0] :] == 7).all()
    assert (buffer[:, shape[1] :] == 7).all()


def test_random_bytes_and_scales() -> None:
    for nested, dtype in itertools.product((True, False), DTYPES):
        tensors = quantized_linears.random_weight(torch.device("cuda"), 64, (2048, 4096), nested)
        ours = dequantize(*tensors, blocksize=64, quant_type="nf4", shape=(2048, 4096), dtype=dtype)
        assert torch.equal(ours, by_bitsandbytes(*tensors, 64, "nf4", (2048, 4096), dtype))


def test_on_a_side_stream_and_in_a_graph() -> None:
    tensors = quantized(1024, 4096)
    expected = by_bitsandbytes(*tensors, 64, "nf4", (1024, 4096), torch.bfloat16)
    run = Dequantizer(Weight(64, "nf4", 1024, 4096, torch.bfloat16, True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        tensors[0].bitwise_not_()
        flipped = run(*tensors)  # on the default stream this would read the bytes too early
        tensors[0].bitwise_not_()
    torch.cuda.current_stream().wait_stream(side)
    assert not torch.equal(flipped, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def linear(**options: object) -> nn.Module:
    layer = bnb.nn.Linear4bit(512, 768, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", **options)
    return layer.to("cuda")


def test_a_layer_trains_as_in_eager() -> None:
    layer = linear()
    x = torch.randn(4, 2048, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fused = torch.compile(layer, backend=Backend(strict=True, remainder="eager"), dynamic=True, fullgraph=True)
    ours, eager = fused(x), layer(x)
    gradient = torch.randn_like(ours)
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (ours, eager)))


def test_no_weight_lives_between_forward_and_backward() -> None:
    layer = linear()
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fused = torch.compile(layer, backend=Backend(strict=True, remainder="eager"), dynamic=True, fullgraph=True)
    fused(x).sum().backward()
    x.grad = None
    before = torch.cuda.memory_allocated()
    y = fused(x)
    assert torch.cuda.memory_allocated() - before < 512 * 768 * 2  # a dequantized weight
    y.sum().backward()


def test_without_gradients_the_kernels_of_bitsandbytes_run() -> None:
    layer, x = linear(), torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    fused = torch.compile(layer, backend=Backend(strict=True, remainder="eager"), dynamic=True)
    with torch.no_grad():
        assert torch.equal(fused(x), layer(x))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fused(x)
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert names
    assert not any("dequantize_kernel" in name for name in names)
