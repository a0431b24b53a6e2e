"""What a launch costs the CPU: microseconds from the call of a prepared program to its return, and where they go.

    python -m benchmarks.host_cost            # on a GPU: tiny tensors, so that the queue never fills
    python -m benchmarks.host_cost --stub     # without one: everything but Triton's C launcher, which does nothing

Parts: the generated function (layout guard, allocations, C launcher), the same without its launches, one allocation, one launch.
Then whole compiled blocks: a chain of 16 norms and products as `benchmarks/kernels.py` has it, against the same chain with the
launches replaced by stored results, which is what the graph around them costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.kernel_cases import sweep_cases

ROWS, COLUMNS = 8, 64


def microseconds(run: Callable[[], object], calls: int = 100, rounds: int = 30) -> float:
    """The least mean of a batch; the device is idle when a batch begins, and its queue holds a batch."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = float("inf")
    for _ in range(rounds):
        sync()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def programs() -> dict[str, str]:
    """Program texts by name: a norm with its backward, a gate with its backward."""
    from benchmarks.tune_probe import programs_of

    norm, gate = programs_of("rms_norm", "trained"), programs_of("gated_activation[silu]")
    layer = programs_of("layer_norm", "trained")
    return {"rms_norm forward": norm[0], "rms_norm backward": norm[-1], "layer_norm backward": layer[-1],
            "gate forward": gate[0], "gate backward": gate[-1]}


def parts(text: str) -> dict[str, float]:
    """Of one launch: called with the list of tensors, as generated code calls it."""
    from benchmarks.tune_probe import tensors_for
    from fxfuse.kernels.launch import Prepared
    from fxfuse.program import parse

    prepared = Prepared(parse(text))
    tensors = tensors_for(text, (1, ROWS), COLUMNS)
    for _ in range(3):
        prepared(tensors)
    found = {"call": microseconds(partial(prepared, tensors))}
    direct = next(iter(prepared.recent.get(None, ())), None)
    if direct is None:
        return found
    known = direct.__globals__
    found["generated"] = microseconds(partial(direct, tensors))
    runs = {name: value for name, value in known.items() if name.startswith("run_") or name.startswith("kernel_")}
    try:
        known.update(dict.fromkeys(runs, lambda *arguments: None))
        found["without launches"] = microseconds(partial(direct, tensors))
    finally:
        known.update(runs)
    if "same" in known:
        found["guard"] = microseconds(lambda: known["same"](*tensors))
    found["allocation"] = microseconds(lambda: known["empty"]((1, ROWS, COLUMNS), (ROWS * COLUMNS, COLUMNS, 1), torch.bfloat16))
    found["kernels"] = len(runs)
    prepared.recent.clear()
    found["look-up"] = microseconds(partial(_forgotten, prepared, tensors))
    return found


def _forgotten(prepared: Any, tensors: Sequence[Tensor]) -> None:
    prepared.recent.clear()
    prepared(tensors)


def block(backward: bool, stubbed: bool) -> float:
    """A chain of 16 norms and products; ``stubbed``: launches return tensors made beforehand."""
    import fxfuse.bufferize as bufferize
    from benchmarks.chain import chain_inputs, chain_of
    from benchmarks.judge import both, forward
    from fxfuse.backend import Backend

    case = next(case for case in sweep_cases(dry=True) if case.op == "rms_norm")
    plain = bufferize.launcher

    def stored(text: str, device: str) -> Callable[..., list[Tensor]]:
        launch, results = plain(text, device), []

        def again(*arguments: Any) -> list[Tensor]:
            if not results:
                results.append([t.detach().clone() for t in launch(*arguments)])
            return list(results[0])

        again.__name__ = again.__qualname__ = launch.__name__
        again.__module__ = "fxfuse"
        return again

    torch._dynamo.reset()
    bufferize.launcher = stored if stubbed else plain
    try:
        function = torch.compile(chain_of(case.fn, 16), backend=Backend(validate="off"), dynamic=True)
        inputs = chain_inputs("cuda" if torch.cuda.is_available() else "cpu", 16)
        run = partial(both if backward else forward, function, inputs)
        for _ in range(5):
            run()
        return microseconds(run, calls=5, rounds=40)
    finally:
        bufferize.launcher = plain


def stub() -> None:
    """No GPU: kernels are neither compiled nor launched, tensors lie on the CPU."""
    from fxfuse import lowering
    from fxfuse.kernels import direct, invoke, launch

    launch.INTERPRETED = lowering.INTERPRETED = True
    invoke.current_device = direct.current_device = lambda: -1
    invoke.current_stream = direct.current_stream = lambda index: 0
    direct._allocator = lambda like: torch._C._dynamo.guards._empty_strided_cpu
    nothing = SimpleNamespace(run=lambda *arguments: None, function=0, packed_metadata=())

    def load(kernel: Any, tensors: Sequence[Tensor]) -> Any:
        kernel.compiled = nothing
        return nothing

    invoke.Kernel.load = load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stub", action="store_true")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    texts = programs()
    if options.stub:
        stub()
    writer = rows.Writer(options.out) if options.out else None
    for name, text in texts.items():
        found = parts(text)
        print(f"{name:20}", "  ".join(f"{part} {us:.2f}" for part, us in found.items()))
        if writer:
            writer.write(kind="host_launch", op=name, shape=f"{ROWS}x{COLUMNS}", contender="fxfuse", **found)
    for backward in (False, True):
        whole, around = block(backward, False), block(backward, True)
        mode = "fwd+bwd" if backward else "fwd"
        print(f"chain of 16 norms, {mode}: {whole:.0f} us; without launches {around:.0f}; a norm {(whole - around) / 16:.2f} us")
        if writer:
            writer.write(kind="host_chain", op="rms_norm", shape=f"{ROWS}x{COLUMNS}", mode=mode, contender="fxfuse",
                         block_us=round(whole, 1), around_us=round(around, 1), host_us=round((whole - around) / 16, 2))


if __name__ == "__main__":
    main()
