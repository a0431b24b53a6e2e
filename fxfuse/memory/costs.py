"""What a node of a graph costs: arithmetic and bytes, at the rates of a device.

Two kinds of operation matter here: products, whose time is their arithmetic at the rate that the library's matmul reaches, and
everything else, whose time is its bytes at the rate of a copy. The rates are measured once on a CUDA device, which takes some
milliseconds, and kept in the cache folder; a device that is in the table below need not be there (``explain``).
"""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor, fx

from .._torch import disable_current_modes
from ..quantized_op import is_dequantization
from ..remainder import device_class
from .joint import is_view
from .sizes import Sizes

logger = logging.getLogger("fxfuse")
aten = torch.ops.aten


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a device.

    product:     operations a second (an addition and a multiplication are two) in matmuls of 16-bit operands
    product_32:  of float32 operands
    copy:        bytes read and written a second by a kernel that does nothing else
    to_host, from_host: bytes a second between the device and pinned memory
    launch_ms:   what an operation takes at least
    """

    name: str
    product: float
    product_32: float
    copy: float
    to_host: float
    from_host: float
    launch_ms: float = 0.004


# benchmarks/results and DESIGN section 11: 650 to 720 TFLOP/s at the sizes of language models, copy 4.2 TB/s.
TABLE = {
    "NVIDIA H200": Rates("table: NVIDIA H200", 680e12, 50e12, 4.2e12, 50e9, 50e9),
    "NVIDIA H100 80GB HBM3": Rates("table: NVIDIA H100 80GB HBM3", 650e12, 50e12, 2.9e12, 50e9, 50e9),
    "NVIDIA A100-SXM4-80GB": Rates("table: NVIDIA A100-SXM4-80GB", 250e12, 18e12, 1.7e12, 24e9, 24e9),
    "cpu": Rates("nominal: CPU", 1e11, 1e11, 2e10, 2e10, 2e10, 0.01),
}
# A plan for a device that nothing is known of: what matters for it is how the costs of operations compare.
USUAL = Rates("nominal: a CUDA device", 150e12, 20e12, 1e12, 20e9, 20e9)

PRODUCTS = frozenset(op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_mm, aten._grouped_mm))


def rates_of(device: torch.device) -> Rates:
    """The rates of a device that is here: measured, where it is a CUDA device."""
    return _measured(device_class(device), device.index or 0) if device.type == "cuda" else TABLE["cpu"]


def rates_named(name: str) -> Rates:
    """The rates of a device that need not be here, by the name that CUDA gives it."""
    return TABLE.get(name, USUAL)


def milliseconds(node: fx.Node, sizes: Sizes, rates: Rates) -> float:
    """What one run of a node takes on the device."""
    if not computes(node):
        return 0.0
    arithmetic = operations(node, sizes)
    if arithmetic:
        # by its operand, as results may be several (attention) or wider (a product that is rounded once)
        operand = node.all_input_nodes[0].meta.get("val")
        narrow = isinstance(operand, Tensor) and operand.element_size() < 4
        return max(arithmetic / (rates.product if narrow else rates.product_32) * 1e3, rates.launch_ms)
    return max(bytes_touched(node, sizes) / rates.copy * 1e3, rates.launch_ms)


def computes(node: fx.Node) -> bool:
    """Does this node run anything on the device."""
    if node.op != "call_function" or node.target is operator.getitem or is_view(node):
        return False
    return not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def operations(node: fx.Node, sizes: Sizes) -> int:
    """Additions and multiplications of a product, a convolution, an attention or a loss head; 0 for other operations."""
    if _is_attention(node):
        return _operations_of_attention(node, sizes)
    if str(node.target).startswith("fxfuse.linear_loss"):
        hidden, weight = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
        products = 3 if _gives_weight_gradient(node) else 2
        return 2 * products * sizes.number(hidden.shape[0]) * sizes.elements(weight)
    if node.target in PRODUCTS:
        left = node.args[1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0].meta["val"]  # type: ignore[union-attr]
        return 2 * sizes.elements(node.meta["val"]) * sizes.number(left.shape[-1])
    if node.target is aten.convolution.default:
        weight = node.args[1].meta["val"]  # type: ignore[union-attr]
        return 2 * sizes.elements(node.meta["val"]) * sizes.elements(weight) // max(sizes.number(weight.shape[0]), 1)
    return 0


def _is_attention(node: fx.Node) -> bool:
    return "_scaled_dot_product_" in str(node.target)


def _operations_of_attention(node: fx.Node, sizes: Sizes) -> int:
    """Two products forward, five backward; of a causal one, half. Attention runs at some 70% of a matmul's rate."""
    backward = "_backward" in str(node.target)
    query, key = (a.meta["val"] for a in (node.args[1:3] if backward else node.args[:2]))  # type: ignore[union-attr]
    causal = any(value is True for value in (*node.args, *node.kwargs.values()))
    products = (5 if backward else 2) * (0.5 if causal else 1.0)
    return int(2 * products * sizes.elements(query) * sizes.number(key.shape[-2]) / 0.7)


