"""Pieces of generated tables."""

from __future__ import annotations

from typing import Any


def grid(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body]]
    return "\n".join(lines)


def source(found: list[dict[str, Any]]) -> str:
    """The machine, versions and commit of the rows shown."""
    last = found[-1]
    names = " ".join(
        f"{k} {v}"
        for k, v in last["versions"].items()
        if k in ("torch", "triton", "transformers", "liger-kernel", "unsloth")
    )
    return f"{last['gpu']}, {names}, commit {last['commit']}"
