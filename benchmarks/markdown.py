"""Pieces of generated tables."""

from __future__ import annotations

from typing import Any


def grid(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body]]
    return "\n".join(lines)


def source(found: list[dict[str, Any]]) -> str:
    """The machine, versions and commits of the rows shown."""
    shown = ("torch", "triton", "transformers", "liger-kernel", "unsloth")
    versions = {name: version for row in found for name, version in row["versions"].items() if name in shown}
    names = " ".join(f"{name} {versions[name]}" for name in shown if name in versions)
    commits = ", ".join(dict.fromkeys(row["commit"][:12] for row in found))
    return f"{found[-1]['gpu']}, {names}, commit {commits}"
