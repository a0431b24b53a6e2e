"""The 4-bit kernel in Triton's interpreter: every number is bitsandbytes', bit for bit; planted faults are seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxfuse import backend, quantized_linears, quantized_op
from fxfuse.kernels import nf4, nf4_kernel
from fxfuse.kernels.nf4 import Config, Dequantizer, Weight, dequantize
from fxfuse.quantized_op import by_bitsandbytes
from fxfuse.reporting.records import GraphRecord, Site
from tests.model.quantized_models import in_4bit
from tests.planted_faults import with_fault

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized(rows: int, columns: int, blocksize: int = 64, quant_type: str = "nf4", nested: bool = True,
              storage: torch.dtype = torch.uint8, scale: float = 0.02) -> list[Tensor | None]:  # fmt: skip
    """The tensors of a random weight as bitsandbytes packs it."""
    weight = torch.randn(rows, columns) * scale
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested,
                                      quant_storage=storage)  # fmt: skip
    if not nested:
        return [packed, state.absmax, None, None, None]
    return [packed, state.state2.absmax, state.absmax, state.state2.code, state.offset]


def by_definition(tensors: list[Tensor | None], blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The formula of bitsandbytes, in torch."""
    packed, absmax, quantized_absmax, code, offset = tensors
    total = shape[0] * shape[1]
    bytes_ = packed.view(torch.uint8).reshape(-1)
    nibbles = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1)[:total].long()
    if quantized_absmax is not None:
        absmax = code[quantized_absmax.long()] * absmax.repeat_interleave(256)[: quantized_absmax.numel()] + offset
    scales = absmax.repeat_interleave(blocksize)[:total]
    return (bnb.get_4bit_type(quant_type, device="cpu")[nibbles] * scales).to(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), itertools.product(("nf4", "fp4"), (True, False)))
def test_every_number_is_that_of_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    tensors = quantized(24, 192, quant_type=quant_type, nested=nested)
    ours = dequantize(*tensors, blocksize=64, quant_type=quant_type, shape=(24, 192), dtype=dtype)
    assert torch.equal(ours, by_bitsandbytes(*tensors, 64, quant_type, (24, 192), dtype))
    assert torch.equal(ours, by_definition(tensors, 64, quant_type, (24, 192), dtype))


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_every_block_size(blocksize: int) -> None:
    shape = (5, 4096)
    tensors = quantized(*shape, blocksize=blocksize)
    ours = dequantize(*tensors, blocksize=blocksize, quant_type="nf4", shape=shape, dtype=torch.bfloat16)
    assert torch.equal(ours, by_definition(tensors, blocksize, "nf4", shape, torch.bfloat16))
    assert torch.equal(ours, by_bitsandbytes(*tensors, blocksize, "nf4", shape, torch.bfloat16))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_storage_is_the_same_bytes(storage: torch.dtype) -> None:
    tensors = quantized(16, 128, storage=storage)
    assert tensors[0].dtype == storage
    ours = dequantize(*tensors, blocksize=64, quant_type="nf4", shape=(16, 128), dtype=torch.bfloat16)
    assert torch.equal(ours, by_bitsandbytes(*tensors, 64, "nf4", (16, 128), torch.bfloat16))


