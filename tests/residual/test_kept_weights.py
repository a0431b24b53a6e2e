"""4-bit weights that stay dequantized: the same numbers, found again, never stale, gone when nobody wants them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxfuse import kept_weights
from fxfuse.kept_weights import Keeper, kept, place_of
from fxfuse.memory.dequantized import chosen, packed_weights
from fxfuse.products.calls import below, beside
from fxfuse.quantized_linears import random_weight
from fxfuse.quantized_op import by_bitsandbytes, dequantize_4bit
from fxfuse.roomy_weights import row_distance

SHAPE = (24, 64)
KIND = (64, "nf4", list(SHAPE), torch.bfloat16)
BYTES = SHAPE[0] * SHAPE[1] * 2


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not kept_weights.WANTED


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def tensors(request: pytest.FixtureRequest) -> tuple[Tensor | None, ...]:
    return random_weight(torch.device("cpu"), 64, SHAPE, request.param)


def _keeper(tensors: tuple[Tensor | None, ...], most: int = BYTES) -> Keeper:
    keeper = Keeper()
    keeper.keep({place_of(tensors[0]): most})  # type: ignore[arg-type]
    return keeper


def test_the_second_use_finds_the_first(tensors: tuple) -> None:
    keeper = _keeper(tensors)
    truth = by_bitsandbytes(*tensors, *KIND)
    first = dequantize_4bit(*tensors, *KIND)
    second = dequantize_4bit(*tensors, *KIND)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, truth)
    assert keeper.bytes == BYTES
    keeper.drop()
    assert dequantize_4bit(*tensors, *KIND).data_ptr() != first.data_ptr()
    assert keeper.bytes == 0


@pytest.mark.parametrize("index", range(5))
def test_what_was_written_to_is_dequantized_again(tensors: tuple, index: int) -> None:
    """Each of the tensors that a weight is made of, the scales of the scales and their offset too."""
    if tensors[index] is None:
        return
    keeper = _keeper(tensors)
    before = dequantize_4bit(*tensors, *KIND).clone()
    tensors[index].copy_(tensors[index].roll(1) if tensors[index].numel() > 1 else tensors[index] + 1)
    after = dequantize_4bit(*tensors, *KIND)
    assert not torch.equal(before, after)
    assert torch.equal(after, by_bitsandbytes(*tensors, *KIND))
    assert keeper.bytes == BYTES


def test_a_scale_that_was_replaced_is_seen(tensors: tuple) -> None:
    keeper = _keeper(tensors)
    dequantize_4bit(*tensors, *KIND)
    others = (tensors[0], tensors[1] * 2, *tensors[2:])
    assert torch.equal(dequantize_4bit(*others, *KIND), by_bitsandbytes(*others, *KIND))
    assert keeper.bytes


def test_another_dtype_or_more_bytes_than_planned_are_not_kept(tensors: tuple) -> None:
    keeper = _keeper(tensors)
    wide = dequantize_4bit(*tensors, 64, "nf4", list(SHAPE), torch.float32)
    assert keeper.bytes == 0
    assert torch.equal(wide, by_bitsandbytes(*tensors, 64, "nf4", list(SHAPE), torch.float32))


def test_nothing_is_kept_in_inference_mode(tensors: tuple) -> None:
    keeper = _keeper(tensors)
    with torch.inference_mode():
        dequantize_4bit(*tensors, *KIND)
    assert keeper.bytes == 0
    dequantize_4bit(*tensors, *KIND)
    with torch.inference_mode():  # what is there is found
        dequantize_4bit(*tensors, *KIND)
    assert keeper.bytes == BYTES


def test_the_address_cannot_be_anothers() -> None:
    """The packed memory lives as long as the weight is kept; a model's new weight lies elsewhere, and the old one goes at a look."""
    tensors = random_weight(torch.device("cpu"), 64, SHAPE, False)
    keeper, address = _keeper(tensors), tensors[0].data_ptr()
    dequantize_4bit(*tensors, *KIND)
    del tensors
    gc.collect()
    assert all(torch.empty(SHAPE[0] * SHAPE[1] // 2, 1, dtype=torch.uint8).data_ptr() != address for _ in range(8))
    keeper.prune([])
    assert not keeper.places
    assert not kept_weights.WANTED


def test_room_beside_and_below_is_shared() -> None:
    """A forward wants columns beside the weight, its backward rows below it; each writes its own before it reads."""
    packed, weight = torch.zeros(4, dtype=torch.uint8), torch.randn(6, 8)
    keeper = Keeper()
    keeper.keep({place_of(packed): 4 * 8 * 10 * 2})
    writes = []

    def write(packed: Tensor, out: Tensor) -> None:
        writes.append(out.stride())
        out.copy_(weight)

    def found(room: tuple[int, int] | None) -> Tensor:
        result = kept((packed,), (6, 8), torch.float32, room, write)
        assert result is not None
        assert torch.equal(result, weight)
        return result

    columns = row_distance(8, 2) - 8
    for _ in range(3):
        tail = torch.randn(6, 2)
        assert torch.equal(beside(found((0, columns)), tail, 2.0, 0, 2, True), torch.cat([weight, 2 * tail], 1))
        tail = torch.randn(3, 8)
        assert torch.equal(below(found((3, 0)), tail, 0.5, 0, 3, True), torch.cat([weight, 0.5 * tail], 0))
        found(None)
    assert len(writes) == 2  # with columns, then with rows too
    wide = found((0, columns))
    assert beside(wide, tail[:, :6].t()[:, :2], 1.0, 0, 2, True).data_ptr() == wide.data_ptr()
    assert below(found((3, 0)), tail, 1.0, 0, 3, True).data_ptr() == found(None).data_ptr()


def test_as_many_weights_as_fit() -> None:
    weights = {(1, 0): 100, (2, 0): 10, (3, 0): 100}
    assert chosen(weights, 420, 420) == {(1, 0): 200, (2, 0): 20, (3, 0): 200}
    assert chosen(weights, 230, 420) == {(1, 0): 200, (2, 0): 20}
    assert chosen(weights, 19, 420) == {}


def test_frozen_whole_weights_alone() -> None:
    from tests.model.quantized_models import in_4bit

    model = in_4bit(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)))
    found = packed_weights([model], torch.device("cpu"))
    assert list(found.values()) == [64 * 32, 64 * 32]
    assert place_of(model[0].weight) in found
    assert not packed_weights([model], torch.device("meta"))
