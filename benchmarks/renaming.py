"""The same model under other names: every class, function, submodule, parameter, buffer and attribute that its
modeling file defines, its configuration class and its model_type, replaced in the source text before it is run.

What keeps its name, because code outside the file reads it: configuration fields, `weight` and `bias`, methods that
transformers' base classes call, and the scalars that its attention functions read (`num_key_value_groups`...).
`build` checks itself: the renamed model has the same parameters, in the same order, and the same loss and gradients, bit for bit.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import tiny_models

# files of transformers that handle a model's insides by attribute
READERS = (
    "modeling_utils.py",
    "modeling_layers.py",
    "masking_utils.py",
    "modeling_rope_utils.py",
    "core_model_loading.py",
    "integrations/moe.py",
    "integrations/sdpa_attention.py",
    "integrations/hub_kernels.py",
    "utils/generic.py",
    "utils/output_capturing.py",
    "cache_utils.py",
)
EXPERT_READERS = ("integrations/moe.py",)
STUB = """
def auto_docstring(obj=None, **_):
    return obj if obj is not None else (lambda o: o)
"""


def _attributes_read(files: tuple[str, ...]) -> set[str]:
    import transformers

    root = Path(transformers.__file__).parent
    found: set[str] = set()
    for file in files:
        if not (root / file).exists():
            continue
        for node in ast.walk(ast.parse((root / file).read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)
    return found


@functools.cache
def _kept() -> tuple[set[str], set[str]]:
    """Names that any attribute keeps; names that a submodule or parameter keeps."""
    import transformers
    from transformers.modeling_layers import GradientCheckpointingLayer

    bases = {
        *dir(transformers.PreTrainedModel),
        *dir(GradientCheckpointingLayer),
        *dir(torch.nn.Module()),
        *dir(torch.autograd.Function),
        "weight",
        "bias",
    }
    return bases | _attributes_read(READERS), bases | _attributes_read(EXPERT_READERS)


def _own_attributes(tree: ast.Module, model: torch.nn.Module, module: ModuleType, config: Any) -> set[str]:
    """Attributes to rename: what the file's classes assign to self, and what hangs on their instances."""
    kept, kept_hard = _kept()
    assigned = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }
    methods = {
        item.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }
    hanging: set[str] = set()
    for child in model.modules():
        if type(child).__module__ == module.__name__:
            hanging |= {*child._modules, *child._parameters, *child._buffers}
    settings = {*dir(config), *config.to_dict()}
    names = ((assigned | methods) - kept - settings) | (hanging - kept_hard)
    return {n for n in names if not n.startswith("_") and not n.isdigit()}


class _Edits:
    """Replacements by position in a source text."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.found: list[tuple[int, int, int, str]] = []

    def at(self, line: int, start: int, end: int, text: str) -> None:
        """Columns are UTF-8 byte offsets, as ast gives them."""
        self.found.append((line - 1, start, end, text))

    def apply(self) -> str:
        for line, start, end, text in sorted(set(self.found), reverse=True):
            raw = self.lines[line].encode()
            self.lines[line] = (raw[:start] + text.encode() + raw[end:]).decode()
        return "".join(self.lines)


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_config(node: ast.expr) -> bool:
    return getattr(node, "id", getattr(node, "attr", "")).endswith("config")


def _naming_strings(tree: ast.Module) -> set[int]:
    """Constants that name attributes: in class-level assignments, and in getattr, setattr, register_buffer..."""
    holders: list[ast.AST] = [
        item
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, (ast.Assign, ast.AnnAssign))
    ]
    for node in ast.walk(tree):
        called = (
            getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        )
        if called in ("getattr", "setattr", "hasattr", "force_accelerate_hooks") or called.startswith(
            "register_"
        ):
            holders += node.args[:2]  # type: ignore[attr-defined]
    return {
        id(c)
        for holder in holders
        for c in ast.walk(holder)
        if isinstance(c, ast.Constant) and isinstance(c.value, str)
    }


def _substitute(source: str, names: dict[str, str], attributes: dict[str, str]) -> str:
    """`names`: classes and functions of the file; `attributes`: what is read after a dot, and named in strings."""
    tree, edits = ast.parse(source), _Edits(source)
    imported = {
        alias.asname or alias.name.split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for alias in n.names
    }
    imported |= {
        alias.asname or alias.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    tensor = set(dir(torch.Tensor))
    words = {**attributes, **names}
    naming = _naming_strings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in attributes:
            root = _root(node.value)
            if root in imported or (node.attr in tensor and root != "self") or _is_config(node.value):
                continue
            edits.at(
                node.end_lineno or 0,
                (node.end_col_offset or 0) - len(node.attr),
                node.end_col_offset or 0,
                attributes[node.attr],
            )
        elif isinstance(node, ast.Name) and node.id in names:
            edits.at(node.lineno, node.col_offset, node.end_col_offset or 0, names[node.id])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            keyword = "class " if isinstance(node, ast.ClassDef) else "def "
            start = edits.lines[node.lineno - 1].index(keyword) + len(keyword)
            new = names.get(node.name) if node.col_offset == 0 else attributes.get(node.name)
            if new:
                edits.at(node.lineno, start, start + len(node.name), new)
        elif isinstance(node, ast.Constant) and id(node) in naming and node.lineno == node.end_lineno:
            text = re.sub(r"[A-Za-z_]\w*", lambda m: words.get(m.group(), m.group()), str(node.value))
            if text != node.value:
                edits.at(node.lineno, node.col_offset, node.end_col_offset or 0, repr(text))
    return edits.apply()


def _absolute(source: str, package: str, config_module: str, config_new: str, names: dict[str, str]) -> str:
    """Relative imports made absolute; the configuration's import pointed at its renamed copy."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not (node.level or node.module == config_module):
            continue
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        target = ".".join([*parents, *([node.module] if node.module else [])])
        imports = ", ".join(
            (names.get(a.name, a.name) if target == config_module else a.name)
            + (f" as {a.asname}" if a.asname else "")
            for a in node.names
        )
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [
            f"{indent}from {config_new if target == config_module else target} import {imports}\n",
            *["\n"] * ((node.end_lineno or node.lineno) - node.lineno),
        ]
    return "".join(lines)


