"""Result rows: one JSON object a line, every row with the same header, so that a table can be traced to its run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "unsloth", "peft", "bitsandbytes")


def commit() -> str:
    """The commit measured: $COMMIT, else git's HEAD, else a digest of the sources (a tree without .git)."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    if git.returncode == 0:
        return git.stdout.strip()
    digest = hashlib.sha256()
    for folder in ("fxfuse", "kernels", "patterns"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return "tree-" + digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


class Writer:
    """Appends rows to a file as they come (a killed run keeps what it measured) and keeps them in `rows`."""

    def __init__(self, path: Path | str, **header: Any) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        run = os.environ.get("RUN") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        os.environ["RUN"] = run  # child processes of one stay on a machine share it
        header.setdefault("gpu", None)
        header["gpu"] = header["gpu"] or device_name()
        self.header = dict(run=run, versions=versions(), commit=commit(), **header)
        self.rows: list[dict[str, Any]] = []

    def write(self, **row: Any) -> dict[str, Any]:
        full = {**row, **self.header}
        self.rows.append(full)
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        return full


def read(path: Path | str) -> list[dict[str, Any]]:
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
