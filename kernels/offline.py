"""Compiling a launch for a GPU that is not there: for CI, for printing, for reading registers and spills without a device.

Signature and specialisation are those that Triton's own dispatch would give the same tensors; they may be on the meta device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxfuse import reference
from fxfuse.errors import EmissionError
from fxfuse.kernels import abilities, configuration, library
from fxfuse.kernels.arguments import check_arguments
from fxfuse.kernels.catalogue import choose_kind
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.early_sums import with_early_sums
from fxfuse.kernels.joined_sums import with_joined_sums
from fxfuse.kernels.launch import plan
from fxfuse.kernels.single import variant
from fxfuse.kernels.source import summed_outputs
from fxfuse.kernels.splitting import without_partial_sums
from fxfuse.program import Program

# NVIDIA by compute capability, AMD by architecture name.
TARGETS = {"sm_75": GPUTarget("cuda", 75, 32), "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "sm_120": GPUTarget("cuda", 120, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY = {"sm_75": 65536, "sm_80": 166912, "sm_90": 232448, "sm_120": 101376, "gfx942": 65536}
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64", "int32": "*i32", "int64": "*i64",
            "bool": "*i1", "uint8": "*u8", "int16": "*i16"}


@dataclass(frozen=True)
class Compiled:
    """``registers`` a thread and ``spilled`` bytes of local memory (None where the vendor's tool is not at hand)."""

    source: str
    asm: dict[str, Any]
    registers: int | None
    spilled: int | None


def compile_offline(program: Program, tensors: Sequence[Tensor], target: str, kind: str | None = None,
                    config: Config | None = None) -> Compiled:
    """Compiles the kernel that a launch on these tensors would use, without any GPU."""
    check_arguments(program, tensors)
    program, _ = without_partial_sums(with_joined_sums(with_early_sums(program)))
    kind = kind or choose_kind(program, reference.axis_widths(program, tensors))
    if kind is None:
        raise EmissionError("this launch takes two kernels; compile the halves of kernels.splitting.split_sums")
    outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
    layout = plan(program, kind, tensors, outputs)
    config = config or configuration.default(program, kind, layout, SHARED_MEMORY[target])
    able = abilities.of_capability(int(target[3:-1])) if target.startswith("sm_") else abilities.NONE
    made = variant(program, kind, layout, config, able)
    jit = library.load(made.source).kernel
    kept = [t for t, o in zip(outputs, program.outputs, strict=True) if not o.sums_rows]
    partials = [torch.empty(0, dtype=reference.torch_dtype(program.math), device="meta")] if summed_outputs(program) else []
    return compile_kernel(jit, [*tensors, *kept, *partials], made.numbers, made.options, target, made.source)


def compile_kernel(jit: Any, tensors: Sequence[Tensor], numbers: Sequence[int], options: dict[str, Any], target: str,
                   text: str = "") -> Compiled:
    """Compiles a jitted function for tensors and integer arguments as ``invoke.Kernel`` takes them."""
    compiled = triton.compile(_source(jit, tensors, numbers), target=TARGETS[target], options=options)
    registers, spilled = _resources(compiled.asm["cubin"]) if "cubin" in compiled.asm else (None, None)
    return Compiled(text, compiled.asm, registers, spilled)


def _source(jit: Any, tensors: Sequence[Tensor], numbers: Sequence[int]) -> ASTSource:
    """Types, constants and divisibility of the arguments, by the rules of Triton's dispatch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for k, (parameter, value) in enumerate(zip(jit.params, (*tensors, *numbers), strict=True)):
        divisible = True
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[str(value.dtype).removeprefix("torch.")]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(k,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=jit, signature=signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory and stack, from the tool in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                              check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
