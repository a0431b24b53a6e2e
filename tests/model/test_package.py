"""The package as people get it: cheap to import, whole when installed, and no trouble to its neighbours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fxfuse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
HOMES = {"fxfuse": "fxfuse", "kernels": "fxfuse.kernels", "patterns": "fxfuse.patterns"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter started in ``cwd``, on stdout and stderr together."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_import_prints_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = "import sys, fxfuse; assert not {'torch', 'sympy', 'rich', 'transformers'} & set(sys.modules)"
    assert python(code, tmp_path) == ""


def test_every_public_name_is_there() -> None:
    for name in fxfuse.__all__:
        assert getattr(fxfuse, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'optimise'; it offers"):
        fxfuse.optimise  # noqa: B018


def test_no_module_bears_a_public_name() -> None:
    """A submodule of that name would overwrite the function when it is first imported."""
    taken = {path.stem for path in (ROOT / "fxfuse").iterdir()} | {"kernels", "patterns"}
    assert taken & set(fxfuse.__all__) <= {"errors"}


def test_pyproject_lists_every_folder_of_code() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for folder, package in HOMES.items():
        home = ROOT / folder
        for init in home.rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(home).parts]))
        for source in home.rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), f"{source} is in no package"
    assert listed == found


def test_kernels_and_patterns_say_what_they_are_and_do_nothing() -> None:
    for folder in ("kernels", "patterns"):
        code = compile((ROOT / folder / "__init__.py").read_text(), folder, "exec")
        assert set(code.co_names) == {"__doc__"}


def test_the_installed_entry_point_is_the_backend() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="torch_dynamo_backends", name="fxfuse")
    assert point.value == "fxfuse.backend:compile_graph"
    assert callable(point.load())


def test_the_repository_root_on_the_path_does_not_hurt_transformers() -> None:
    """There, ``import kernels`` finds our folder; transformers must still see that its package is absent."""
    code = """
import kernels
assert not [name for name in vars(kernels) if not name.startswith("__")]
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available()
size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
import torch
AutoModelForCausalLM.from_config(LlamaConfig(**size))(input_ids=torch.zeros(1, 3, dtype=torch.long))
print("fine")
"""
    assert python(code, ROOT).splitlines()[-1] == "fine"


def test_a_wheel_is_whole(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in HOMES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)

    expected = {Path("fxfuse/py.typed")}
    for folder, package in HOMES.items():
        home = Path(package.replace(".", "/"))
        expected |= {home / path.relative_to(source / folder) for path in (source / folder).rglob("*.py")}
    files = (path for path in (site / "fxfuse").rglob("*") if path.suffix in (".py", ".typed"))
    assert {path.relative_to(site) for path in files} == expected

    code = (
        "import fxfuse.kernels, fxfuse.patterns, importlib.metadata as m\n"
        "print(fxfuse.kernels.__file__)\n"
        "print(sorted((p.group, p.name) for p in m.distribution('fxfuse').entry_points))"
    )
    where, points = python(code, tmp_path, PYTHONPATH=str(site)).splitlines()
    assert where == str(site / "fxfuse/kernels/__init__.py")
    assert points == "[('console_scripts', 'fxfuse'), ('torch_dynamo_backends', 'fxfuse')]"
