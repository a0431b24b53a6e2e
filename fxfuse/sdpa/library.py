"""flash-attn-4 (Dao-AILab, BSD), kernels for Hopper and Blackwell that are compiled when first needed: ``pip install flash-attn-4``.

Tensors are [batch, heads, length, width], in any order of memory in which a row of ``width`` numbers is contiguous. Its functions
are the two that torch's own registry of flash attention calls (``torch.nn.attention._fa4``). What a backward needs of a forward, the
result and the natural logarithm of each row's sum, is the same for it and for torch's kernels: either's backward may follow either's
forward.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor

from .._torch import FakeTensorMode, disable_current_modes
from ..attention.flex import Form
from ..kernels.library import cache_dir

PACKAGE, MODULE = "flash-attn-4", "flash_attn.cute.interface"
MAJOR = (9, 10)  # compute capabilities whose kernels have a backward
DTYPES = (torch.bfloat16, torch.float16)
# What it compiled is kept on disk if this is set as it is imported.
KEEPS, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@dataclass(frozen=True)
class Problem:
    """One layout of operands: forms of query, key and value; the scale of the scores (None: one over the root of the width)."""

    forms: tuple[Form, Form, Form]
    causal: bool
    scale: float | None

    @property
    def scores(self) -> int:
        """How many are computed, all heads together."""
        b, heads, queries, _ = self.forms[0].shape
        return b * heads * queries * self.forms[1].shape[2] // (2 if self.causal else 1)


def installed() -> str:
    """Its version, or nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return ""


def why_not(problem: Problem) -> str:
    """Why it does not compute a problem, or nothing. (What its kernels refuse besides comes out as they are compiled.)"""
    query, key, value = problem.forms
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] not in MAJOR:
        return "it has kernels for GPUs of compute capability 9 and 10"
    if query.dtype not in DTYPES or len({form.dtype for form in problem.forms}) > 1:
        return "its operands have 16 bits"
    if 0 in (*query.shape, *key.shape, *value.shape) or any(form.strides[3] != 1 for form in problem.forms):
        return "rows of its operands are contiguous, and not empty"
    if problem.causal and query.shape[2] != key.shape[2]:
        return "its causal mask is aligned with the last key, torch's with the first"
    return "" if query.shape[1] % key.shape[1] == 0 else "query heads share key heads evenly"


def is_loaded() -> bool:
    return MODULE in sys.modules and hasattr(sys.modules[MODULE], "_flash_attn_bwd")


def load() -> ModuleType:
    """Import it (some seconds), with what it compiles kept on disk unless the environment says otherwise."""
    if is_loaded():
        return sys.modules[MODULE]
    with _environment({KEEPS: "1", FOLDER: str(cache_dir() / "flash_attn")}):
        return importlib.import_module(MODULE)


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables that are not set are, for a while."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def compiled(problem: Problem) -> None:
    """Compile the kernels of a problem without running them, to be found on disk later."""
    load()
    with disable_current_modes(), FakeTensorMode():
        query, key, value = (form.made() for form in problem.forms)
        out, sums = forward(query, key, value, problem.causal, problem.scale)
        backward(torch.empty_like(out), query, key, value, out, sums, problem.causal, problem.scale)


def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The result [b, h, q, d], in the order of memory of ``query``, and the logarithm of each row's sum [b, h, q], float32."""
    b, heads, queries, width = query.shape
    narrow = width != value.shape[3]
    out = query.new_empty(b, queries, heads, value.shape[3]).transpose(1, 2) if narrow else torch.empty_like(query)
    found = load()._flash_attn_fwd(*_by_length(query, key, value), softmax_scale=scale, causal=causal, return_lse=True,
                                   out=out.transpose(1, 2))  # fmt: skip
    return out, found[1]


def backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, causal: bool,
             scale: float | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, each in the order of memory of what it is the gradient of. ``sums`` [b, h, q] or, as cuDNN
    has them, [b, h, q, 1]."""
    gradients = tuple(map(torch.empty_like, (query, key, value)))
    d_query, d_key, d_value = _by_length(*gradients)
    sums = sums.reshape(query.shape[:3])
    load()._flash_attn_bwd(*_by_length(query, key, value, out, arriving), sums, softmax_scale=scale, causal=causal,
                           dq=d_query, dk=d_key, dv=d_value)  # fmt: skip
    return gradients  # type: ignore[return-value]


def _by_length(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[b, heads, length, width] -> [b, length, heads, width]"""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
