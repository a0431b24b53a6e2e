"""Writes liger_coverage.json: which model types Liger-Kernel patches and with which of its kernels.

    pip download liger-kernel==0.8.5 --no-deps -d DIR; python benchmarks/liger_list.py DIR/liger_kernel-0.8.5-*.whl

Read from the wheel's monkey_patch.py by parsing it, not by importing it: the keys of MODEL_TYPE_TO_APPLY_LIGER_FN,
and for each the boolean switches of its patch function that are on by default.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

SOURCE = "liger_kernel/transformers/monkey_patch.py"


def switches(function: ast.FunctionDef) -> list[str]:
    pairs = zip(reversed(function.args.args), reversed(function.args.defaults), strict=False)
    return sorted(
        arg.arg for arg, default in pairs if isinstance(default, ast.Constant) and default.value is True
    )


def main(wheel: str) -> None:
    tree = ast.parse(zipfile.ZipFile(wheel).read(SOURCE))
    functions = {node.name: switches(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and getattr(node.targets[0], "id", "") == "MODEL_TYPE_TO_APPLY_LIGER_FN"
    )
    assert isinstance(table, ast.Dict)
    models = {key.value: functions[value.id] for key, value in zip(table.keys, table.values, strict=True)}  # type: ignore[union-attr,attr-defined]
    out = dict(
        source=f"{Path(wheel).name}: {SOURCE}, MODEL_TYPE_TO_APPLY_LIGER_FN",
        models=dict(sorted(models.items())),
    )
    Path(__file__).with_name("liger_coverage.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
