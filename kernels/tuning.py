"""Which configuration a launch uses: timed once on the device, then fixed, in this process and on disk.

A choice is keyed by program, schedule, widths, bucket of row counts, device and Triton version. Within a process it never changes
once used, so the same shapes give the same bits. ``FXFUSE_AUTOTUNE=0`` takes the rule of thumb and times nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import triton

from fxfuse.kernels.configuration import Config, candidates, default, shared_memory
from fxfuse.kernels.layout import Layout
from fxfuse.kernels.library import cache_dir, write_atomically
from fxfuse.program import Program

log = logging.getLogger("fxfuse")

# Below this many elements moved a launch costs its overhead whatever the configuration.
WORTH_TIMING = 4 * 2**20
ROUNDS = 9

_chosen: dict[str, Config] = {}


def enabled() -> bool:
    return os.environ.get("FXFUSE_AUTOTUNE", "1") != "0"


def key_of(program: Program, kind: str, layout: Layout, device: torch.device) -> str:
    """The identity of a choice; row counts share a bucket up to a factor of 2."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    widths = () if not layout.sizes and kind == "tiled" else layout.widths
    size = max(layout.rows, 1).bit_length() if widths else dict(layout.widths).popitem()[1].bit_length()
    text = "\n".join([str(program), kind, str(layout.accesses), str(widths), str(size), name, triton.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def choose(program: Program, kind: str, layout: Layout, device: torch.device, elements: int,
           time: Callable[[Config], float]) -> Config:
    """The configuration of a launch. ``time(config)`` runs it and returns milliseconds (infinity: it does not fit the device);
    ``elements``: how many the launch moves."""
    key = key_of(program, kind, layout, device)
    if key not in _chosen:
        _chosen[key] = _stored(key) or _best(key, program, kind, layout, device, elements, time)
    return _chosen[key]


def settle(program: Program, kind: str, layout: Layout, device: torch.device, config: Config) -> None:
    """From now on these launches use ``config``: what was chosen does not fit the device."""
    _chosen[key_of(program, kind, layout, device)] = config


def _best(key: str, program: Program, kind: str, layout: Layout, device: torch.device, elements: int,
          time: Callable[[Config], float]) -> Config:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    shared = shared_memory(device)
    if not enabled() or device.type != "cuda" or elements < WORTH_TIMING or capturing:
        return default(program, kind, layout, shared)
    timed = sorted(((time(config), k, config) for k, config in enumerate(candidates(program, kind, layout, shared))),
                   key=lambda trial: trial[:2])
    log.info("%s: %s", kind, "; ".join(f"{ms * 1e3:.1f} us {config}" for ms, _, config in timed))
    _store(key, timed[0][2], timed)
    return timed[0][2]


def time_on_device(launch: Callable[[], object]) -> float:
    """The median time of a launch in milliseconds, its data not in the cache."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    launch()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for start, end in events:
        flush.zero_()
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[ROUNDS // 2]


def _folder() -> Path:
    folder = cache_dir() / "tuned"
    folder.mkdir(exist_ok=True)
    return folder


@cache
def _stored(key: str) -> Config | None:
    path = _folder() / f"{key}.json"
    if not enabled() or not path.exists():
        return None
    return Config(**json.loads(path.read_text())["config"])


def _store(key: str, config: Config, timed: list[tuple[float, int, Config]]) -> None:
    times = [{"us": round(ms * 1e3, 2), **asdict(config)} for ms, _, config in timed]
    write_atomically(_folder() / f"{key}.json", json.dumps({"config": asdict(config), "times": times}, indent=1))
