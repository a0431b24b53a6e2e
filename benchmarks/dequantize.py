"""Dequantization of 4-bit weights: our kernel in every configuration against bitsandbytes, checked bit for bit, share of copy.

    python benchmarks/dequantize.py [--all] [--out FILE] [--dry]

Shapes are those of the workloads' largest linears. Each contender runs in a CUDA graph over rotating weights, so that neither
launches nor the L2 count. ``--all`` times every configuration of the kernel, and every block size, code and dtype; without it the
chosen configuration. Rows with ``room`` write into rows 16 columns wider, as the augmented product wants them. ``host_us`` is what one
call costs the host.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows, timing  # noqa: E402
from fxfuse.kernels.nf4 import CONFIGS, Config, Dequantizer, Weight, chosen_config  # noqa: E402

SHAPES = ((14336, 4096), (18944, 3584), (3584, 18944), (4096, 4096), (1024, 4096))
ROOM = 16


def packed_weight(weight: Weight, device: str, seed: int) -> tuple[list[Tensor | None], Callable[[], Tensor]]:
    """The five tensors of a random weight, and bitsandbytes' dequantization of it."""
    from bitsandbytes import functional

    torch.manual_seed(seed)
    original = torch.randn(weight.rows, weight.columns, device=device, dtype=weight.dtype) * 0.02
    packed, state = functional.quantize_4bit(original, blocksize=weight.blocksize, quant_type=weight.quant_type,
                                             compress_statistics=weight.nested)  # fmt: skip
    tensors: list[Tensor | None] = [packed, state.absmax, None, None, None]
    if weight.nested:
        tensors = [packed, state.state2.absmax, state.absmax, state.state2.code, state.offset]
    return tensors, partial(functional.dequantize_4bit, packed, state)


def moved_bytes(weight: Weight) -> int:
    """Bytes that one dequantization must read and write."""
    total = weight.rows * weight.columns
    blocks = total // weight.blocksize
    scales = blocks + 4 * blocks // 256 if weight.nested else 4 * blocks
    return total // 2 + total * weight.dtype.itemsize + scales


def cases(everything: bool, dry: bool) -> Iterator[Weight]:
    for rows_, columns in ((64, 128),) if dry else SHAPES:
        yield Weight(64, "nf4", rows_, columns, torch.bfloat16, True)
    if everything and not dry:
        for blocksize in (128, 4096):
            yield Weight(blocksize, "nf4", 14336, 4096, torch.bfloat16, True)
        yield Weight(64, "fp4", 14336, 4096, torch.bfloat16, True)
        yield Weight(64, "nf4", 14336, 4096, torch.bfloat16, False)
        yield Weight(64, "nf4", 14336, 4096, torch.float16, True)
        yield Weight(64, "nf4", 14336, 4096, torch.float32, True)


def measure(weight: Weight, configs: list[Config], device: str, copy: float, out: rows.Writer) -> None:
    """One row for bitsandbytes and two for each configuration."""
    count = timing.sets_for(moved_bytes(weight)) if device == "cuda" else 1
    sets = [packed_weight(weight, device, seed) for seed in range(count)]
    expected = sets[0][1]()
    shape, total = f"{weight.rows}x{weight.columns}", moved_bytes(weight)
    base = dict(op="dequantize_4bit", shape=shape, blocksize=weight.blocksize, code=weight.quant_type, nested=weight.nested,
                dtype=str(weight.dtype).removeprefix("torch."))  # fmt: skip

    def write(contender: str, closures: list[timing.Closure], **more: object) -> None:
        time_ = timing.measure(closures)
        share = total / copy / (time_.ms * 1e-3)
        row = out.write(**base, contender=contender, ms=time_.ms, ms_min=time_.ms_min, ms_max=time_.ms_max, how=time_.how,
                        share_of_copy=share, host_us=host_cost(closures[0]), **more)  # fmt: skip
        print(f"{shape:>12} {contender:<28} {row['ms'] * 1e3:8.1f} us {share:6.1%} of copy  host {row['host_us']:5.1f} us  {more}",
              flush=True)  # fmt: skip

    write("bitsandbytes", [theirs for _, theirs in sets])
    for config in configs:
        run = Dequantizer(weight, config)
        name = f"fxfuse {config.lookup} {config.warps}x{config.unroll}"
        exact = torch.equal(run(*sets[0][0]), expected)
        write(name, [partial(run, *tensors) for tensors, _ in sets], exact=exact, **asdict(config))
        wide = torch.empty(weight.rows + ROOM, weight.columns + ROOM, dtype=weight.dtype, device=device)
        view = wide[: weight.rows, : weight.columns]
        exact = torch.equal(run(*sets[0][0], out=view), expected)
        write(name, [partial(run, *tensors, out=view) for tensors, _ in sets], exact=exact, room=ROOM, **asdict(config))


def host_cost(closure: timing.Closure, calls: int = 200) -> float:
    """Microseconds of the host for one call (the device may lag behind)."""
    if not torch.cuda.is_available():
        return float("nan")
    for _ in range(10):
        closure()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        closure()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out", default=str(rows.RESULTS / "dequantize.jsonl"))
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no GPU (with TRITON_INTERPRET=1)")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry else "cuda"
    configs = list(CONFIGS) if arguments.all else [chosen_config()]
    if arguments.dry:
        configs = [config for config in configs if config.lookup != "shuffle"]
    out = rows.Writer(arguments.out)
    copy = timing.copy_bandwidth(device)
    print(f"copy {copy / 1e12:.2f} TB/s")
    for case in cases(arguments.all, arguments.dry):
        measure(case, configs, device, copy, out)
    wrong = [row for row in out.rows if row.get("exact") is False]
    if wrong:
        raise SystemExit(f"{len(wrong)} results differ from bitsandbytes'")


if __name__ == "__main__":
    main()