def bytes_touched(node: fx.Node, sizes: Sizes) -> int:
    """What an operation reads and writes."""
    return sizes.bytes(node.meta.get("val")) + sum(sizes.bytes(used.meta.get("val")) for used in node.all_input_nodes)


def scratch_bytes(node: fx.Node, sizes: Sizes) -> int:
    """What an operation needs for itself while it runs, beside its results."""
    target = str(node.target)
    if target.startswith("fxfuse.linear_loss"):
        return _scratch_of_loss(node, sizes)
    if is_dequantization(node):
        return 0
    if "_backward" in target and "scaled_dot_product" in target:
        return _scratch_of_attention(node, sizes)
    return 0


def _scratch_of_attention(node: fx.Node, sizes: Sizes) -> int:
    """Gradients of the query are added up in float32; those of keys and values that several query heads read are made for each head and
    summed then (cuDNN's workspace and FlashAttention-2's, alike)."""
    query, key, value = (a.meta["val"] for a in node.args[1:4])  # type: ignore[union-attr]
    found = 4 * sizes.elements(query)
    heads = sizes.number(query.shape[1])
    for shared in (key, value):
        own = sizes.number(shared.shape[1])
        found += 0 if own == heads else sizes.bytes(shared) * heads // max(own, 1)
    return found


def _scratch_of_loss(node: fx.Node, sizes: Sizes) -> int:
    """A chunk of logits; of a trained weight and several chunks, also the float32 sum of its gradient, which is rounded when the last
    chunk is gone."""
    from ..linear_loss.chunks import budget, padded_width, rows_in_chunk, units_of

    hidden, weight = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
    item, elements, rows = hidden.element_size(), sizes.elements(weight), sizes.number(hidden.shape[0])
    row = padded_width(sizes.number(weight.shape[0]), item) * item
    if not _gives_weight_gradient(node):
        return min(rows * row, budget(0))
    units = units_of(hidden.device) if torch.cuda.is_available() else 0
    chunk = rows_in_chunk(rows, row, sizes.number(hidden.shape[1]), units, budget(elements * item))
    return chunk * row if chunk >= rows else 4 * elements + max(chunk * row - item * elements, 0)


def _gives_weight_gradient(node: fx.Node) -> bool:
    weight, value = node.args[1].meta["val"], node.meta.get("val")  # type: ignore[union-attr]
    return any(isinstance(v, Tensor) and v.dim() == 2 and tuple(v.shape) == tuple(weight.shape) for v in value or ())


@lru_cache(maxsize=16)
def _measured(name: str, index: int) -> Rates:
    """Rates from the cache folder, else measured now."""
    from fxfuse.kernels.library import cache_dir, keep

    path = cache_dir() / f"rates-3-{''.join(c if c.isalnum() else '-' for c in name)}.json"
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        rates = _measure(name, torch.device("cuda", index))
    keep(path, json.dumps(asdict(rates)))
    return rates


def _measure(name: str, device: torch.device) -> Rates:
    """Matmuls, a copy and copies to and from pinned memory, each some milliseconds long.

    Rates are asked for while graphs are traced: what is traced are fake tensors, what is measured must not be.
    """
    size, host_bytes = 4096, 64 << 20
    with disable_current_modes(), torch.no_grad(), torch.cuda.device(device):
        half, full = (torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float16, torch.float32))
        if torch.cuda.is_bf16_supported():
            half = half.bfloat16()
        other, pinned = torch.empty_like(full), torch.empty(host_bytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(host_bytes, dtype=torch.uint8, device=device)
        to_host = host_bytes / _seconds(lambda: pinned.copy_(there, non_blocking=True), 2)
        from_host = host_bytes / _seconds(lambda: there.copy_(pinned, non_blocking=True), 2)
        copy = 2 * full.numel() * 4 / _seconds(lambda: other.copy_(full), 10)
        product_32 = 2 * size**3 / _seconds(lambda: full @ full, 1)
        product = 2 * size**3 / _seconds(lambda: half @ half, 10)  # the last: what was idle is slow at first
    # Short bursts run faster than a training step can, by about this much (DESIGN section 11: near 800 against 650 to 720).
    rates = Rates(f"measured: {name}", 0.85 * product, 0.85 * product_32, copy, to_host, from_host)
    logger.info("rates of %s: %s", name, rates)
    return rates


def _seconds(run: Callable[[], object], times: int) -> float:
    """Of one call, in the best of three rounds of ``times``: a host that pauses must not make the device look slow."""
    run()
    torch.cuda.synchronize()
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / times)
    return min(rounds)
