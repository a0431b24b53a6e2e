"""Kernels compiled by another process are the very ones that a launch asks Triton for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from fxfuse import reference
from fxfuse.kernels import (
    abilities,
    catalogue,
    configuration,
    launch,
    library,
    pair,
    single,
    thin_ahead,
    thin_outer,
    thin_pair,
    tuning,
    workers,
)
from fxfuse.kernels.compile_worker import Target
from fxfuse.kernels.configuration import SHARED_MEMORY
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.launch import Prepared
from fxfuse.small_casts import cast_together
from tests.kernel_programs import BY_NAME, Case, rotary

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")

GPU = torch.device("cuda", 0)
CASES = {"rotary": Case("rotary", lambda dtype: rotary(dtype, 128))}


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Kernel, list[Any]]]:
    """An H200 as far as compiling goes; the kernels that were handed out, with the dtypes of their tensors."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "fxfuse"))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(workers, "enabled", lambda: True)
    monkeypatch.setattr(workers, "count", lambda: 1)
    monkeypatch.setattr(workers, "target_of", lambda device: ("cuda", 90, 32))
    monkeypatch.setattr(workers, "_pending", {})
    for cached in (workers._pool, workers._folder):
        cached.cache_clear()
    monkeypatch.setattr(abilities, "of_device", lambda device: abilities.of_capability(9))
    for module in (configuration, tuning):
        monkeypatch.setattr(module, "shared_memory", lambda device: SHARED_MEMORY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "imagined")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    handed: list[tuple[Kernel, list[Any]]] = []
    original = Kernel.compile_ahead

    def noted(kernel: Kernel, tensors: Any, device: torch.device) -> None:
        handed.append((kernel, [t.dtype for t in tensors]))
        original(kernel, tensors, device)

    monkeypatch.setattr(Kernel, "compile_ahead", noted)
    yield handed
    workers._pool().shutdown()
    for cached in (workers._pool, workers._folder):
        cached.cache_clear()


