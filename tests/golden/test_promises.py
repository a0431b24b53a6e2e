"""Promises that reading the source can hold: it names no model, no backward is written by hand, importing it changes nothing."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("fxfuse", "kernels", "patterns") for path in (ROOT / folder).rglob("*.py"))
SHOWING = ("fxfuse/cli.py", "fxfuse/demo/")  # they make a model, to show what is done to it

# Words of ours that some model is called, too.
ORDINARY = {
    "bit": "4-bit weights", "align": "of a row in a printed table", "clip": "as torch.clip", "cvt": "an instruction of GPUs",
    "minimax": "an approximation of least greatest error", "codegen": "a module of Triton", "encoder-decoder": "what a model may be",
}  # fmt: skip

# Classes of torch.autograd.Function: none of them computes a derivative.
MOVING_DATA = {
    "fxfuse/capture/entering.py: _Entry": "the identity, whose cotangent is dropped",
    "fxfuse/output_contract/tensor.py: Link": "a place in the graph; its backward is autograd's own, of what is done there",
}
# Backwards that ops are registered with: each calls an op whose result was derived, or is the transpose of moving rows.
REGISTERED = {
    "fxfuse/fused_op.py": "the derived program of the forward's",
    "fxfuse/linear_loss/op.py": "products around a derived program",
    "fxfuse/attention/op.py": "products around a derived program",
    "fxfuse/attention/flex_op.py": "FlexAttention's own",
    "fxfuse/row_selection/op.py": "moving rows back",
}
# What may be called for its effect as a module is imported: torch's registry for our ops, and our own table of spellings.
REGISTRIES = ("LIBRARY.define", "LIBRARY.impl", "torch.library.register_")
# Whole statements that are none of the usual, and why.
UNUSUAL = {
    "fxfuse/__init__.py: __path__.append(os.path.dirname(__path__[0]))": "in a checkout, kernels/ and patterns/ lie beside it",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, word): identifiers whole, texts and comments word by word."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            for word in re.findall(r"[A-Za-z][A-Za-z0-9_\-]*", token.string):
                yield token.start[0], word


def names_of_models() -> set[str]:
    """Every model type that transformers' registry knows, as it is written there, and every class, in small letters."""
    from transformers.models.auto import configuration_auto, modeling_auto

    found = {*configuration_auto.CONFIG_MAPPING_NAMES, *configuration_auto.CONFIG_MAPPING_NAMES.values()}
    for table, mapping in vars(modeling_auto).items():
        if table.endswith("_MAPPING_NAMES"):
            for value in mapping.values():
                found.update([value] if isinstance(value, str) else value)
    return {each.lower() for each in found}


def models_in(source: str, models: set[str]) -> list[str]:
    return [f"{line}: {word}" for line, word in words_of(source) if word.lower() in models and word.lower() not in ORDINARY]


def test_no_model_is_named() -> None:
    models = names_of_models()
    assert len(models) > 1000
    said = {name(path): models_in(path.read_text(), models) for path in SOURCES if not name(path).startswith(SHOWING)}
    assert {path: words for path, words in said.items() if words} == {}


def test_a_model_that_is_named_is_found() -> None:
    models = names_of_models()
    for planted in ('if config.model_type == "llama":', "# as in Qwen3's attention", "class X(LlamaDecoderLayer): ...", "T5Model = 1"):
        found = models_in(planted, models | {"llamadecoderlayer"})
        assert found, planted
    assert models_in("rope = rotary(x)  # 4-bit weights", models) == []


