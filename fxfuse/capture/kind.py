"""What is learnt about modules of one kind as they run, and the sentences that a report makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Kind:
    """What is known of all modules of one kind; shared by their dispatchers."""

    name: str
    role: str  # "block", "leaf", "whole", "head", "part"
    modules: int = 0
    captured: bool = False  # a call of one of them has run captured
    broken: dict[bool, str] = field(
        default_factory=dict
    )  # why Dynamo cannot capture any; [True]: given a cache
    broken_modules: Counter[str] = field(default_factory=Counter)  # why it cannot capture some, and how many
    limit: bool = False  # ran eager because Dynamo's recompile limit was reached
    eager: Counter[str] = field(default_factory=Counter)  # calls that ran eager though gradients were on
    replayed: dict[str, set[int]] = field(default_factory=dict)  # what checkpoints left out, and in which modules


def first_line(error: BaseException) -> str:
    """The first sentence of a Dynamo error; the rest is advice for people who write the model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explanation = next((line for line in lines if line.startswith("Explanation: ")), "")
    return " ".join(part for part in (lines[0] if lines else type(error).__name__, explanation) if part)


def broken_sentences(kind: Kind) -> list[str]:
    """What Dynamo cannot capture of a kind, and why."""
    name = f"{kind.name} ({kind.modules} modules)"
    instead = (
        "is not captured"
        if kind.role in ("head", "stack")
        else "stays eager and its parts are captured instead"
    )
    given = {True: " when given a key/value cache", False: ""}
    lines = [f"{name} {instead}{given[with_cache]}: {why}" for with_cache, why in kind.broken.items()]
    return lines + [f"{count} of {name} {instead}: {why}" for why, count in kind.broken_modules.items()]


def replayed_sentences(kind: Kind) -> list[str]:
    """What the user's checkpoints did not have to compute again."""
    return [f"checkpointing: {len(modules)} {kind.name} {kind.role}s, recomputed without {what}"
            for what, modules in kind.replayed.items()]


def limit_sentence(kind: Kind) -> str:
    return (
        f"{kind.name} ({kind.modules} modules) reached Dynamo's recompile limit; calls of a new sort run eager from "
        f"here on. See TORCH_LOGS=recompiles for what differs between calls"
    )
