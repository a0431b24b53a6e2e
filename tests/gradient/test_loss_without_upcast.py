"""A loss on 16-bit logits without an upcast (as encoders have it): eager's dtype, checked and fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxfuse.backend import Backend
from fxfuse.reporting.records import GraphRecord
from fxfuse.tracing import trace_function


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_keeps_the_dtype_of_its_logits(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(20, 16, dtype=dtype, requires_grad=True), torch.randint(0, 16, (20,))
    record = GraphRecord("block", "loss")
    fused = Backend(strict=True).rewrite(trace_function(F.cross_entropy, logits, labels), record)
    assert [(site.rule, site.status) for site in record.sites] == [("cross_entropy", "fused")]
    assert fused is not None
    loss = fused(logits, labels)
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss.dtype == dtype