@pytest.mark.parametrize("shape", [(7, 36), (3, 33), (5, 31), (1, 64), (2, 2), (9, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_that_words_do_not_divide(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = quantized(*shape, nested=False)
    ours = dequantize(*tensors, blocksize=64, quant_type="nf4", shape=shape, dtype=dtype)
    assert torch.equal(ours, by_definition(tensors, 64, "nf4", shape, dtype))


@pytest.mark.parametrize("shape", [(24, 192), (7, 36), (5, 31)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_room_beside_the_weight_is_left_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    tensors = quantized(*shape, nested=False)
    buffer = torch.full((rows + 4, columns + 16), 7.0, dtype=dtype)
    out = buffer[:rows, :columns]
    assert dequantize(*tensors, blocksize=64, quant_type="nf4", shape=shape, dtype=dtype, out=out) is out
    assert torch.equal(out, by_definition(tensors, 64, "nf4", shape, dtype))
    assert (buffer[rows:] == 7).all()
    assert (buffer[:, columns:] == 7).all()


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_a_packed_weight_at_any_address(offset: int) -> None:
    tensors = quantized(16, 128)
    moved = torch.zeros(tensors[0].numel() + 16, dtype=torch.uint8)[offset:][: tensors[0].numel()].view(-1, 1).copy_(tensors[0])
    ours = dequantize(moved, *tensors[1:], blocksize=64, quant_type="nf4", shape=(16, 128), dtype=torch.bfloat16)
    assert torch.equal(ours, by_bitsandbytes(*tensors, 64, "nf4", (16, 128), torch.bfloat16))


@pytest.mark.parametrize("config", [Config("table", 4, 1), Config("table", 8, 4), Config("select", 4, 2)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_way_to_look_up(config: Config, quant_type: str) -> None:
    tensors = quantized(24, 192, quant_type=quant_type)
    ours = Dequantizer(Weight(64, quant_type, 24, 192, torch.bfloat16, True), config)(*tensors)
    assert torch.equal(ours, by_bitsandbytes(*tensors, 64, quant_type, (24, 192), torch.bfloat16))


@pytest.mark.parametrize("room", [0, 16])
def test_indices_of_64_bits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, wide = nf4.plan, 9

    def widened(*arguments: object) -> nf4.Plan:
        made = plan(*arguments)  # type: ignore[arg-type]
        assert made.numbers[wide] == 0
        return made._replace(numbers=(*made.numbers[:wide], 1, *made.numbers[wide + 1 :]))

    monkeypatch.setattr(nf4, "plan", widened)
    tensors = quantized(24, 192)
    out = torch.empty(24, 192 + room, dtype=torch.bfloat16)[:, :192]
    Dequantizer(Weight(64, "nf4", 24, 192, torch.bfloat16, True))(*tensors, out=out)
    assert torch.equal(out, by_bitsandbytes(*tensors, 64, "nf4", (24, 192), torch.bfloat16))


def test_scales_of_all_magnitudes() -> None:
    tensors = quantized_linears.random_weight(torch.device("cpu"), 64, (64, 256), True)
    ours = dequantize(*tensors, blocksize=64, quant_type="nf4", shape=(64, 256), dtype=torch.float16)
    assert torch.equal(ours, by_definition(tensors, 64, "nf4", (64, 256), torch.float16))


def test_what_does_not_fit_is_said() -> None:
    tensors = quantized(16, 128)
    for change, complaint in (((0, tensors[0][:-1]), "packed nibbles"), ((1, tensors[1].double()), "float32"),
                              ((2, tensors[2][:-1]), "scales"), ((2, None), "nested")):
        changed = list(tensors)
        changed[change[0]] = change[1]
        with pytest.raises(ValueError, match=complaint):
            Dequantizer(Weight(64, "nf4", 16, 128, torch.bfloat16, True))(*changed)
    with pytest.raises(ValueError, match="blocks of"):
        dequantize(*tensors, blocksize=48, quant_type="nf4", shape=(16, 128), dtype=torch.bfloat16)


def trained() -> tuple[list[Site], list[Tensor], list[Tensor]]:
    """The sites of a compiled 4-bit layer; its output and gradient, ours and eager's."""
    records: list[GraphRecord] = []
    layer = in_4bit(nn.Sequential(nn.Linear(256, 128, bias=False)), torch.bfloat16)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        make = backend.new_record
        patch.setattr(backend, "new_record", lambda: records.append(make()) or records[-1])  # type: ignore[func-returns-value]
        ours = torch.compile(layer, backend=backend.Backend(strict=True, remainder="eager"), dynamic=True)(x)
    eager, gradient = layer(x), torch.randn(2, 3, 128, dtype=torch.bfloat16)
    pairs = [[y, torch.autograd.grad(y, x, gradient)[0]] for y in (ours, eager)]
    return records[0].sites, pairs[0], pairs[1]


def test_a_layer_trains_with_the_kernel() -> None:
    (site,), ours, eager = trained()
    assert (site.rule, site.status, site.implementation) == ("nf4_linear", "fused", "triton")
    assert all(map(torch.equal, ours, eager))


class TestPlantedFaults:
    """The check before use declines a kernel that is wrong in any of these ways."""

    @pytest.fixture(autouse=True)
    def nothing_is_kept(self) -> Iterator[None]:
        yield
        self.forget()

    def forget(self) -> None:
        for cache in (quantized_linears._found_out, quantized_op.weight_launcher, nf4.dequantizer, nf4.table_of):
            cache.cache_clear()

    def verdict(self, nested: bool = True) -> str:
        self.forget()
        return quantized_linears.check_kind(torch.device("cpu"), 64, "nf4", (128, 256), torch.bfloat16, nested)

    def test_none(self) -> None:
        assert self.verdict() == ""
        assert self.verdict(nested=False) == ""

    def test_wrong_entry_of_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = (*nf4.NF4[:5], nf4.NF4[5] * (1 + 2**-7), *nf4.NF4[6:])
        monkeypatch.setattr(nf4, "TABLES", {"nf4": wrong, "fp4": nf4.FP4})
        assert "differs from bitsandbytes'" in self.verdict()
        (site,), ours, eager = trained()
        assert site.status == "declined"
        assert all(map(torch.equal, ours, eager))

    @pytest.mark.parametrize(("right", "wrong"), [
        ("* outer + tl.load(absmax_offset)", "* outer"),
        ("group >> 8", "group >> 7"),
        ("4 - 4 * (nibble % 2)", "4 * (nibble % 2)"),
        ("word * NIBBLES\n", "(words - 1 - word) * NIBBLES\n"),
        ("value * scale[:, :, None]", "value.to(tl.bfloat16) * scale[:, :, None].to(tl.bfloat16)"),
    ], ids=["offset", "scale of scales", "swapped nibbles", "reversed", "product in bfloat16"])  # fmt: skip
    def test_wrong_kernel(self, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        faulty = with_fault(nf4_kernel, right, wrong, tmp_path, monkeypatch)
        monkeypatch.setattr(nf4, "dequantize_kernel", faulty.dequantize_kernel)
        assert "differs from bitsandbytes'" in self.verdict()
