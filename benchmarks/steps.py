"""Whole training steps: fxfuse against eager, compiled, Liger-Kernel and Unsloth on the workloads W1 to W5.

    python benchmarks/steps.py --suite W1:hf,W1:unsloth,W1:fxfuse,W2b:fxfuse[exclude=attention]
    python benchmarks/steps.py --suite W1:hf,W1:fxfuse --parity 20 --layers 4
    python benchmarks/steps.py --suite W2:hf,W2:fxfuse --tiny --layers 2 --cpu --length 64

Every job runs in a process of its own, on the same weights and tokens; the next one imports while this one builds
and compiles, is held while this one times, and touches the GPU only when this one has ended. A job has empty
compilation caches; with a repeat number (`W1:fxfuse:1`) it finds those of the job it repeats. Rows are written as
they come: `step`, then `profile` (one more step: kernels by class, gaps; with --profile also texts in profiles.txt and memory.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import rows, step_tables  # noqa: E402
from benchmarks.jobs import Contender, JobName, Signals, handed_on, options, split  # noqa: E402

SHORTEST = 15.0  # seconds under which no further job is begun


class Worker:
    """One job's process, started ahead of its turn."""

    def __init__(self, job: JobName, args: argparse.Namespace, scratch: Path) -> None:
        self.job, self.args = job, args
        self.signals = Signals(Path(tempfile.mkdtemp(prefix="turn-", dir=scratch)))
        caches = scratch / "caches" / job.cache_tag
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "FXFUSE_CACHE_DIR": str(caches / "fxfuse"),
            **Contender.of(job.contender).process_environment(scratch),
        }
        command = [sys.executable, str(ROOT / "benchmarks" / "step_worker.py"), "--job", job.name]
        command += ["--signals", str(self.signals.folder), "--scratch", str(scratch), *handed_on(args)]
        if job.name in {j.name for j in split(args.profile)}:
            command.append("--profiled")
        log_folder = Path(args.logs or scratch / "logs")
        log_folder.mkdir(parents=True, exist_ok=True)
        self.log = log_folder / f"{job.tag}.txt"
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def send(self, what: signal.Signals) -> None:
        """To the process and its compile workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, what)

    def run(self, limit: float, waiting: list[Worker]) -> dict[str, Any] | None:
        """Gives it the GPU until it ends or is over its limit; a row if it failed."""
        self.signals.set("go")
        end, held = time.monotonic() + limit, False
        while self.process.poll() is None and time.monotonic() < end:
            hold = self.signals.has("timing") and not self.signals.has("timed")
            if hold != held:
                held = hold
                for other in waiting:
                    other.send(signal.SIGSTOP if hold else signal.SIGCONT)
            time.sleep(0.02)
        for other in waiting:
            other.send(signal.SIGCONT)
        columns = dict(workload=self.job.workload, contender=self.job.contender, repeat=self.job.repeat)
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()
            return {**columns, "failed": f"over its {limit:.0f} s", "stage": self.signals.last_stage()}
        told = self.signals.folder / "failed"
        if told.exists():
            return {**columns, **json.loads(told.read_text())}
        if self.process.returncode:
            lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
            failed = f"ended with {self.process.returncode}: {lines[-1][:300]}"
            return {**columns, "failed": failed, "stage": self.signals.last_stage()}
        return None


def gpu_name(cpu: bool) -> str:
    """Without a CUDA context in this process."""
    if cpu:
        return "cpu"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "cpu"


def drive(jobs: list[JobName], args: argparse.Namespace, scratch: Path) -> int:
    """Runs the jobs one after the other; how many failed."""
    begun, failures = time.monotonic(), 0
    writer = rows.Writer(args.out, gpu=gpu_name(args.cpu))
    workers: dict[int, Worker] = {}
    try:
        for i, job in enumerate(jobs):
            left = args.deadline - (time.monotonic() - begun)
            if left < SHORTEST:
                say(f"deadline: not run: {', '.join(j.name for j in jobs[i:])}")
                break
            for k in range(i, min(i + 1 + args.ahead, len(jobs))):
                if k not in workers:
                    workers[k] = Worker(jobs[k], args, scratch)
            start = time.monotonic()
            waiting = [w for k, w in workers.items() if k > i]
            failed = workers[i].run(min(job.limit or args.limit, left), waiting)
            if failed:
                failures += 1
                writer.write(kind="parity" if args.parity else "step", **failed)
            took = f"{time.monotonic() - start:.1f} s"
            say(
                f"[{time.monotonic() - begun:6.1f}] {job.name}: {took}{' FAILED ' + failed['failed'] if failed else ''}"
            )
    finally:  # they are sessions of their own, and would hold the GPU
        for worker in workers.values():
            worker.send(signal.SIGKILL)
    return failures


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.add_argument("--suite", required=True, help="jobs, between commas")
    parser.add_argument("--profile", default="", help="jobs whose profile is also written as text")
    parser.add_argument("--limit", type=float, default=90, help="seconds a job, from its turn on")
    parser.add_argument("--deadline", type=float, default=560, help="seconds for all")
    parser.add_argument("--ahead", type=int, default=1, help="processes that import ahead of their turn")
    parser.add_argument("--logs", default="", help="folder for the workers' output")
    args = parser.parse_args()
    try:
        jobs = split(args.suite)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="steps-", ignore_cleanup_errors=True) as scratch:
        failures = drive(jobs, args, Path(scratch))
    run = os.environ.get("RUN", "")
    say(step_tables.summary([r for r in rows.read(args.out) if r["run"] == run]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
