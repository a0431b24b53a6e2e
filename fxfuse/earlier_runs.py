"""What an earlier run of this very build found out, kept on disk: the verdicts on sites, the names of programs.

An entry is found by everything that it depends on: what is asked, the sources of fxfuse, the versions of torch and Triton (and of what
is compared with), and for a verdict the device. ``FXFUSE_REMEMBER=0`` asks everything anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .kernels.library import cache_dir, keep

_LOADED = time.time()


def enabled() -> bool:
    return os.environ.get("FXFUSE_REMEMBER", "1") != "0"


def recall(kind: str, *asked: str) -> Any:
    """The answer that an earlier run stored, or None; a file that cannot be read as one (a full disk, another hand) is no answer."""
    if not enabled():
        return None
    path = _path(kind, asked)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def remember(kind: str, answer: Any, *asked: str) -> None:
    """Stores what json can hold, where there is room for it."""
    if enabled():
        keep(_path(kind, asked), json.dumps(answer))


def _path(kind: str, asked: tuple[str, ...]) -> Path:
    text = "\n".join([build(), *asked])
    return cache_dir() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@cache
def build() -> str:
    """This build of fxfuse and what it stands on: a change of any source asks everything anew.

    Sources that changed after this process loaded them (an upgrade, an edit) are not what it runs: it is a build of its own then.
    """
    digest = hashlib.sha256()
    home = Path(__file__).resolve().parent
    folders = [home, *(folder for folder in (home.parent / "kernels", home.parent / "patterns") if folder.is_dir())]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    for file in files:
        digest.update(file.read_bytes())
    if any(file.stat().st_ctime > _LOADED for file in files):
        digest.update(f"{os.getpid()} {time.time_ns()}".encode())
    others = " ".join(f"{package} {_version_of(package)}" for package in ("triton", "sympy", "bitsandbytes"))
    return f"{digest.hexdigest()} torch {torch.__version__} {others}"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
