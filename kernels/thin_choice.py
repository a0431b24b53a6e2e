"""Who computes a pair of thin products: our kernels, that read the matrix once, or the library's two matmuls. Timed once, then fixed.

The kernels' results are compared with the library's before any of them is chosen. A choice holds for sizes (row counts share one up to
a factor of 2), dtype and device, in this process and on disk. Small pairs, and all where nothing is timed, are the library's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse.kernels import tuning
from fxfuse.kernels.abilities import of_device
from fxfuse.kernels.invoke import INTERPRETED
from fxfuse.kernels.library import cache_dir, write_atomically
from fxfuse.kernels.thin_pair import CONFIGS, Config, Sizes, ThinPair, sizes_of
from fxfuse.products.calls import two_products

log = logging.getLogger("fxfuse")

METHOD = "1"  # part of the key on disk: choices made by another method are not found
WORTH_TIMING = 8 * 2**20  # bytes of the matrix below which launches count, and not bytes
KEPT = 4096  # launches of different sizes that are kept ready

_launches: dict[tuple, ThinPair | None] = {}
_chosen: dict[str, Config | None] = {}


class Operands(NamedTuple):
    """See thin_pair.py: what is read, and where the results go (``down`` may be float32)."""

    matrix: Tensor
    right: Tensor
    left: Tensor
    across: Tensor
    down: Tensor


def library(operands: Operands, alpha: float, beta: float) -> None:
    """The same by the library."""
    two_products(*operands, alpha, beta)


def compute(operands: Operands, alpha: float, beta: float) -> None:
    """``across = alpha * matrix @ right`` and ``down = beta * matrix' @ left``, by whom it was chosen for such operands."""
    sizes = sizes_of(*operands[:4])
    launch = None if sizes is None else _launch(sizes, operands, alpha, beta)
    if launch is None:
        library(operands, alpha, beta)
    else:
        launch(*operands)


def _launch(sizes: Sizes, operands: Operands, alpha: float, beta: float) -> ThinPair | None:
    alignment = sum((t.data_ptr() & 15) << 4 * i for i, t in enumerate(operands))
    key = (sizes, operands.matrix.dtype, operands.down.dtype, operands.matrix.device, alignment, alpha, beta)
    if key not in _launches:
        config = _choice(sizes, operands, alpha, beta)
        if len(_launches) >= KEPT:
            _launches.clear()
        _launches[key] = None if config is None else ThinPair(sizes, config, operands.matrix.device, alpha, beta)
    return _launches[key]


def _choice(sizes: Sizes, operands: Operands, alpha: float, beta: float) -> Config | None:
    matrix = operands.matrix
    if INTERPRETED:
        return CONFIGS[0]
    if not _suits(matrix) or not tuning.enabled() or torch.cuda.is_current_stream_capturing():
        return None
    key = _key(sizes, matrix)
    if key not in _chosen:
        path = _path(key)
        _chosen[key] = _read(path) if path.exists() else _timed(path, sizes, operands, alpha, beta)
    return _chosen[key]


def _suits(matrix: Tensor) -> bool:
    """Is this a device with the tensor cores that the kernel counts on, and a matrix worth the trouble."""
    able = of_device(matrix.device).pairs or torch.version.hip is not None
    return matrix.is_cuda and able and matrix.numel() * matrix.itemsize >= WORTH_TIMING


def _key(sizes: Sizes, matrix: Tensor) -> str:
    about = (METHOD, sizes.rows.bit_length(), *sizes[1:], matrix.dtype, torch.cuda.get_device_name(matrix.device), triton.__version__)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _path(key: str) -> Path:
    folder = cache_dir() / "tuned"
    folder.mkdir(exist_ok=True)
    return folder / f"pair-{key}.json"


def _read(path: Path) -> Config | None:
    found = json.loads(path.read_text())["config"]
    return None if found is None else Config(**found)


def _timed(path: Path, sizes: Sizes, operands: Operands, alpha: float, beta: float) -> Config | None:
    """The fastest of the library and the configurations that compile, fit and agree with it; None is the library."""

    def by_library() -> None:
        library(operands, alpha, beta)

    by_library()
    truth = [operands.across.clone(), operands.down.clone()]
    candidates: dict[Config | None, Callable[[], Any]] = {None: by_library}
    for config, launch in _compiled(sizes, operands, alpha, beta).items():
        launch(*operands)
        if _agree(truth, [operands.across, operands.down], operands.matrix.dtype):
            candidates[config] = lambda launch=launch: launch(*operands)  # type: ignore[misc]
        else:
            log.error("%s of a pair of thin products %s differs from the library's result and is not used", config, sizes)
    batch = 3 if operands.matrix.numel() * operands.matrix.itemsize >= tuning.BEYOND_CACHE else 1
    times = dict(zip(candidates, tuning.times_on_device(list(candidates.values()), batch), strict=True))
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < tuning.CLEARLY_FASTER * times[None] else None
    rows = [{"us": round(ms * 1e3, 2), "config": None if config is None else asdict(config)} for config, ms in times.items()]
    log.info("thin pair %s: %s; of %s", sizes, chosen or "the library", rows)
    write_atomically(path, json.dumps({"config": None if chosen is None else asdict(chosen), "times": rows}, indent=1))
    return chosen


def _compiled(sizes: Sizes, operands: Operands, alpha: float, beta: float) -> dict[Config, ThinPair]:
    """The configurations that fit the device, compiled side by side."""

    def ready(config: Config) -> ThinPair | None:
        launch = ThinPair(sizes, config, operands.matrix.device, alpha, beta)
        try:
            launch.load(*operands)
        except OutOfResources:
            return None
        return launch

    with ThreadPoolExecutor(len(CONFIGS), thread_name_prefix="fxfuse-compile") as pool:
        made = zip(CONFIGS, pool.map(ready, CONFIGS), strict=True)
        return {config: launch for config, launch in made if launch is not None}


def _agree(truth: list[Tensor], ours: list[Tensor], dtype: torch.dtype) -> bool:
    """Within what rounding the results to ``dtype`` once can make of equal sums."""
    return all(bool((a.float() - b.float()).norm() <= 4 * torch.finfo(dtype).eps * a.float().norm())
               for a, b in zip(truth, ours, strict=True))