def _after_imports(source: str, text: str) -> str:
    last = max(
        n.end_lineno or 0 for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))
    )
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:last], text, *lines[last:]])


def _load(name: str, source: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _top_level(tree: ast.Module) -> list[str]:
    return [
        n.name
        for n in tree.body
        if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("__")
    ]


@functools.cache
def renamed_classes(model_name: str) -> tuple[Any, Any]:
    """(model class, configuration class) of a tiny model, under other names."""
    config = tiny_models.config_for(model_name)
    original = tiny_models.build(model_name)
    model_module, config_module = sys.modules[type(original).__module__], sys.modules[type(config).__module__]
    sources = [inspect.getsource(m) for m in (config_module, model_module)]
    trees = [ast.parse(s) for s in sources]
    number = list(tiny_models.MODELS).index(model_name)
    names = {
        n: f"K{number}x{i}" if n[0].isupper() else f"f{number}x{i}"
        for i, n in enumerate(dict.fromkeys(_top_level(trees[0]) + _top_level(trees[1])))
    }
    own = _own_attributes(trees[1], original, model_module, config)
    attributes = {n: f"a{number}x{i}" for i, n in enumerate(sorted(own))}
    folder = Path(tempfile.mkdtemp(prefix="renamed-"))
    types = re.compile(r"""(model_type\s*(?::\s*\w+\s*)?=\s*)["'](\w+)["']""")
    config_name, model_name_ = f"zz{number}config", f"zz{number}model"
    package = config_module.__name__.rpartition(".")[0]
    text = _absolute(_substitute(sources[0], names, {}), package, "", "", names)
    text = types.sub(lambda m: f'{m.group(1)}"zz{number}_{m.group(2)}"', text)
    new_config = _load(config_name, _after_imports(text, STUB), folder)
    package = model_module.__name__.rpartition(".")[0]
    text = _absolute(
        _substitute(sources[1], names, attributes), package, config_module.__name__, config_name, names
    )
    new_model = _load(model_name_, _after_imports(text, STUB), folder)
    return getattr(new_model, names[type(original).__name__]), getattr(
        new_config, names[type(config).__name__]
    )


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The renamed twin of `tiny_models.build(name)`, checked against it."""
    original = tiny_models.build(name, dtype)
    cls, config_cls = renamed_classes(name)
    tiny = tiny_models.MODELS[name]
    arguments = {**tiny.base, **tiny.config}
    arguments.pop("attn_implementation", None)
    config = config_cls(**arguments)
    if hasattr(original.config, "layer_types"):
        config.layer_types = (
            original.config.layer_types
        )  # transformers respells it in a configuration not its own
    model = tiny_models.build(name, dtype, cls, config)
    model.loss_type = original.loss_type  # transformers guesses it from the class name
    ours, theirs = list(model.named_parameters()), list(original.named_parameters())
    same_names = sum(a == b for (a, _), (b, _) in zip(ours, theirs, strict=True))
    if not all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)):
        raise RuntimeError(f"renaming {name} changed its parameters")
    inputs = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in tiny_models.inputs_for(name).items()
    }
    losses = [m(**inputs).loss for m in (model, original)]
    for loss in losses:
        loss.backward()
    pairs = [losses, *([a.grad, b.grad] for (_, a), (_, b) in zip(ours, theirs, strict=True) if b.grad is not None)]
    if not all(a is not None and torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(f"renaming {name} changed its loss or a gradient")
    model.zero_grad(set_to_none=True)
    if same_names:
        raise RuntimeError(f"renaming {name} left {same_names} parameter paths as they were")
    return model
