"""The ``fxfuse`` command. Each verb is a thin door to one function of the library."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfuse.reporting.records import Report

app = typer.Typer(
    help="Fused training kernels, derived from a PyTorch model and proven before use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True)
failures = Console(stderr=True, soft_wrap=True)

Source = Annotated[str, typer.Argument(help="A folder, a config.json, a hub id, or a transformers type.")]


def main() -> None:
    """What the console script and ``python -m fxfuse`` call."""
    app()


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Your model: a folder, config.json or hub id.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Training steps of each twin.")] = 32,
) -> None:
    """Train eager and fused twins on real text; show sites, losses, saved bytes, time and a derivation."""
    _needs("transformers", "tokenizers")
    from fxfuse.demo import run
    from fxfuse.model_source import UnknownModel

    try:
        agreed = run(console, model, steps)
    except UnknownModel as error:
        _fail(str(error))
    if not agreed:
        _fail("the twins do not agree, or nothing was fused, or a site failed: see above", code=1)


@app.command()
def doctor() -> None:
    """Versions, GPU, compiler, and what will work here. Exit code 1 when fxfuse itself does not."""
    from fxfuse.doctor import examine, healthy, prognosis, versions

    console.print(Text(", ".join(f"{name} {number or '-'}" for name, number in versions().items())))
    findings = examine()
    for finding in findings:
        mark = "ok" if finding.good else "NO" if finding.needed else "--"
        console.print(Text(f"{mark}  {finding.name:<12} {finding.told}"))
    for sentence in prognosis(findings):
        console.print(Text(sentence))
    if not healthy(findings):
        raise typer.Exit(1)


@app.command()
def explain(
    source: Source,
    memory: Annotated[str | None, typer.Option(help='A budget: "auto", "22GiB", 0.9. Predicts peak and step.')] = None,
    batch: Annotated[int, typer.Option(min=0, help="Rows of a batch; 0: one.")] = 0,
    seq: Annotated[int, typer.Option(min=0, help="Tokens in a row; 0: at most 1024.")] = 0,
    four_bit: Annotated[bool, typer.Option("--4bit", help="Linears in NF4, frozen.")] = False,
    lora_rank: Annotated[int, typer.Option(min=0, help="Adapters on all linears; 0: none.")] = 0,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, sgd, momentum or none: what it keeps.")] = "adamw",
    device: Annotated[str, typer.Option(help='A GPU by its name, as in "NVIDIA H200".')] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="With --memory: draw the frontier (.svg; .png by matplotlib).")] = None,
) -> None:
    """What would be done to a model, from its config alone: no weights are read, nothing is changed."""
    _needs("transformers", *["bitsandbytes"] * four_bit, *["peft"] * bool(lora_rank))
    import fxfuse
    from fxfuse.explanation import Setup, explain_config
    from fxfuse.model_source import config_of

    if plot is not None and memory is None:
        _fail("--plot draws what other budgets would cost: give one with --memory, as in --memory auto")
    setup = Setup(_number(memory), batch, seq, four_bit, lora_rank, optimizer, device)
    try:
        report = explain_config(config_of(source), setup)
        if plot is not None and report.memory is not None:
            from fxfuse.reporting.frontier_plot import write

            write(report.memory, plot)
    except (ValueError, TypeError, fxfuse.errors.FxfuseError) as error:
        _fail(str(error))
    _show(report, json, html)


def _number(memory: str | None) -> float | str | None:
    """A word of the command line as ``optimize`` would be given it: 0.9 is a fraction, 12GiB a size, 1000000 bytes."""
    for kind in (int, float):
        try:
            return None if memory is None else kind(memory)
        except ValueError:
            continue
    return memory


class Form(str, Enum):
    """How a derivation is written."""

    text = "text"
    latex = "latex"
    triton = "triton"


@app.command()
def derive(
    function: Annotated[str, typer.Argument(help="A rule, such as rms_norm, or FILE.py:FUNCTION.")],
    shape: Annotated[list[str] | None, typer.Option(help="Of each operand in turn: 4x8.")] = None,
    form: Annotated[Form, typer.Option(help="How to write it.")] = Form.text,
    check: Annotated[bool, typer.Option(help="Also compare with autograd in float64.")] = False,
) -> None:
    """Derive the backward of a plain PyTorch function, and print it."""
    import fxfuse
    from fxfuse.function_source import UnknownFunction, function_of, operands

    try:
        plain = function_of(function)
        derivation = fxfuse.derive(plain, *operands(plain, shape or ()))
    except (UnknownFunction, fxfuse.errors.FxfuseError) as error:
        _fail(str(error))
    written = {Form.text: derivation.__str__, Form.latex: derivation.latex, Form.triton: derivation.triton}
    console.print(Text(written[form]()))
    if check:
        console.print(Text(str(derivation.check())))


@app.command()
def bench(
    source: Source,
    rows: Annotated[int, typer.Option(min=1)] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 512,
    steps: Annotated[int, typer.Option(min=4)] = 8,
) -> None:
    """Time training steps of a model on random tokens, eager and fused, on the GPU if there is one."""
    model = _model(source)
    from fxfuse.reporting.text import quantity
    from fxfuse.twins import timed

    timing = timed(model, rows, length, steps)
    console.print(Text(str(timing.report)))
    for name, run in (("eager", timing.eager), ("fused", timing.fused)):
        told = f"step {1e3 * run.step:.1f} ms, first {run.first_step:.1f} s, saved {quantity(run.saved_bytes)}"
        console.print(Text(f"{name}  {told}"))


@app.command()
def validate(
    source: Source,
    rows: Annotated[int, typer.Option(min=1)] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 64,
) -> None:
    """Check a model's loss and every gradient, fused against eager, both against twice the precision."""
    model = _model(source)
    from fxfuse.twins import compared

    comparison = compared(model, rows, length)
    console.print(Text(str(comparison.report)))
    console.print(Text(f"largest error ratios of {len(comparison.ratios)} (loss and gradients):"))
    for name, ratio in comparison.worst:
        console.print(Text(f"  {ratio:6.2f}  {name}"))
    if not comparison.passed:
        _fail("the fused model is further from the exact result than rounding explains: see above", code=1)


def _model(source: str) -> PreTrainedModel:
    """The named model, on the GPU in bfloat16 where there is one, else on the CPU in float32."""
    _needs("transformers")
    import torch

    from fxfuse.model_source import UnknownModel, model_of

    on_gpu = torch.cuda.is_available()
    try:
        model = model_of(source, torch.bfloat16 if on_gpu else torch.float32)
    except UnknownModel as error:
        _fail(str(error))
    return model.to("cuda") if on_gpu else model


def _show(report: Report, json: bool, html: Path | None) -> None:
    console.print(Text(report.to_json() if json else str(report)))
    if html is not None:
        report.to_html(html)


def _needs(*packages: str) -> None:
    """Say which package is missing before a traceback does."""
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        _fail(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _fail(sentence: str, code: int = 2) -> NoReturn:
    failures.print(Text(f"fxfuse: {sentence}"))
    raise typer.Exit(code)
