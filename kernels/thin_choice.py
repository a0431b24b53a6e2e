"""Who computes thin products: our kernels, or the library's matmuls. Timed once, then fixed.

The kernels' results are compared with the library's before any of them is chosen. A choice holds for sizes (row counts share one up to
a factor of 2), dtype and device, in this process and on disk. What is small, and all where nothing is timed, is the library's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse.kernels import patience, room, thin_outer, thin_pair, tuning
from fxfuse.kernels.abilities import of_device
from fxfuse.kernels.invoke import INTERPRETED
from fxfuse.kernels.library import cache_dir, keep
from fxfuse.products.calls import one_product, two_products

log = logging.getLogger("fxfuse")

METHOD = "2"  # part of the key on disk: choices made by another method are not found
WORTH_TIMING = 8 * 2**20  # bytes of the large matrix below which launches count, and not bytes
COMPARED = 2**22  # numbers of a result that are compared at a time
KEPT = 4096  # launches of different sizes that are kept ready

_launches: dict[tuple, Any] = {}
_chosen: dict[str, Any] = {}


class Question(NamedTuple):
    """One product or pair: the kind of launch, its sizes, all tensors, how many of them (the last) are written, the large one, the
    factors, and what the library would do."""

    kind: Any
    sizes: Any
    tensors: Sequence[Tensor]
    written: int
    large: Tensor
    factors: tuple[float, ...]
    library: Callable[[], None]

    @property
    def results(self) -> Sequence[Tensor]:
        return self.tensors[-self.written:]

    def launch(self, config: Any) -> Any:
        return self.kind(self.sizes, config, self.large.device, *self.factors)


def pair(matrix: Tensor, right: Tensor, left: Tensor, across: Tensor, down: Tensor, alpha: float, beta: float) -> Any:
    """``across = alpha * matrix @ right`` and ``down = beta * matrix' @ left`` (which may be float32). Returns the launch that did
    it, None for the library."""
    tensors = (matrix, right, left, across, down)
    return _answer(Question(thin_pair.ThinPair, thin_pair.sizes_of(*tensors[:4]), tensors, 2, matrix, (alpha, beta),
                            lambda: two_products(*tensors, alpha, beta)))  # fmt: skip


def outer(left: Tensor, right: Tensor, out: Tensor, alpha: float, base: Tensor | None = None) -> Any:
    """``out = alpha * left @ right``, the contraction short, and ``base`` added, if there is one. Returns as ``pair`` does."""
    tensors = (left, right, out if base is None else base, out)
    return _answer(Question(thin_outer.ThinOuter, thin_outer.sizes_of(left, right, base, out), tensors, 1, out, (alpha,),
                            lambda: one_product(left, right, out, alpha, base)))  # fmt: skip


def _answer(asked: Question) -> Any:
    launch = None if asked.sizes is None else _launch(asked)
    if launch is None:
        asked.library()
    else:
        launch(*asked.tensors)
    return launch


def _launch(asked: Question) -> Any:
    alignment = sum((t.data_ptr() & 15) << 4 * i for i, t in enumerate(asked.tensors))
    key = (asked.kind, asked.sizes, asked.large.dtype, asked.tensors[-1].dtype, asked.large.device, alignment, asked.factors)
    if key not in _launches:
        config = _choice(asked)
        if len(_launches) >= KEPT:
            _launches.clear()
        _launches[key] = None if config is None else asked.launch(config)
    return _launches[key]


def _choice(asked: Question) -> Any:
    """A configuration, or None for the library."""
    if INTERPRETED:
        return asked.kind.configs[0]
    if not _suits(asked.large) or not tuning.enabled() or torch.cuda.is_current_stream_capturing():
        return None
    key = _key(asked)
    if key not in _chosen:
        path = _path(key)
        try:
            _chosen[key] = _read(path, asked) if path.exists() else _timed(path, asked)
        except torch.OutOfMemoryError:
            _chosen[key] = None
    return _chosen[key]


def _suits(large: Tensor) -> bool:
    """Is this a device with the tensor cores that the kernels count on, and a matrix worth the trouble."""
    able = of_device(large.device).pairs or torch.version.hip is not None
    return large.is_cuda and able and large.numel() * large.itemsize >= WORTH_TIMING


def _key(asked: Question) -> str:
    about = (METHOD, asked.kind.__name__, asked.sizes.rows.bit_length(), *asked.sizes[1:], asked.large.dtype,
             torch.cuda.get_device_name(asked.large.device), triton.__version__)  # fmt: skip
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _path(key: str) -> Path:
    folder = cache_dir() / "tuned"
    folder.mkdir(exist_ok=True)
    return folder / f"thin-{key}.json"


def _read(path: Path, asked: Question) -> Any:
    found = json.loads(path.read_text())["config"]
    return None if found is None else type(asked.kind.configs[0])(**found)


def _timed(path: Path, asked: Question) -> Any:
    """The fastest of the library and the configurations that are there in time, fit and agree with it; None is the library, also where
    there is no memory to find out."""
    compared = sum(result.numel() * result.itemsize for result in asked.results) + COMPARED * 12
    if not room.is_there(max(compared, tuning.OTHER_BYTES), asked.large.device):
        return None
    asked.library()
    truth = [result.clone() for result in asked.results]
    candidates: dict[Any, Callable[[], Any]] = {None: asked.library}
    launches, complete = patience.in_time(asked.kind.configs, partial(_ready, asked), asked.large.device, needed=0)
    for config, launch in launches.items():
        launch(*asked.tensors)
        if _agree(truth, asked.results, asked.large.dtype):
            candidates[config] = lambda launch=launch: launch(*asked.tensors)  # type: ignore[misc]
        else:
            log.error("%s of thin products %s differs from the library's result and is not used", config, asked.sizes)
    del truth
    times = dict(zip(candidates, tuning.times_on_device(list(candidates.values())), strict=True))
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < tuning.CLEARLY_FASTER * times[None] else None
    rows = [{"us": round(ms * 1e3, 2), "config": None if config is None else asdict(config)} for config, ms in times.items()]
    log.info("%s %s: %s; of %s", asked.kind.__name__, asked.sizes, chosen or "the library", rows)
    if complete:
        keep(path, json.dumps({"config": None if chosen is None else asdict(chosen), "times": rows}, indent=1))
    return chosen


def _ready(asked: Question, config: Any) -> Any:
    """The launch of a configuration, compiled and loaded; None where it does not fit the device."""
    launch = asked.launch(config)
    try:
        launch.load(*asked.tensors)
    except OutOfResources:
        return None
    return launch


def _agree(truth: Sequence[Tensor], ours: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Within what rounding the results to ``dtype`` once can make of equal sums. In blocks of rows: results are large."""
    for a, b in zip(truth, ours, strict=True):
        rows = max(1, COMPARED // max(a.shape[1], 1))
        norms = torch.stack([torch.stack([(x.float() - y.float()).norm(), x.float().norm()])
                             for x, y in zip(a.split(rows), b.split(rows), strict=True)])
        distance, size = norms.norm(dim=0)
        if not bool(distance <= 4 * torch.finfo(dtype).eps * size):
            return False
    return True
