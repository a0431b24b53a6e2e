"""Which configuration a launch uses: timed once on the device, then fixed, in this process and on disk.

Candidates are timed in turn, round after round, so that what disturbs the device disturbs them alike; the rule of thumb stays
unless another is clearly faster. A choice is keyed by program, schedule, widths, bucket of row counts, device and Triton version.
Within a process it never changes once used, so the same shapes give the same bits. ``FXFUSE_AUTOTUNE=0`` takes the rule of thumb
and times nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton

from fxfuse.kernels import patience, room
from fxfuse.kernels.configuration import Config, candidates, default, shared_memory
from fxfuse.kernels.layout import Layout
from fxfuse.kernels.library import cache_dir, keep
from fxfuse.program import Program
from fxfuse.residuals import STATISTIC

log = logging.getLogger("fxfuse")

# Below this many elements moved a launch costs its overhead whatever the configuration.
WORTH_TIMING = 4 * 2**20
# Of other data that is read between launches: more than a cache holds.
OTHER_BYTES = 2**27
ROUNDS, REPEATS = 15, 3
# Another configuration than the rule of thumb must take less than this share of its time: two timings of one differ by 3%.
CLEARLY_FASTER = 0.95
# Part of the key: choices made by another method are not found.
METHOD = "5"

_chosen: dict[str, Config] = {}
_untimed: list[None] = []


def enabled() -> bool:
    return not _untimed and os.environ.get("FXFUSE_AUTOTUNE", "1") != "0"


@contextmanager
def untimed() -> Iterator[None]:
    """Launches in here that are new take the rule of thumb: where one loop makes many widths of one program, timing each costs more
    than it gives."""
    _untimed.append(None)
    try:
        yield
    finally:
        _untimed.pop()


def key_of(program: Program, kind: str, layout: Layout, device: torch.device, beside: Layout | None = None) -> str:
    """The identity of a choice; row counts share a bucket up to a factor of 2. ``beside``: of the second set of a pair.

    A forward that keeps statistics for its backward and the same forward without gradients share a choice: how a row is summed up
    depends on it, and the log-probabilities of a policy and of its reference are to be the same bits where their weights are.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    count = len(program.arguments)
    kept = [k for k, output in enumerate(program.outputs) if not output.name.startswith(STATISTIC)]
    accesses = *layout.accesses[:count], *(layout.accesses[count + k] for k in kept)
    text = _text_of(replace(program, outputs=tuple(program.outputs[k] for k in kept)))
    widths = () if not layout.sizes and kind == "tiled" else layout.widths
    size = max(layout.rows, 1).bit_length() if widths else dict(layout.widths).popitem()[1].bit_length()
    text = "\n".join([METHOD, text, kind, str(accesses), str(widths), str(size), name, triton.__version__])
    if beside is not None:
        text += f"\n{beside.accesses} {beside.rows.bit_length()}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# Sequence lengths ask again and again.
_text_of = lru_cache(maxsize=4096)(str)


def choose(program: Program, kind: str, layout: Layout, device: torch.device, elements: int,
           ready: Callable[[Config], Callable[[], object] | None], beside: Layout | None = None, made: int = 0) -> Config:
    """The configuration of a launch. ``ready(config)`` compiles it and returns what runs it (None: it does not fit the device);
    ``elements``: how many the launch moves; ``beside``: see ``key_of``; ``made``: bytes of new memory that it writes."""
    key = key_of(program, kind, layout, device, beside)
    if key not in _chosen:
        _chosen[key] = _stored(key) or _best(key, program, kind, layout, device, elements, ready, made)
    return _chosen[key]


def likely(program: Program, kind: str, layout: Layout, device: torch.device, elements: int, beside: Layout | None = None
           ) -> list[Config]:
    """What a launch to come will use, or what will be timed for it."""
    key = key_of(program, kind, layout, device, beside)
    known = _chosen.get(key) or _stored(key)
    if known is not None:
        return [known]
    shared = shared_memory(device)
    return candidates(program, kind, layout, shared) if _worth_timing(device, elements) else [default(program, kind, layout, shared)]


def _worth_timing(device: torch.device, elements: int) -> bool:
    return enabled() and device.type == "cuda" and elements >= WORTH_TIMING


def settle(program: Program, kind: str, layout: Layout, device: torch.device, config: Config) -> None:
    """From now on these launches use ``config``: what was chosen does not fit the device."""
    _chosen[key_of(program, kind, layout, device)] = config


def _best(key: str, program: Program, kind: str, layout: Layout, device: torch.device, elements: int,
          ready: Callable[[Config], Callable[[], object] | None], made: int) -> Config:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    shared = shared_memory(device)
    if not _worth_timing(device, elements) or capturing or not room.is_there(OTHER_BYTES + made, device):
        return default(program, kind, layout, shared)
    trials, complete = patience.in_time(candidates(program, kind, layout, shared), ready, device)
    if not trials:
        return default(program, kind, layout, shared)
    try:
        times = dict(zip(trials, times_on_device(list(trials.values())), strict=True))
    except torch.OutOfMemoryError:  # what a plan leaves need not be free in one piece, and without a plan nobody has looked
        log.info("%s: there is no memory to time it", kind)
        return default(program, kind, layout, shared)
    chosen = fastest(times)
    log.info("%s: %s; of %s", kind, chosen, "; ".join(f"{ms * 1e3:.1f} us {config}" for config, ms in times.items()))
    if complete:
        _store(key, chosen, times)
    return chosen


def fastest(times: dict[Config, float]) -> Config:
    """The first (the rule of thumb) unless another is clearly faster."""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] < CLEARLY_FASTER * times[first] else first


def times_on_device(launches: list[Callable[[], object]]) -> list[float]:
    """The median milliseconds of each launch, over ROUNDS rounds in which all take turns.

    Other data is read between the launches, and that is timed with them and taken off again: a launch finds nothing of its own in the
    cache, and what it leaves there to be written back is paid for while it is timed, as it is between the kernels of a model. (A
    launch timed by itself writes half of its results into the cache only; what wins then is not what wins in a model.)
    """
    other = torch.zeros(OTHER_BYTES // 4, dtype=torch.float32, device="cuda")
    for launch in launches:
        launch()
    nothing: list[Callable[[], object]] = [lambda: None]
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in (*launches, None)]
    for _ in range(ROUNDS):
        for launch, own in zip(launches + nothing, events, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            other.sum()
            start.record()
            for _ in range(REPEATS):
                launch()
                other.sum()
            end.record()
            own.append((start, end))
    torch.cuda.synchronize()
    *times, reading = [sorted(start.elapsed_time(end) / REPEATS for start, end in own)[ROUNDS // 2] for own in events]
    return [max(time - reading, 0.0) for time in times]


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


def _store(key: str, config: Config, times: dict[Config, float]) -> None:
    rows = [{"us": round(ms * 1e3, 2), **asdict(candidate)} for candidate, ms in times.items()]
    keep(_folder() / f"{key}.json", json.dumps({"config": asdict(config), "times": rows}, indent=1))
