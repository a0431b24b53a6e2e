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
CHECKPOINTING = ("", "on", "off", "offload")
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
    arguments of fxfuse.optimize, upper-case ones environment variables of its process. `fxfuse[memory=8GiB|12GiB]` is
    measured at each of these budgets, in one process. `checkpointing` is an option of all: `on`, `off`, or Unsloth's
    `offload`; without it, as the workload has it (and for Unsloth `offload` in place of `on`). So is `attention`, of
    transformers' implementations, for all but unsloth. FLASH4=1 lets a process find flash-attn-4, which lies
    in the folder that $FLASH4_SITE names (wheels.sh).
    """

    name: str
    base: str
    compiled: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    checkpointing: str = ""
    attention: str = ""
    budgets: tuple[Any, ...] = ()

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
        checkpointing = arguments.pop("checkpointing", "")
        if checkpointing not in CHECKPOINTING or (checkpointing == "offload" and not base.startswith("unsloth")):
            raise ValueError(f"{name}: checkpointing is on or off, or for unsloth offload, not {checkpointing}")
        attention = str(arguments.pop("attention", ""))
        if attention and base.startswith("unsloth"):
            raise ValueError(f"{name}: unsloth chooses its attention itself")
        if arguments and base != "fxfuse":
            raise ValueError(f"{name}: only fxfuse takes options but checkpointing and attention")
        budgets = tuple(_literal(part) for part in str(arguments.pop("memory")).split("|")) if "memory" in arguments else ()
        return cls(name, base, compiled, arguments, environment, checkpointing, attention, budgets)

    def at(self, budget: Any) -> str:
        """Its name at one of its budgets."""
        return re.sub(r"\bmemory=[^;\]]*", f"memory={budget}", self.name)

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
        if self.environment.get("FLASH4") == "1":
            site, known = os.environ["FLASH4_SITE"], found.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
            packages = os.path.join(site, "nvidia_cutlass_dsl", "dsl_packages")  # (a .pth file's work, were it installed)
            found["PYTHONPATH"] = os.pathsep.join([site, packages, known])
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
        from benchmarks.workloads import named as workload_named

        named = JobName.of(text)
        workload = replace(workload_named(named.workload), layers=args.layers, tiny=args.tiny)
        if args.length:
            workload = replace(workload, length=args.length)
        contender = Contender.of(named.contender)
        if contender.checkpointing:
            workload = replace(workload, checkpointed=contender.checkpointing != "off")
        return cls(named.name, workload, contender, named.repeat, args.profiled)

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
        from benchmarks.workloads import named

        return named(name).length

    @staticmethod
    def full_layers(name: str) -> int:
        from benchmarks.workloads import named

        return named(name).config["num_hidden_layers"]


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
        (self.folder / "timed").unlink(missing_ok=True)
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
    parser.add_argument("--cap", type=float, default=0, metavar="GIB", help="find the longest sequence that trains under this")
    parser.add_argument("--lengths", default="", help="with --cap: lengths to time before the search, 65536,98304")
    parser.add_argument("--no-search", action="store_true", help="with --cap: these lengths alone")
    parser.add_argument("--no-count", action="store_true", help="no profiled step: no kernel counts")


def handed_on(args: argparse.Namespace) -> list[str]:
    """The same options as a command line."""
    command: list[str] = []
    for name in ("out", "layers", "length", "warmup", "steps", "parity", "cap", "lengths"):
        command += [f"--{name}", str(getattr(args, name))]
    for name in ("tiny", "cpu", "no_count", "no_search"):
        command += [f"--{name.replace('_', '-')}"] if getattr(args, name) else []
    return command
