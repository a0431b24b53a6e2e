"""Every example runs, tiny, in a process of its own, and its report says that it ran fused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "tiny.py")
NEEDS = {"sft_lora.py": "trl", "sft_qlora.py": "trl", "dpo.py": "trl", "grpo.py": "trl", "pretrain.py": "datasets"}


def lines_of(name: str) -> list[str]:
    return (EXAMPLES / name).read_text().splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_is_added_and_marked(name: str) -> None:
    marked = [line for line in lines_of(name) if line.endswith("# <- the added line")]
    assert len(marked) == 1
    assert "fxfuse.optimize(" in marked[0]
    assert len(lines_of(name)) <= 70


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(name, "peft"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "fsdp2.py" else []
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), "--tiny"], cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    fused, sites = map(int, re.search(r"fxfuse: (\d+) of (\d+) sites fused", done.stdout).groups())  # type: ignore[union-attr]
    assert fused >= 0.8 * sites > 0
    assert not re.search("^ERROR ", done.stdout, re.MULTILINE)
    if name == "sft_qlora.py":
        assert (tmp_path / "out/sft_qlora/merged/config.json").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {"__name__": "tour"}
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    path = tmp_path / "tour.py"  # (a file, so that the source of its function can be read)
    path.write_text(source)
    exec(compile(source, str(path), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "residual_norm" in printed
    assert "tl.load" in printed
    assert (tmp_path / "frontier.svg").exists()
