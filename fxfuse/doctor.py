"""``fxfuse doctor``: what is installed, what was tried on this machine just now, and what will work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

PACKAGES = ("fxfuse", "torch", "triton", "sympy", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "flash-attn-4")
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``needed``: without it fxfuse does not work at all."""

    name: str
    good: bool
    told: str
    needed: bool = False


def versions() -> dict[str, str]:
    """Versions of Python and of each package that matters; "" where it is absent."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def examine() -> list[Finding]:
    """Look at everything; a check that fails becomes a finding, with what to do about it."""
    return [_try(name, check) for name, check in CHECKS.items()]


def healthy(findings: list[Finding]) -> bool:
    """Does everything work that nothing works without?"""
    return all(finding.good for finding in findings if finding.needed)


def _try(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    needed = name in NEEDED
    try:
        good, told = check()
    except Exception as error:  # a broken installation breaks in any way; what broke is what doctor is asked
        good, told = False, f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(name, good, told, needed)


def _python() -> tuple[bool, str]:
    told = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    return sys.version_info >= (3, 10), told


def _torch() -> tuple[bool, str]:
    import torch

    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    told = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if numbers < OLDEST_TORCH:
        return False, f"{told}: older than 2.11; pip install 'torch>=2.11'"
    return True, told


def _entry_point() -> tuple[bool, str]:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fxfuse")
    if not points:
        return False, "not registered: torch.compile(backend='fxfuse') needs fxfuse installed (pip install .)"
    point = next(iter(points))
    point.load()
    return True, f"torch.compile(backend='fxfuse') -> {point.value}"


def _fuse_on(device: str) -> tuple[bool, str]:
    """Fuse a norm and compare value and gradients with float64."""
    import torch

    import fxfuse

    if device == "cuda" and not torch.cuda.is_available():
        return False, "no GPU"

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator).to(device) for shape in ((33, 65), (65,))]

    def grads(f: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w = (tensor.to(dtype).requires_grad_() for tensor in drawn)
        y = f(x, w)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

    ours, exact = grads(fxfuse.fuse(norm), torch.float32), grads(norm, torch.float64)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))
    return worst < 1e-6, f"a fused norm and its derived gradients: {worst:.1e} from float64"


def _gpu() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, f"none (torch is built for {torch.version.cuda or torch.version.hip or 'the CPU only'})"
    names = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        names.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return True, ", ".join(names)


def _triton() -> tuple[bool, str]:
    import torch
    import triton

    if not torch.cuda.is_available():
        return True, f"{triton.__version__}: kernels can be written and compiled here, and run on a GPU"
    return True, triton.__version__


def _compiler() -> tuple[bool, str]:
    chosen = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if chosen is None:
        return False, "none: Triton's launcher and Inductor's CPU code need one (install gcc, or set CC)"
    return True, chosen


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "python": _python,
    "torch": _torch,
    "backend": _entry_point,
    "cpu": lambda: _fuse_on("cpu"),
    "gpu": _gpu,
    "triton": _triton,
    "compiler": _compiler,
    "gpu kernels": lambda: _fuse_on("cuda"),
}
NEEDED = ("python", "torch", "cpu")


def prognosis(findings: list[Finding]) -> list[str]:
    """What will work here, in sentences."""
    good = {finding.name: finding.good for finding in findings}
    present = versions()
    told = []
    if not healthy(findings):
        return ["fxfuse does not work here; the lines marked NO say why."]
    if good["gpu"]:
        works = "with generated Triton kernels" if good["gpu kernels"] else "not yet: see 'gpu kernels'"
        told.append(f"optimize, fuse, torch.compile: on the GPU {works}.")
    told.append("optimize, fuse, derive, explain: on the CPU (right, and no faster than eager).")
    if not good["backend"]:
        told.append("torch.compile(backend='fxfuse'): not found by name.")
    if not present["transformers"]:
        told.append("demo, explain, bench, validate: need transformers (pip install 'fxfuse[demo]').")
    return told
