"""One profiled step: GPU kernels by class, how many were launched, and the time between them in which the GPU idles."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import Self

# first match wins; on lower-case kernel names
CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("attention", r"sdpa|fmha|flash|flex_attention|attention"),
        ("dequantization", r"dequant"),
        ("matmul", r"^nvjet|cutlass|cublas|gemm|gemv|splitk|xmma|triton_tem|grouped_mm|^triton_mm|matmul"),
        ("optimizer", r"adam|multi_tensor"),
        ("fxfuse", r"^fxfuse|^fx_|^kernel$|^finish$|^kernel_\w+$"),
        ("inductor", r"^triton_"),
        ("copies, casts", r"memcpy|copy_kernel|copy|catarray|_to_copy|^memset"),
        ("aten", r"at::|at_cuda|cub::|thrust|elementwise|reduce"),
    )
)
OTHER_TRITON = re.compile(r"^_?[a-z][\w.]*$")  # a plain function's name: a hand-written Triton kernel


def class_of(kernel: str) -> str:
    low = kernel.lower()
    if low.startswith("memcpy") and ("htod" in low or "dtoh" in low):
        return "host copies"
    for name, pattern in CLASSES:
        if pattern.search(low):
            return name
    return "other triton" if OTHER_TRITON.match(kernel) else "other"


# operations that tell programs apart too little to be listed
_PLAIN = {"load", "const", "cast", "width", "mul", "add", "sub", "div", "neg", "iota"}


@dataclass(frozen=True)
class Kernel:
    name: str
    start: float  # µs
    duration: float
    grid: str = ""
    program: str = ""  # of our row kernels, which all have one name: what was launched


@dataclass
class Profile:
    """The kernels of one step in the order they began; host calls counted by name."""

    kernels: list[Kernel]
    calls: dict[str, int] = field(default_factory=dict)
    programs: str = ""  # our row programs, printed

    @property
    def busy_ms(self) -> float:
        """Time in which at least one kernel or copy ran."""
        return sum(end - start for start, end in self._spans()) / 1e3

    @property
    def span_ms(self) -> float:
        return (
            (max(k.start + k.duration for k in self.kernels) - self.kernels[0].start) / 1e3
            if self.kernels
            else 0.0
        )

    def _spans(self) -> list[tuple[float, float]]:
        spans: list[tuple[float, float]] = []
        for kernel in self.kernels:
            end = kernel.start + kernel.duration
            if spans and kernel.start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((kernel.start, end))
        return spans

    def classes(self) -> dict[str, tuple[float, int]]:
        """ms and launches by class, longest first."""
        ms: defaultdict[str, float] = defaultdict(float)
        count: defaultdict[str, int] = defaultdict(int)
        for kernel in self.kernels:
            kind = class_of(kernel.name)
            ms[kind] += kernel.duration / 1e3
            count[kind] += 1
        return {k: (round(ms[k], 2), count[k]) for k in sorted(ms, key=lambda k: -ms[k])}

    def gaps(self) -> list[tuple[float, str, str]]:
        """µs of idleness, and the kernels before and after, longest first."""
        found, before = [], None
        for kernel in self.kernels:
            if before is not None:
                gap = kernel.start - (before.start + before.duration)
                if gap > 0:
                    found.append((gap, before.name, kernel.name))
            if before is None or kernel.start + kernel.duration > before.start + before.duration:
                before = kernel
        return sorted(found, reverse=True)

    def row(self) -> dict[str, Any]:
        matmul = [k.duration for k in self.kernels if class_of(k.name) == "matmul"]
        thin = sum(d for d in matmul if d < 60)
        return dict(
            launches=sum(not k.name.lower().startswith(("memcpy", "memset")) for k in self.kernels),
            copies=sum(k.name.lower().startswith(("memcpy", "memset")) for k in self.kernels),
            kernel_ms=round(sum(k.duration for k in self.kernels) / 1e3, 2),
            busy_ms=round(self.busy_ms, 2),
            idle_ms=round(self.span_ms - self.busy_ms, 2),
            thin_matmul_ms=round(thin / 1e3, 2),  # matmuls under 60 µs each
            classes={name: dict(ms=ms, launches=n) for name, (ms, n) in self.classes().items()},
            calls=self.calls,
        )

    def text(self, most: int = 70) -> str:
        """The table for people: classes, the longest kernels, the longest gaps."""
        row = self.row()
        lines = [
            f"kernels {row['launches']}, copies {row['copies']}, sum {row['kernel_ms']} ms, busy {row['busy_ms']} ms, "
            f"idle between kernels {row['idle_ms']} ms; matmuls under 60 µs {row['thin_matmul_ms']} ms; calls {self.calls}",
            *(f"{ms:10.2f} ms {n:6d}  {name}" for name, (ms, n) in self.classes().items()),
            "",
            "      ms  launches      µs  kernel [grid]",
        ]
        together: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        for kernel in self.kernels:
            together[class_of(kernel.name), f"{kernel.name[:120]} {kernel.program}", kernel.grid].append(
                kernel.duration
            )
        longest = sorted(together.items(), key=lambda item: -sum(item[1]))
        for (kind, name, grid), times in longest[:most]:
            total = sum(times)
            lines.append(
                f"{total / 1e3:8.2f} {len(times):9d} {total / len(times):7.1f}  {kind:14} {name} {grid}"
            )
        rest = sum(sum(times) for _, times in longest[most:]) / 1e3
        lines += [
            f"{rest:8.2f} ms in {max(0, len(longest) - most)} more",
            "",
            "longest gaps, µs: after -> before",
        ]
        between: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for gap, before, after in self.gaps():
            between[before[:60], after[:60]].append(gap)
        ranked = sorted(between.items(), key=lambda item: -sum(item[1]))[:25]
        lines += [f"{sum(g):10.0f} ({len(g):4d} x {max(g):7.0f} at most)  {a} -> {b}" for (a, b), g in ranked]
        return "\n".join(lines)


def describe(program: Any) -> str:
    """A row program in a line: its telling operations, and what it gives."""
    told = list(dict.fromkeys(node.op for node in program.nodes if node.op not in _PLAIN))
    outputs = ",".join(output.name for output in program.outputs)
    digest = hashlib.sha256(str(program).encode()).hexdigest()[:6]
    return f"[{digest}: {' '.join(told[:9])}; {len(program.nodes)} nodes -> {outputs}]"


class Launches:
    """While it is entered: when each of our row programs was launched."""

    def __init__(self) -> None:
        self.times: list[int] = []  # ns
        self.programs: list[Any] = []

    def _launched(self, program: Any) -> None:
        self.times.append(time.time_ns())
        self.programs.append(program)

    def __enter__(self) -> Self:
        if "fxfuse" in sys.modules:
            from fxfuse.kernels import launch, pair

            launch.listeners.append(self._launched)
            self._pair_call = call = pair.PreparedPair.__call__

            def told(prepared: Any, first: Any, second: Any) -> Any:
                self._launched(prepared.program)
                return call(prepared, first, second)

            pair.PreparedPair.__call__ = told  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        if "fxfuse" in sys.modules:
            from fxfuse.kernels import launch, pair

            launch.listeners.remove(self._launched)
            pair.PreparedPair.__call__ = self._pair_call  # type: ignore[method-assign]

    def before(self, ns: float) -> str:
        """The program launched last before a moment."""
        at = bisect.bisect_right(self.times, ns) - 1
        return describe(self.programs[at]) if at >= 0 else ""

    def texts(self) -> str:
        """Every program once, as many launches first."""
        counted = Counter(self.programs).most_common()
        return "\n\n".join(f"{describe(program)} launched {n} times\n{program}" for program, n in counted)


def of(step: Callable[[], Any], scratch: Path) -> Profile:
    """Runs `step` once under torch's profiler, kernels and CUDA calls only."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler, Launches() as launches:
        step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_text())
    return from_trace(trace["traceEvents"], launches, trace.get("baseTimeNanoseconds", 0))


def from_trace(events: list[dict[str, Any]], launches: Launches | None = None, base_ns: int = 0) -> Profile:
    """From the events of a Chrome trace, whose host times are µs after `base_ns`."""
    kernels: list[Kernel] = []
    calls: Counter[str] = Counter()
    launched: dict[Any, float] = {}
    for event in events:
        category = event.get("cat", "")
        if category in ("cuda_runtime", "cuda_driver"):
            launched[event.get("args", {}).get("correlation")] = float(event["ts"])
            if re.search(r"malloc|free|synchronize|graphlaunch", event["name"], re.IGNORECASE):
                calls[event["name"]] += 1
    for event in events:
        if event.get("cat", "") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        told = event.get("args", {})
        program = ""
        if launches and class_of(event["name"]) == "fxfuse" and told.get("correlation") in launched:
            program = launches.before(base_ns + launched[told["correlation"]] * 1e3)
        grid = str(told["grid"]) if "grid" in told else ""
        kernels.append(Kernel(event["name"], float(event["ts"]), float(event["dur"]), grid, program))
    return Profile(sorted(kernels, key=lambda k: k.start), dict(calls), launches.texts() if launches else "")
