"""README tables, generated from benchmarks/results/*.jsonl between `<!-- table:NAME -->` and `<!-- /table -->`.

python benchmarks/tables.py            # rewrite README.md
python benchmarks/tables.py --check    # exit 1 if rewriting would change it (CI)
python benchmarks/tables.py --show kernels --results DIR
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import device_tables, dynamic_tables, frontier_tables, product_tables, step_tables  # noqa: E402
from benchmarks.markdown import grid, source  # noqa: E402
from benchmarks.rows import RESULTS, read  # noqa: E402

Row = dict[str, Any]
BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
KINDS = ("norm", "rotary", "activation", "softmax", "loss")
CONTENDERS = ("fxfuse", "eager", "inductor", "liger", "unsloth")


# --- coverage ------------------------------------------------------------------------------------------------


def same_when_renamed(everything: list[Row]) -> tuple[list[str], list[str]]:
    """(model types whose renamed row says the same, those whose row differs), of those that have both of one commit."""
    told = ("seen", "left", "fused")
    plain = {(r["model"], r["dtype"]): r for r in everything if not r["renamed"]}
    pairs = [
        (r, plain[r["model"], r["dtype"]])
        for r in everything
        if r["renamed"]
        and (r["model"], r["dtype"]) in plain
        and r["commit"] == plain[r["model"], r["dtype"]]["commit"]
    ]
    same = [a["model"] for a, b in pairs if "failed" not in a and all(a.get(k) == b.get(k) for k in told)]
    return same, [a["model"] for a, _ in pairs if a["model"] not in same]


def _also(everything: list[Row]) -> str:
    """What the same run says of other names and of 16 bits."""
    same, other = same_when_renamed([r for r in everything if r["dtype"] == "float32"])
    text = []
    if same or other:
        differs = f" (not {', '.join(other)})" if other else ""
        text.append(
            f"With every class, attribute and model_type renamed the row is the same for {len(same)} types{differs}."
        )
    half = [r for r in everything if r["dtype"] == "bfloat16" and not r["renamed"]]
    if half:
        bad = [r["model"] for r in half if "failed" in r or r["wrong"]]
        commits = ", ".join(sorted({r["commit"] for r in half}))
        text.append(f"In bfloat16 (commit {commits}), {len(half)} types, wrong: {', '.join(bad) or 'none'}.")
    return " ".join(text)


def coverage(results: Path) -> str:
    everything = read(results / "coverage.jsonl")
    rows = [r for r in everything if r["dtype"] == "float32" and not r["renamed"]]
    if not rows:
        return "Not measured yet.\n"
    seen: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    body: list[list[str]] = []
    wrong = liger = 0
    for row in rows:
        if "failed" in row:
            body.append([row["model"], *["failed"] * len(KINDS), "", "", ""])
            wrong += 1
            continue
        gone = row.get("unaccounted", {})  # by the census, into no fused site that ran
        got = {k: n - row["left"].get(k, 0) - gone.get(k, 0) for k, n in row["seen"].items()}
        seen.update(row["seen"])
        fused.update(got)
        wrong += bool(row["wrong"])
        liger += bool(row["liger"])
        cells = [f"{got[k]}/{row['seen'][k]}" if row["seen"].get(k) else "" for k in KINDS]
        reasons = sorted({f"{d['rule']}: {d['reason']}" for d in row["declined"] if d["reason"]})
        worst = max(row["loss_ratio"], row["grad_ratio"])
        patched = (
            ", ".join(p.replace("fused_linear_cross_entropy", "loss") for p in row["liger"]) or "nothing"
        )
        body.append(
            [
                row["model"],
                *cells,
                f"{worst:.2f}" + (" wrong" if row["wrong"] else ""),
                patched,
                "; ".join(reasons),
            ]
        )
    total, done = sum(seen.values()), sum(fused.values())
    body.append(["**all**", *[f"{fused[k]}/{seen[k]}" for k in KINDS], "", "", ""])
    text = (
        f"{len(rows)} model types, {done} of {total} sites fused ({done / total:.1%}), {wrong} wrong; "
        f"Liger-Kernel 0.8.5 patches {liger} of these types. {_also(everything)}\n\n"
    )
    head = [
        "model type",
        "norms",
        "rotary",
        "activations, gates",
        "softmax",
        "loss",
        "worst error, x eager's",
        "Liger-Kernel patches",
        "declined because",
    ]
    return text + grid(head, body) + f"\n\n{source(rows)}; `python benchmarks/coverage.py`.\n"


# --- kernels -------------------------------------------------------------------------------------------------


def _best_peer(cells: dict[str, Row]) -> tuple[str, float]:
    peers = {n: r["ms"] for n, r in cells.items() if not n.startswith("fxfuse")}
    name = min(peers, key=peers.__getitem__)
    return name, peers[name]


def kernels(results: Path, wanted: Callable[[Row], bool] = lambda _: True) -> str:
    rows = read(results / "kernels.jsonl")
    timed = [r for r in rows if r.get("kind") in ("binding", "extra") and "ms" in r and wanted(r)]
    if not timed:
        return "Not measured yet.\n"
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in timed:
        cases.setdefault((row["op"], row["shape"], row["weight"], row["mode"]), {})[row["contender"]] = row
    body, slower = [], []
    for (op, shape, weight, mode), cells in cases.items():
        if "fxfuse" not in cells:
            continue
        ours = cells["fxfuse"]
        peer, best = _best_peer(cells)
        ratio = ours["ms"] / best
        if ratio > 1.03:
            slower.append(f"{op} {shape} {weight} {mode}: {ratio:.2f}x {peer}")
        shown = [f"{cells[n]['ms'] * 1e3:.0f}" if n in cells else "" for n in CONTENDERS]
        served = ours["implementation"] if ours.get("implementation") not in ("", "triton", None) else ""
        body.append(
            [
                f"{op} {weight}".strip(),
                shape,
                mode,
                *shown,
                f"{ours['share_of_copy']:.0%}",
                f"{ours['pass_ms'] / ours['ms']:.0%}" if "pass_ms" in ours else "",
                f"{best / ours['ms']:.2f} ({peer})",
                served,
            ]
        )
    head = ["op", "shape", "", *[f"{n}, µs" for n in CONTENDERS], "share of copy", "of plain passes", "x best peer", "served by"]
    copy = [r["gbs"] for r in rows if r.get("kind") == "ceiling"]
    note = f"Copy {max(copy) / 1e3:.2f} TB/s (of 4 GiB); plain passes: kernels that read and write as many bytes. " if copy else ""
    note += "Slower than the best peer by more than 3%: " + ("; ".join(slower) or "none") + "."
    return grid(head, body) + f"\n\n{note} bf16; {source(timed)}; `python benchmarks/kernels.py`.\n"


def kernels_short(results: Path) -> str:
    """Forward+backward at the middle width, for the README."""
    return kernels(results, lambda r: r["mode"] == "fwd+bwd" and not r["shape"].endswith(("x2048", "x8192")))


def sweep(results: Path) -> str:
    rows = [r for r in read(results / "kernels.jsonl") if r.get("kind") == "sweep" and "ms" in r]
    if not rows:
        return "Not measured yet.\n"
    lines: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        n, columns = map(int, row["shape"].split("x"))
        lines.setdefault((row["op"], row["mode"], n), {})[columns] = row["share_of_copy"]
    widths = sorted({c for line in lines.values() for c in line})
    body = [
        [op, mode, str(n), *[f"{line[c]:.0%}" if c in line else "" for c in widths]]
        for (op, mode, n), line in lines.items()
    ]
    return (
        grid(["op", "", "rows", *map(str, widths)], body)
        + "\n\nShare of the speed of a plain copy of the same traffic in the same run.\n"
    )


def host(results: Path) -> str:
    rows = [r for r in read(results / "kernels.jsonl") if r.get("kind") == "host" and "host_us" in r]
    rows = list({(r["contender"], r["mode"]): r for r in rows}.values())  # the last run's
    if not rows:
        return "Not measured yet.\n"
    body = [[r["contender"], r["mode"], f"{r['host_us']:.1f}", f"{r['us_a_launch']:.1f}" if r.get("launches") else ""] for r in rows]
    text = grid(["contender", "", "µs an RMSNorm inside a block", "µs a launch"], body)
    return text + f"\n\n{source(rows)}; `python benchmarks/kernels.py --phases host`.\n"


# --- twins ---------------------------------------------------------------------------------------------------


def twins(results: Path) -> str:
    rows = read(results / "twins.jsonl")
    runs = [r for r in rows if r["kind"] == "run"]
    if not runs:
        return "Not measured yet.\n"
    body = [
        [
            r["contender"],
            f"{r['loss0']:.4f}",
            f"{r['loss_end']:.4f}",
            f"{r['ms']:.1f}",
            f"{r['peak_gib']:.1f}",
        ]
        for r in runs
    ]
    text = grid(["run", "first loss", "last 10 losses", "ms a step", "GiB"], body)
    for v in (r for r in rows if r["kind"] == "verdict"):
        text += (
            f"\n\nFused against eager, nats: mean {v['fused_mean']:.1e}, largest {v['fused_max']:.1e}; "
            f"eager against itself with the rows of each batch swapped: mean {v['noise_mean']:.1e}, largest {v['noise_max']:.1e}."
        )
    return text + f" {runs[-1]['workload']}; {source(runs)}; `python benchmarks/twins.py`.\n"


TABLES: dict[str, Callable[[Path], str]] = dict(
    coverage=coverage,
    kernels=kernels,
    kernels_short=kernels_short,
    sweep=sweep,
    host=host,
    twins=twins,
    steps=step_tables.steps,
    steps_all=step_tables.steps_all,
    steps_flash4=step_tables.steps_flash4,
    profiles=step_tables.profiles,
    parity=step_tables.parity,
    lora=product_tables.lora,
    lora_pieces=product_tables.lora_pieces,
    dequantize=product_tables.dequantize,
    linear_loss=product_tables.linear_loss,
    dynamic_4bit=dynamic_tables.dynamic_4bit,
    distributed=device_tables.distributed,
    trainers=device_tables.trainers,
    convergence=device_tables.convergence,
    frontier=frontier_tables.frontier,
    longest=frontier_tables.longest,
)


def regenerate(text: str, results: Path) -> str:
    return BLOCK.sub(lambda m: m.group(1) + TABLES[m.group(2)](results) + m.group(3), text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--show", choices=sorted(TABLES), help="print one table instead")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.show:
        sys.stdout.write(TABLES[args.show](args.results))
        return 0
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = regenerate(old, args.results)
        if new != old:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    sys.stdout.write(f"{', '.join(stale) or 'no table'} {'out of date' if args.check else 'rewritten'}\n")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