def found_compiled(handed: list[tuple[Kernel, list[Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own dispatch finds every kernel on disk. (Where no GPU is, the C launchers of Triton 3.6 cannot be linked.)"""
    for future in workers._pending.values():
        future.result()
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(triton.compiler.compiler.ASTSource, "make_ir", lambda *_, **__: pytest.fail("compiled again"))
    for kernel, dtypes in handed:
        assert kernel.jit.warmup(*dtypes, *kernel.numbers, grid=(1,), **kernel.options).asm["cubin"]


@pytest.mark.parametrize("name", ["rms_norm_backward", "swiglu"])
def test_a_launch_finds_what_was_compiled_ahead(name: str, imagined_gpu, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")
    program = BY_NAME[name].program("bfloat16")
    forms = [torch.empty(300 if all(a.rows) else 1, 4096 if a.columns else 1, dtype=torch.bfloat16 if a.dtype == "bfloat16" else
                         torch.float32, device="meta") for a in program.arguments]
    Prepared(program).compile_ahead(forms, None, GPU)
    assert len(imagined_gpu) == (3 if name == "rms_norm_backward" else 1)  # a second stage for each number of parts that is likely
    found_compiled(imagined_gpu, monkeypatch)


def test_a_change_of_the_assembler_changes_no_keys(imagined_gpu, monkeypatch) -> None:
    """Torch's compiler sets TRITON_PTXAS_PATH when it first runs; a process that asked Triton for the version before keeps its keys."""
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")
    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas_version", lambda arch: "asked for before")
    program = BY_NAME["swiglu"].program("bfloat16")
    forms = [torch.empty(300, 4096, dtype=torch.bfloat16, device="meta") for _ in program.arguments]
    Prepared(program).compile_ahead(forms, None, GPU)
    found_compiled(imagined_gpu, monkeypatch)


@pytest.mark.parametrize("name", ["swiglu", "layer_norm_backward", "softmax"])
def test_a_kernel_has_one_key_whatever_a_process_compiled_before(name: str) -> None:
    """Triton leaves a constant of a called function out of a kernel's key if nothing has asked for that function's key yet: the first
    kernel of a process was not found on disk by a second process, where it was not the first."""
    source = compiled_source(name)
    code = ("import sys\nfrom fxfuse.kernels.compile_worker import load\n"
            "assert len({load.__wrapped__('generated', sys.argv[1]).kernel.cache_key for _ in range(2)}) == 1")
    subprocess.run([sys.executable, "-c", code, source], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def compiled_source(name: str) -> str:
    """The file of the kernel that a launch on a few rows would have."""
    program = BY_NAME[name].program("bfloat16")
    tensors = BY_NAME[name].inputs(program, (8,), 4096, 1.0)
    prepared = Prepared(program)
    outputs = prepared.written(tensors, None)
    kind = catalogue.choose_kind(prepared.unsummed, reference.axis_widths(prepared.unsummed, tensors))
    assert kind is not None
    layout = launch.plan(prepared.unsummed, kind, tensors, outputs)
    made = single.variant(prepared.unsummed, kind, layout, configuration.default(prepared.unsummed, kind, layout))
    return str(library.load(made.source).__file__)


def test_a_pair_is_compiled_ahead_as_one_kernel(imagined_gpu, monkeypatch) -> None:
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")
    program = CASES["rotary"].program("bfloat16")
    tables = [torch.empty(2, 1, 64, 128, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    query, key = (torch.empty(2, 64, heads, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2) for heads in (32, 8))
    pair.compile_pair_ahead(launch.prepare(program), [query, *tables], [key, *tables], GPU)
    assert len(imagined_gpu) == 1
    found_compiled(imagined_gpu, monkeypatch)


def test_candidates_that_will_be_timed_are_all_compiled_ahead(imagined_gpu, monkeypatch) -> None:
    program = BY_NAME["rms_norm"].program("bfloat16")
    forms = [torch.empty(8192 if all(a.rows) else 1, 4096, dtype=torch.bfloat16, device="meta") for a in program.arguments]
    monkeypatch.setattr(workers, "submit", lambda *_: None)
    Prepared(program).compile_ahead(forms, None, GPU)
    assert len({str(kernel.options) + kernel.jit.__module__ for kernel, _ in imagined_gpu}) > 2


def test_thin_products_are_compiled_ahead_in_every_configuration(imagined_gpu, monkeypatch) -> None:
    for module in (thin_ahead, thin_pair):
        monkeypatch.setattr(module, "of_device", lambda device: abilities.of_capability(9))
    monkeypatch.setattr(workers, "submit", lambda *_: None)
    matrix, right, left = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((4096, 2048), (2048, 16), (4096, 16)))
    thin_ahead.pair(GPU, None, 0, 16, matrix, right, left, 2.0, 1.0, True)
    assert len(imagined_gpu) == 2 * len(thin_pair.CONFIGS)
    thin_ahead.product(GPU, left, right.t(), 1.0)
    assert len(imagined_gpu) == 2 * len(thin_pair.CONFIGS) + len(thin_outer.CONFIGS)
    thin_ahead.product(GPU, matrix, matrix.t(), 1.0)
    thin_ahead.product(GPU, left[:8], right.t(), 1.0)
    assert len(imagined_gpu) == 2 * len(thin_pair.CONFIGS) + len(thin_outer.CONFIGS), "no thin products, or not worth it"
    thin_ahead.added_product(GPU, matrix, left, right.t(), 1.0)
    assert len(imagined_gpu) == 2 * len(thin_pair.CONFIGS) + 2 * len(thin_outer.CONFIGS)


def test_small_casts_are_compiled_ahead(imagined_gpu, monkeypatch) -> None:
    monkeypatch.setattr(workers, "submit", lambda *_: None)
    forms = [torch.empty(16, 4096, device="meta"), torch.empty(4096, 16, device="meta")]
    cast_together.compile_ahead(GPU, forms, torch.bfloat16)
    assert len(imagined_gpu) == 1
    cast_together.compile_ahead(GPU, [*forms, torch.empty(5, device="meta")], torch.bfloat16)
    assert len(imagined_gpu) == 1, "torch's own function casts these"


def test_lengths_share_a_kernel_and_what_it_is_specialised_on_does_not(imagined_gpu) -> None:
    program = BY_NAME["rms_norm"].program("bfloat16")
    for rows in (1000, 1001, 4096):
        forms = [torch.empty(rows if all(a.rows) else 1, 512, dtype=torch.bfloat16, device="meta") for a in program.arguments]
        Prepared(program, "rows", configuration.Config(1, 0, 4)).compile_ahead(forms, None, GPU)
    assert len(workers._pending) == 1
    odd = [torch.empty(rows if all(a.rows) else 1, 513, dtype=torch.bfloat16, device="meta") for a in program.arguments]
    Prepared(program, "rows", configuration.Config(1, 0, 4)).compile_ahead(odd, None, GPU)
    assert len(workers._pending) == 2


def test_a_process_that_dies_is_replaced_and_nothing_fails(imagined_gpu, monkeypatch) -> None:
    """The job of a killed process is given up: whoever needs the kernel compiles it. The next job has a new process."""
    monkeypatch.setenv("FXFUSE_AUTOTUNE", "0")
    process = workers._pool().submit(workers._process).result()
    process.kill()
    process.wait()
    program = BY_NAME["swiglu"].program("bfloat16")
    forms = [torch.empty(300, 4096, dtype=torch.bfloat16, device="meta") for _ in program.arguments]
    Prepared(program).compile_ahead(forms, None, GPU)
    found_compiled(imagined_gpu, monkeypatch)


def test_processes_share_the_cores_with_other_ranks(monkeypatch) -> None:
    monkeypatch.delenv("FXFUSE_COMPILE_PROCESSES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    assert workers.count() == workers.MOST_PROCESSES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.count() == 3
    monkeypatch.setenv("FXFUSE_COMPILE_PROCESSES", "0")
    assert workers.count() == 0


def test_processes_that_compile_load_no_torch() -> None:
    """It takes seconds, a dozen times over."""
    modules = ("casts_kernel", "compile_worker", "device", "nf4_kernel", "thin_outer_kernel", "thin_pair_kernel")
    code = (f"import sys\nfor name in {modules}: __import__('fxfuse.kernels.' + name)\nassert 'torch' not in sys.modules\n"
            "from triton.backends.compiler import GPUTarget\nfrom fxfuse.kernels.compile_worker import warm_up\n"
            "warm_up(GPUTarget('cuda', 90, 32))\nassert 'torch' not in sys.modules, 'Triton imported it'")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
