"""benchmarks/steps.py: a real comparison at toy widths, and what its tables make of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_profile, product_tables, step_tables
from benchmarks.jobs import Contender, split
from benchmarks.rows import read
from benchmarks.workloads import WORKLOADS, config_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_comparison_of_fxfuse_with_eager(tmp_path: Path) -> None:
    """On W4, which is checkpointed: its graphs are compiled, and sites tried, while a checkpoint counts saved tensors."""
    out = tmp_path / "steps.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "steps.py"), "--out", str(out), "--logs", str(tmp_path)]
    command += ["--suite", "W4:hf,W4:fxfuse[remainder=eager],W4:unsloth", "--cpu", "--tiny", "--layers", "1"]
    command += ["--length", "32", "--warmup", "2", "--steps", "1", "--limit", "60"]
    environment = dict(os.environ, RUN="test", COMMIT="test", UNSLOTH_SITE=str(tmp_path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    found = {row["contender"]: row for row in read(out)}
    eager, fused, absent = found["hf"], found["fxfuse[remainder=eager]"], found["unsloth"]
    for row in (eager, fused):
        assert not row["whole"]
        assert {"ms", "tokens_s", "first_step_s", "gpu", "versions"} <= row.keys()
        assert (row["run"], row["commit"], len(row["losses"])) == ("test", "test", 3)
    assert fused["fused"]["rms_norm"] >= 1
    assert fused["fused"]["linear_loss"] == 1  # with its softcap, and rows that are counted by asking the logits
    assert fused["loss0"] == pytest.approx(eager["loss0"], rel=1e-3)
    assert fused["grad_norm"] == pytest.approx(eager["grad_norm"], rel=2e-2)
    assert fused["gradients"].keys() == eager["gradients"].keys()
    assert "unsloth" in absent["failed"]  # a contender that is not there is a row, not the end of the run
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_a_suite_is_split_outside_brackets() -> None:
    jobs = split("W1:hf,W2b:fxfuse[exclude=rope,attention;remainder=inductor;FXFUSE_AUTOTUNE=0]:1@90")
    assert [(j.workload, j.repeat, j.limit) for j in jobs] == [("W1", 0, None), ("W2b", 1, 90.0)]
    contender = Contender.of(jobs[1].contender)
    assert contender.arguments == dict(exclude=("rope", "attention"), remainder="inductor")
    assert contender.environment == dict(FXFUSE_AUTOTUNE="0")
    assert Contender.of("liger-flce+regional").compiled == "regional"
    for wrong in ("W1:nobody", "W1:hf+nothing", "hf", "W1:hf[exclude=rope]"):
        with pytest.raises(ValueError, match=r"no contender|is no job|takes options"):
            split(wrong)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_configurations_transformers_knows(name: str) -> None:
    workload = WORKLOADS[name]
    config = config_of(workload)
    assert config.model_type == workload.arch
    assert config.vocab_size == workload.config["vocab_size"]


def _event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return dict(cat=category, name=name, ts=start, dur=duration, args=dict(grid=[1, 1, 1]))


def test_a_profile_counts_kernels_and_the_time_between_them() -> None:
    profile = kernel_profile.from_trace(
        [
            _event("kernel", "nvjet_tst_256x128", 0, 100),
            _event("kernel", "kernel", 110, 20),
            _event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 120, 40),  # overlaps, and ends later
            _event("kernel", "cudnn_generated_fort_native_sdpa_sm90", 200, 50),
            _event("cuda_runtime", "cudaStreamSynchronize", 0, 5),
            _event("cpu_op", "aten::mm", 0, 100),
        ]
    )
    row = profile.row()
    assert (row["launches"], row["copies"], row["kernel_ms"], row["busy_ms"], row["idle_ms"]) == (3, 1, 0.21, 0.2, 0.05)
    assert row["calls"] == {"cudaStreamSynchronize": 1}
    assert set(row["classes"]) == {"matmul", "fxfuse", "host copies", "attention"}
    assert profile.gaps()[0] == (40.0, "Memcpy DtoH (Device -> Pageable)", "cudnn_generated_fort_native_sdpa_sm90")
    assert "nvjet" in profile.text()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantization"),
        ("void cutlass::device_kernel<flash_fwd>", "attention"),
        ("triton_per_fused_add_mean_3", "inductor"),
        ("_rope_embedding_QK", "other triton"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "aten"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies, casts"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ],
)
def test_kernels_are_classed_by_name(kernel: str, kind: str) -> None:
    assert kernel_profile.class_of(kernel) == kind


def _row(contender: str, ms: float, run: str = "a", **more: Any) -> dict[str, Any]:
    return dict(
        kind="step",
        workload="W1",
        contender=contender,
        repeat=0,
        whole=True,
        setup="a model",
        ms=ms,
        ms_min=ms,
        ms_max=ms,
        tokens_s=1.0,
        peak_gib=8.0,
        reserved_gib=9.0,
        first_step_s=1.0,
        loss0=2.0,
        grad_norm=1.0,
        run=run,
        gpu="g",
        versions={},
        commit="c",
    ) | dict(more)


def test_tables_compare_within_one_run_whose_anchors_hold(tmp_path: Path) -> None:
    rows = [
        _row("hf", 921.0),
        _row("unsloth", 720.0),
        _row("fxfuse", 600.0),
        dict(_row("floor", 500.0), kind="floor"),
        _row("fxfuse", 300.0, run="cut", whole=False),  # fewer layers
        _row("fxfuse", 400.0, run="alone"),  # no peer beside it
        _row("hf", 1100.0, run="slow"),  # a machine that is not what it was
        _row("fxfuse", 650.0, run="slow"),
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = step_tables.steps(tmp_path)
    assert "| 600 / 8.0 | unsloth 720 / 8.0 | **1.20** |" in table
    assert "| 1.20 |" in table  # times the floor
    assert "400" not in table
    assert "650" not in table
    assert "unsloth" in step_tables.steps_all(tmp_path)
    assert step_tables.anchors_off(rows) == ["W1 hf 1100.0 ms, was 921.0"]


def test_parity_is_the_largest_relative_difference() -> None:
    ours = dict(losses=[2.0, 2.2], grad_norms=[1.0, 1.0])
    eager = dict(losses=[2.0, 2.0], grad_norms=[1.0, 0.5])
    assert step_tables.differences(ours, eager) == (pytest.approx(0.1), pytest.approx(1.0))


def test_product_tables_show_the_last_run(tmp_path: Path) -> None:
    def write(name: str, *rows: dict[str, Any]) -> None:
        head = dict(gpu="g", versions={}, commit="c")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r | head) + "\n" for r in rows))

    def lora(contender: str, over: float, run: str) -> dict[str, Any]:
        told = dict(forward_ms=1.0, both_ms=2.0, forward_over_base=over, both_over_base=over)
        return dict(op="lora", shape="8x4x4", rank=16, contender=contender, run=run, **told)

    write("lora", lora("base", 0, "a"), lora("fxfuse", 0.5, "a"), lora("base", 0, "b"), lora("fxfuse", 0.1, "b"))
    table = product_tables.lora(tmp_path)
    assert "+10%" in table
    assert "+50%" not in table
    four_bit = dict(op="dequantize_4bit", shape="8x4", code="nf4", blocksize=64, nested=True, dtype="bfloat16", run="a")
    timed = dict(ms=0.04, share_of_copy=0.87, host_us=9.0)
    write(
        "dequantize",
        dict(four_bit, contender="bitsandbytes", ms=0.08, share_of_copy=0.43, host_us=30.0),
        dict(four_bit, contender="fxfuse gather 4x2", exact=True, **timed),
        dict(four_bit, contender="fxfuse gather 4x2", exact=False, room=16, **timed),
    )
    assert "| 2.00 | 9, 30 | **no** |" in product_tables.dequantize(tmp_path)
    loss = dict(op="linear_loss", shape="T8 H4 V9", case="cross_entropy", trained=False, run="a")
    write("linear_loss", dict(loss, contender="fxfuse", ms=25.0, over_gemms=1.05, extra_gib=0.25))
    assert "| 25.0 (1.05x) / 0.25 |" in product_tables.linear_loss(tmp_path)