def functions_of_autograd(tree: ast.Module) -> Iterator[str]:
    """Classes that derive from torch's, or that have a static backward, as only those do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            static = {part.name for part in methods if "staticmethod" in map(ast.unparse, part.decorator_list)}
            if any("autograd" in ast.unparse(base) for base in node.bases) or static & {"backward", "vjp", "jvp"}:
                yield node.name


def test_no_backward_is_written_by_hand() -> None:
    written, registered = set(), set()
    for path in SOURCES:
        source = path.read_text()
        written |= {f"{name(path)}: {each}" for each in functions_of_autograd(ast.parse(source))}
        if re.search(r"register_autograd\(|register_backward|setup_context=", source):
            registered.add(name(path))
    assert written == set(MOVING_DATA)
    assert registered == set(REGISTERED)


@pytest.mark.parametrize("planted", [
    "class Norm(torch.autograd.Function):\n    pass",
    "class Norm(Function):\n    @staticmethod\n    def backward(ctx, g):\n        return 2 * g",
], ids=["named", "imported"])  # fmt: skip
def test_a_backward_that_is_planted_is_found(planted: str) -> None:
    assert list(functions_of_autograd(ast.parse(planted))) == ["Norm"]


def effects(path: Path) -> Iterator[str]:
    """Statements of a module that do something as it is imported, beside naming things and registering what is ours."""
    tree = ast.parse(path.read_text())
    ours = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    def look(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func)
                if not called.startswith(REGISTRIES) and called not in ours:
                    yield ast.unparse(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    plain = all(isinstance(part, (ast.Name, ast.Tuple, ast.expr_context)) for part in ast.walk(target))
                    if not plain and ast.unparse(target).partition(".")[0] not in ours:
                        yield ast.unparse(node)
            elif isinstance(node, (ast.For, ast.If, ast.Try, ast.With)):
                if ast.unparse(getattr(node, "test", ast.Constant(0))) not in ("TYPE_CHECKING", "__name__ == '__main__'"):
                    yield from look(node.body + getattr(node, "orelse", []))
            elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Expr)):
                yield ast.unparse(node)

    return look(tree.body)


def test_importing_does_nothing_but_register() -> None:
    assert {f"{name(path)}: {what}" for path in SOURCES for what in effects(path)} == set(UNUSUAL)


def test_an_effect_that_is_planted_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    for text in ("import torch\ntorch.nn.Module.forward = None", "print('hello')", "import os\nos.environ['A'] = 'b'", "del x",
                 "for a in b:\n    a.patch()", "if x:\n    torch.set_num_threads(1)"):  # fmt: skip
        planted.write_text(text)
        assert list(effects(planted)), text


LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
REPLACED = """
import importlib.util, sys, types, warnings
warnings.simplefilter("ignore")
libraries = [each for each in {libraries} if importlib.util.find_spec(each)]
for each in (*libraries, "torch._dynamo", "torch._functorch.partitioners", "torch._inductor.compile_fx", "transformers.trainer",
             "transformers.models.llama.modeling_llama", "peft.tuners.lora.layer", "torch.nn.attention.flex_attention", "sympy"):
    importlib.import_module(each)

def standing():
    "Functions and classes of the libraries where they are found, and the methods of their classes."
    found = {{}}
    for home, module in list(sys.modules.items()):
        if home.partition(".")[0] not in libraries or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
                found[home, key] = value
            if isinstance(value, type) and value.__module__ == home:
                for part, method in list(vars(value).items()):
                    if isinstance(method, (types.FunctionType, staticmethod, classmethod, property)):
                        found[home, key, part] = method
    return found

def replaced():
    after = standing()
    return sorted(".".join(place) for place, value in before.items() if after.get(place) is not value)

def compiled_once():
    "torch.compile replaces some of torch's own methods when it is first used."
    import torch
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    torch.compile(layer, backend="aot_eager")(x).sum().backward()

compiled_once()
before = standing()
assert len(before) > 20000, len(before)
"""
IMPORTED = REPLACED + """
for each in {modules}:
    importlib.import_module(each)
assert replaced() == [], replaced()
"""
TRAINED = REPLACED + """
from tests.model import builders
import fxfuse
model = fxfuse.optimize(builders.with_lora(builders.llama(1)), validate="off", remainder="eager")
model(**builders.tokens()).loss.backward()
str(fxfuse.report(model))
assert replaced() == [], replaced()
fxfuse.restore(model)
assert replaced() == [], replaced()
"""


def modules() -> Iterator[str]:
    """Every module of ours by the name that it is imported under; those that are programs only are left out."""
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] not in ("__main__", "compile_worker", "liger_compat"):
            yield ".".join(part for part in ("fxfuse", *(parts[1:] if parts[0] == "fxfuse" else parts)) if part != "__init__")


@pytest.mark.parametrize("code", [IMPORTED, TRAINED], ids=["by importing it", "by training with it"])
def test_no_library_is_patched(code: str) -> None:
    script = code.format(libraries=LIBRARIES, modules=list(modules()))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
