"""What a fused head keeps and what it allocates on the way: at the sizes of an 8B model on fake tensors, for real on small ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.backend import Backend
from fxfuse.fake_model import fake_mode
from fxfuse.linear_loss import chunks, execution
from fxfuse.linear_loss.chunks import padded_width, rows_in_chunk, spans
from tests.residual.test_memory import kept_mib

TOKENS, WIDTH, CLASSES = 8192, 4096, 128256
HIDDEN_MIB, WEIGHT_MIB, LOGITS_MIB = 64.0, 1002.0, 2004.0
UNITS = 132


class Head(nn.Module):
    def __init__(self, width: int, classes: int, trained: bool, dtype: torch.dtype, reduction: str = "mean") -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes, bias=False, dtype=dtype).requires_grad_(trained)
        self.reduction = reduction

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(hidden).float(), labels, reduction=self.reduction)


def fused(head: Head) -> Callable[..., Tensor]:
    return torch.compile(head, backend=Backend(validate="off", strict=True, remainder="eager"), fullgraph=True)


@pytest.mark.parametrize(("trained", "reduction", "floor"), [
    (False, "mean", HIDDEN_MIB),  # the gradient of the hidden states, which takes the place of the logits
    (True, "mean", HIDDEN_MIB + WEIGHT_MIB),  # and that of the weight
    (False, "none", HIDDEN_MIB),
    (True, "none", 0.1),  # row statistics
])
def test_floor(trained: bool, reduction: str, floor: float) -> None:
    """Eager keeps the logits, once in bfloat16 and once in float32."""
    with fake_mode():
        head = Head(WIDTH, CLASSES, trained, torch.bfloat16, reduction)
        hidden = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(TOKENS, dtype=torch.int64)
        eager = kept_mib(head, hidden, labels)
        kept = kept_mib(fused(head), hidden, labels)
    assert eager >= LOGITS_MIB
    assert kept <= floor + 0.1


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The buffers that logits are written to meanwhile, without repetitions."""
    made: list[Tensor] = []
    original = execution.Head.logits_of

    def recording(self: execution.Head, *args: object) -> Tensor:
        logits = original(self, *args)  # type: ignore[arg-type]
        buffer = logits if logits._base is None else logits._base
        if not any(buffer is other for other in made):
            made.append(buffer)
        return logits

    monkeypatch.setattr(execution.Head, "logits_of", recording)
    return made


@pytest.mark.parametrize(("trained", "reduction"), [(False, "mean"), (True, "mean"), (False, "none"), (True, "none")])
def test_logits_are_never_there_at_once(trained: bool, reduction: str, buffers: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer of one chunk, in the forward and where the logits are computed again."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 128 * 512 * 4)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)
    head = Head(16, 500, trained, torch.float32, reduction)
    hidden, labels = torch.randn(700, 16, requires_grad=True), torch.randint(0, 500, (700,))
    fused(head)(hidden, labels).sum().backward()
    assert len(buffers) == (2 if trained and reduction == "none" else 1)
    assert {buffer.shape for buffer in buffers} == {(128, padded_width(500, 4))}


@pytest.mark.parametrize("rows", [1, 100, 128, 1000, 8192, 8191, 100_000])
@pytest.mark.parametrize(("width", "columns"), [(128256, 4096), (50257, 768), (32000, 8192), (262144, 2304)])
def test_chunks_cover_the_rows_within_the_budget(rows: int, width: int, columns: int) -> None:
    row_bytes = padded_width(width, 2) * 2
    size = rows_in_chunk(rows, row_bytes, columns, UNITS)
    parts = list(spans(0, rows, size))
    assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])]
    assert parts[-1][1] == rows
    assert size * row_bytes <= max(chunks.LOGITS_BYTES, 128 * row_bytes)
    assert size % 128 == 0 or len(parts) == 1


def test_the_transient_of_the_measured_head_is_below_its_budget() -> None:
    """Logits of a chunk, the stored gradient of the hidden states and, in the backward, the scaled one."""
    size = rows_in_chunk(TOKENS, padded_width(CLASSES, 2) * 2, WIDTH, UNITS)
    gib = (size * CLASSES * 2 + TOKENS * WIDTH * 2) / 2**30
    assert gib <= 0.4


@pytest.mark.parametrize(("rows", "columns", "count", "gib"), [
    (8192, 4096, 1, 2.94),  # all logits, which take no more than a float32 sum would, and the gradient of the weight
    (16384, 2048, 4, 1.99),  # a chunk, and the float32 sum
    (32768, 4096, 4, 3.98),
])
def test_chunks_of_a_trained_head_trade_memory_for_sums(rows: int, columns: int, count: int, gib: float) -> None:
    """Never more than twice the float32 sum and LOGITS_BYTES."""
    row_bytes, weight_bytes = padded_width(CLASSES, 2) * 2, CLASSES * columns * 2
    size = rows_in_chunk(rows, row_bytes, columns, UNITS, chunks.budget(weight_bytes))
    parts = -(-rows // size)
    held = size * row_bytes + weight_bytes * (1 if parts == 1 else 2)
    assert parts == count
    assert held / 2**30 == pytest.approx(gib, abs=0.01)
    assert held <= 4 * weight_bytes + chunks.LOGITS_BYTES


@pytest.mark.parametrize("width", [1, 7, 50257, 128256])
def test_rows_of_logits_are_aligned(width: int) -> None:
    assert padded_width(width, 2) * 2 % chunks.ALIGNMENT == 0
    assert width <= padded_width(width, 2) < width + chunks.ALIGNMENT
