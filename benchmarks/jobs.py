"""What the driver and a worker of steps.py agree on: names, options, and files that say whose turn it is."""

from __future__ import annotations

import argparse
import ast
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import RESULTS

if TYPE_CHECKING:
    from benchmarks.workloads import Workload

BASES = ("hf", "hf-exact", "liger", "liger-flce", "unsloth", "unsloth-noblock", "fxfuse")
COMPILED = ("", "compile", "regional")
OFFLINE = dict(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DISABLE_TELEMETRY="1",
    UNSLOTH_DISABLE_STATISTICS="1",
    TOKENIZERS_PARALLELISM="false",
)
_NAME = re.compile(r"(?P<base>[a-z-]+?)(?:\+(?P<compiled>[a-z]+))?(?:\[(?P<options>[^\]]*)\])?")
_SEQUENCES = ("exclude", "rules")


@dataclass(frozen=True)
class Contender:
    """A parsed contender name; peers.py says what each is.

    It may carry options: `fxfuse[exclude=rope,attention;remainder=inductor;FXFUSE_AUTOTUNE=0]`. Lower-case keys are
    arguments of fxfuse.optimize, upper-case ones environment variables of its process.
    """

    name: str
    base: str
    compiled: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> Contender:
        match = _NAME.fullmatch(name)
        base, compiled = (match["base"], match["compiled"] or "") if match else ("", "")
        if match is None or base not in BASES or compiled not in COMPILED:
            raise ValueError(
                f"no contender {name!r}; there are {', '.join(BASES)}, each with +compile or +regional"
            )
        arguments: dict[str, Any] = {}
        environment: dict[str, str] = {}
        for part in filter(None, (match["options"] or "").split(";")):
            key, _, value = part.partition("=")
            if key.isupper():
                environment[key] = value
            else:
                arguments[key] = tuple(value.split(",")) if key in _SEQUENCES else _literal(value)
        if arguments and base != "fxfuse":
            raise ValueError(f"{name}: only fxfuse takes options")
        return cls(name, base, compiled, arguments, environment)

    @property
    def needs_unsloth(self) -> bool:
        return self.base.startswith("unsloth")

    def process_environment(self, scratch: Path) -> dict[str, str]:
        """What its process must find in the environment before anything is imported."""
        found = dict(OFFLINE, **self.environment)
        if self.needs_unsloth:
            found["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "unsloth_cache")
            site = os.environ.get("UNSLOTH_SITE", "")
            found["PYTHONPATH"] = os.pathsep.join(p for p in (site, os.environ.get("PYTHONPATH", "")) if p)
        if self.base == "unsloth-noblock":
            found["UNSLOTH_BLOCK_COMPILE"] = "0"
        return found


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


_JOB = re.compile(
    r"(?P<name>(?P<workload>\w+):(?P<contender>[^:@]+)(?::(?P<repeat>\d+))?)(?:@(?P<limit>\d+))?"
)


@dataclass(frozen=True)
class JobName:
    """`W1:fxfuse[exclude=rope]:1@90`: workload, contender, repeat (which finds warm caches), limit in seconds."""

    name: str
    workload: str
    contender: str
    repeat: int = 0
    limit: float | None = None

    @classmethod
    def of(cls, text: str) -> JobName:
        match = _JOB.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no job: WORKLOAD:CONTENDER[:REPEAT][@SECONDS]")
        limit = float(match["limit"]) if match["limit"] else None
        Contender.of(match["contender"])  # says what is wrong with it before anything runs
        return cls(match["name"], match["workload"], match["contender"], int(match["repeat"] or 0), limit)

    @property
    def tag(self) -> str:
        """A file name."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip("_")

    @property
    def cache_tag(self) -> str:
        """Repeats of a job share its compilation caches; no other job does."""
        return re.sub(r"[^\w.-]+", "_", f"{self.workload}_{self.contender}").strip("_")


def split(suite: str) -> list[JobName]:
    """Jobs between commas; a comma inside [...] separates nothing."""
    return [JobName.of(text.strip()) for text in re.split(r",(?![^\[]*\])", suite) if text.strip()]


@dataclass(frozen=True)
class Job:
    """A job as its worker runs it."""

    name: str
    workload: Workload
    contender: Contender
    repeat: int
    profiled: bool

    @classmethod
    def of(cls, text: str, args: argparse.Namespace) -> Job:
        from benchmarks.workloads import WORKLOADS

        named = JobName.of(text)
        workload = replace(WORKLOADS[named.workload], layers=args.layers, tiny=args.tiny)
        if args.length:
            workload = replace(workload, length=args.length)
        return cls(named.name, workload, Contender.of(named.contender), named.repeat, args.profiled)

    def columns(self) -> dict[str, Any]:
        w = self.workload
        whole = not (w.layers or w.tiny) and w.length == type(self).full_length(w.name)
        return dict(
            workload=w.name,
            contender=self.contender.name,
            repeat=self.repeat,
            whole=whole,
            setup=w.describe(),
        )

    @staticmethod
    def full_length(name: str) -> int:
        from benchmarks.workloads import WORKLOADS

        return WORKLOADS[name].length


class Signals:
    """Files in one folder a job: `ready`, `go`, `timing`, `timed`, and `stage` with what the worker is at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = "importing"
        folder.mkdir(parents=True, exist_ok=True)

    def set(self, name: str) -> None:
        (self.folder / name).touch()

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def stage(self, text: str) -> None:
        self.last = text
        (self.folder / "stage").write_text(text)

    def last_stage(self) -> str:
        path = self.folder / "stage"
        return path.read_text() if path.exists() else "importing"

    def wait_for_turn(self) -> None:
        self.set("ready")
        while not self.has("go"):
            time.sleep(0.02)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """The driver sees this and stops the processes that import meanwhile."""
        self.set("timing")
        time.sleep(0.1)
        try:
            yield
        finally:
            self.set("timed")


def options(parser: argparse.ArgumentParser) -> None:
    """Of the driver, and handed on by it to its workers."""
    parser.add_argument("--out", default=str(RESULTS / "steps.jsonl"))
    parser.add_argument("--layers", type=int, default=0, help="cut every model to this many layers")
    parser.add_argument("--length", type=int, default=0, help="another sequence length")
    parser.add_argument("--tiny", action="store_true", help="the same structures at widths a CPU can train")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--parity",
        type=int,
        default=0,
        metavar="N",
        help="losses and gradient norms of steps 0 to N, untimed",
    )
    parser.add_argument("--no-count", action="store_true", help="no profiled step: no kernel counts")


def handed_on(args: argparse.Namespace) -> list[str]:
    """The same options as a command line."""
    command: list[str] = []
    for name in ("out", "layers", "length", "warmup", "steps", "parity"):
        command += [f"--{name}", str(getattr(args, name))]
    for name in ("tiny", "cpu", "no_count"):
        command += [f"--{name.replace('_', '-')}"] if getattr(args, name) else []
    return command
