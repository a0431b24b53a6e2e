"""Time of a training step against its peak memory: fxfuse at many budgets, peers at each of their settings, in one run.

    python benchmarks/frontier.py --workloads W1                    # ours at every budget, then the peers
    python benchmarks/frontier.py --workloads W1,W2,W3 --only ours
    python benchmarks/frontier.py --workloads W1 --budgets 7GiB,8.2GiB --peers unsloth
    python benchmarks/frontier.py --longest --cap 24 --peers unsloth --lengths 65536
    python benchmarks/frontier.py --longest --cap 80 --layers 4 --length 262144
    python benchmarks/frontier.py --tiny --cpu --layers 2 --length 64 --workloads W1 --budgets 1MiB,auto --peers hf

The jobs are those of steps.py; all budgets of fxfuse run in one process (budgets.py). Rows go to results/frontier.jsonl; the
table in docs/memory.md and the plot (frontier_plot.py) are made from there. Exit code 1: a job failed, a peer's point is below
ours, or a predicted peak is more than 5% off.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import frontier_tables, rows  # noqa: E402
from benchmarks.jobs import Contender, JobName, options  # noqa: E402
from benchmarks.steps import drive, say  # noqa: E402
from benchmarks.workloads import GROWING  # noqa: E402

# The sizes at which peers stand, and what lies between and beyond. The largest first: where there is no room kernels are not timed, and
# what was not timed is not chosen later in a process. (What the first step of a small budget takes: first_peak.py.)
BUDGETS = {
    "W1": ("auto", "45.6GiB", "31.3GiB", "23.4GiB", "17.7GiB", "12GiB", "8.2GiB", "7GiB"),
    "W2": ("auto", "45.6GiB", "31.3GiB", "26.3GiB", "22GiB", "17.7GiB"),
    "W3": ("auto", "31.3GiB", "26.3GiB", "21GiB", "18GiB", "15GiB", "12GiB", "10.5GiB"),
}
# Anchors first, as without them a run is not used; then the settings nearest to our frontier.
PEERS = {
    "W1": ("unsloth", "hf", "unsloth[checkpointing=off]", "unsloth[checkpointing=on]", "liger", "hf+regional",
           "liger[checkpointing=off]", "hf+regional[checkpointing=off]", "hf[checkpointing=off]"),
    "W2": ("unsloth", "hf", "unsloth[checkpointing=off]", "unsloth[checkpointing=on]", "hf+regional", "liger",
           "hf+regional[checkpointing=off]", "liger[checkpointing=off]", "hf[checkpointing=off]"),
    "W3": ("liger", "hf", "unsloth", "unsloth[checkpointing=offload]", "unsloth[checkpointing=on]", "liger[checkpointing=on]",
           "hf+regional", "hf+regional[checkpointing=on]", "hf[checkpointing=on]"),
}  # fmt: skip
LONGEST_PEERS = ("unsloth",)


def suite(args: argparse.Namespace) -> list[JobName]:
    """The jobs that the options name: in each workload the anchor, ours, then the other peers."""
    jobs = []
    for workload in [GROWING.name] if args.longest else args.workloads.split(","):
        peers = list(filter(None, args.peers.split(","))) if args.peers is not None else list(_peers(workload))
        ours = [f"fxfuse{_own_options(workload, args)}@{args.ours_limit:.0f}"]
        theirs = [f"{peer}@{args.limit:.0f}" for peer in peers]
        chosen = {"ours": ours, "peers": theirs}.get(args.only) or [*theirs[:1], *ours, *theirs[1:]]
        jobs += [JobName.of(f"{workload}:{contender}") for contender in chosen]
    return jobs


def _peers(workload: str) -> tuple[str, ...]:
    return LONGEST_PEERS if workload == GROWING.name else PEERS[workload]


def _own_options(workload: str, args: argparse.Namespace) -> str:
    budgets = args.budgets.split(",") if args.budgets else BUDGETS.get(workload, ())
    chosen = [f"memory={'|'.join(budgets)}"] * bool(budgets) + [args.ours] * bool(args.ours)
    return f"[{';'.join(chosen)}]" if chosen else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    # A plan is made before the second step and judged after the third: what is timed comes after.
    parser.set_defaults(out=str(rows.RESULTS / "frontier.jsonl"), warmup=4, steps=6, no_count=True)
    parser.add_argument("--workloads", default="W1,W2,W3")
    parser.add_argument("--budgets", default="", help="of fxfuse, between commas, in place of the listed ones")
    parser.add_argument("--peers", default=None, help="between commas, in place of the listed ones; '' for none")
    parser.add_argument("--only", choices=("ours", "peers"))
    parser.add_argument("--ours", default="", help="more options of fxfuse: remainder=eager;validate=off")
    parser.add_argument("--longest", action="store_true", help="the longest sequence under --cap")
    parser.add_argument("--limit", type=float, default=110, help="seconds a peer, from its turn on")
    parser.add_argument("--ours-limit", type=float, default=300, help="seconds for all budgets of a workload")
    parser.add_argument("--deadline", type=float, default=560, help="seconds for all")
    parser.add_argument("--ahead", type=int, default=1, help="processes that import ahead of their turn")
    parser.add_argument("--profile", default="", help=argparse.SUPPRESS)
    parser.add_argument("--logs", default="", help="folder for the workers' output")
    args = parser.parse_args()
    if args.longest != bool(args.cap):
        parser.error("--longest and --cap GIB go together")
    try:
        jobs = suite(args)
        for job in jobs:
            Contender.of(job.contender)
    except (ValueError, KeyError) as error:
        parser.error(str(error))
    if args.longest:  # for all contenders alike; Unsloth sets it itself
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="frontier-", ignore_cleanup_errors=True) as scratch:
        failures = drive(jobs, args, Path(scratch))
    run = os.environ.get("RUN", "")
    found = [row for row in rows.read(args.out) if row["run"] == run]
    complaints = frontier_tables.complaints(found)
    say("\n".join([frontier_tables.summary(found), *complaints]))
    return 1 if failures or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
