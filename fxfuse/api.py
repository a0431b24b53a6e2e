"""The public doors: ``optimize`` a model in place, ``restore`` it, ``report`` what was done and what has run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from fxfuse.capture import find_installation, install, is_copy, uninstall
from fxfuse.capture.declines import reject_wrapper
from fxfuse.capture.rehearse import check_example_inputs, rehearse
from fxfuse.cuda_graphs.recorder import release
from fxfuse.lowering import start_compilers
from fxfuse.memory import offload_runtime
from fxfuse.memory.budget import parse_budget
from fxfuse.reporting.records import Report, attached, detach

logger = logging.getLogger("fxfuse")
Model = TypeVar("Model", bound=nn.Module)
WARM_UP_SECONDS = 3.0  # at most

RULES = (
    "rms_norm",
    "layer_norm",
    "residual_norm",
    "rope",
    "qk_norm_rope",
    "gated_activation",
    "activation",
    "cross_entropy",
    "linear_loss",
    "lora_linear",
    "nf4_linear",
    "shared_input_linears",
    "attention",
    "row_selection",
    "row_weights",
    "gated_norm",
    "l2_norm",
    "softmax",
    "gated_mlp",
    "unnamed",
)
CHOICES = {
    "logits": ("lazy", "always", "never"),
    "remainder": ("auto", "eager", "inductor"),
    "validate": ("fast", "full", "off"),
}


def optimize(
    model: Model,
    *,
    memory: float | str | None = None,
    logits: str = "lazy",
    rules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    remainder: str = "auto",
    validate: str = "fast",
    strict: bool = False,
    cuda_graphs: bool | str = False,
    example_inputs: Any = None,
) -> Model:
    """Fuse ``model`` in place and give back the same object. Calling it twice changes nothing.

    Graphs are captured, checked and fused in the first training call; ``example_inputs`` (a tensor, a tuple of
    positional or a dict of keyword arguments) makes that call now, leaving gradients, buffers and random state
    as they are. Call it on the plain or adapter-wrapped model, before DDP, FSDP or a trainer wraps it. On a GPU the first call of a
    process also waits, half a second, for what its first kernels need.

    Where the loss is fused with the output projection, the logits of a training call are computed when something
    reads them (``logits="lazy"``): until the model runs forward again or its weights change; later reads raise
    ``OutputContractError``. ``"always"`` makes them an ordinary output, ``"never"`` makes reading them an error.
    ``rules``/``exclude`` name the rules to use or to leave out. ``remainder`` says who runs what no rule takes.
    ``validate``: how much is compared with float64 before a site is used. ``strict`` raises on internal errors
    that would otherwise decline a site. The environment variable FXFUSE_DISABLE=1 makes this a no-op.

    ``cuda_graphs=True`` is for models whose steps wait for the host (many small kernels): blocks are recorded once they have run and
    replayed from then on, for up to four lengths. What they save for the backward (under a checkpoint, what they return) then keeps its
    memory between steps. Calls that cannot be replayed run as without it, and the report counts them. ``"auto"`` times a block first
    and records where the host is what is waited for. Neither goes with ``memory``, nor with what Inductor runs.

    ``memory`` is a budget for the whole process on the model's device: ``"22GiB"``, bytes, a fraction, or ``"auto"`` for what is free.
    What each block saves, computes again or keeps on the host is then planned for the fastest step that fits, after a first step
    that saves as little as can be; gradient checkpointing that is enabled on the model is switched off while it runs. A budget that no
    plan fits raises ``BudgetTooSmall`` in the first forward. Without a budget, checkpointing is left as it is.
    """
    reject_wrapper(model)
    check_example_inputs(example_inputs)
    budget = parse_budget(memory)
    backend = _backend("none" if budget is None else "keep", logits, rules, exclude, remainder, validate, strict, cuda_graphs)
    if disabled():
        logger.info("FXFUSE_DISABLE is set: the model is left as it is")
        return model
    installation = find_installation(model)
    if installation is None or (installation.backend, installation.budget) != (backend, budget) or not installation.covers(model):
        begun = start_compilers(model, backend) if any(parameter.is_cuda for parameter in model.parameters()) else None
        restore(model)
        installation = install(model, backend, strict=strict, budget=budget)
        for line in installation.notes():
            logger.warning("%s", line)
        if begun is not None:
            begun.join(WARM_UP_SECONDS)  # half a second, once; beside a trace it takes both longer
    if example_inputs is not None:
        rehearse(model, example_inputs)
    return model


def restore(model: Model) -> Model:
    """Take fxfuse out of ``model`` again: the exact original forward. Harmless on a model without it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fxfuse.restore takes a torch.nn.Module, got {type(model).__name__}")
    if find_installation(model) is not None:
        offload_runtime.release()
        release(model)
    uninstall(model)
    for module in model.modules():
        detach(module)
    return model


def report(model: nn.Module) -> Report:
    """What was done to ``model``, and what has executed since."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fxfuse.report takes a torch.nn.Module, got {type(model).__name__}")
    installation = find_installation(model)
    if installation is None:
        return Report.of(model, notes=[_why_nothing(model)])
    notes = [*installation.notes(), *offload_runtime.told()]
    if not any(attached(module) for module in model.modules()):
        notes.append(
            "Pending: graphs are captured and checked in the first training call; pass example_inputs= to "
            "fxfuse.optimize to have that now"
        )
    governor = installation.governor
    return Report.of(model, notes=notes, errors=installation.errors(), memory=None if governor is None else governor.plan)


def explain(model_or_config: Any, memory: float | int | str | None = None, **inputs: Any) -> Report:
    """What ``optimize`` would do to a model, or to the model of a transformers config, without doing it.

    A config may be given by its folder, its file, its id on the hub or its transformers type. Nothing is changed and no weights are
    needed. ``inputs`` are the model's own, by name; a transformers model has usual ones. With ``memory``, as ``optimize`` takes it, the
    plan for that budget is in the report: its peak and what it is made of, what each block keeps, and what other budgets would cost.
    No GPU is needed; the rates of one that is not here come from a table.
    """
    from fxfuse.backend import Backend
    from fxfuse.explanation import Setup, explain_with

    if isinstance(model_or_config, str | os.PathLike):
        from fxfuse.model_source import config_of

        model_or_config = config_of(os.fspath(model_or_config))
    return explain_with(Backend(remainder="eager", validate="off"), model_or_config, inputs, Setup(memory=memory))


def disabled() -> bool:
    """Whether the environment says to leave every model alone."""
    return os.environ.get("FXFUSE_DISABLE", "").lower() not in ("", "0", "false", "no")


def _why_nothing(model: nn.Module) -> str:
    if disabled():
        return "FXFUSE_DISABLE is set: nothing is optimized"
    if is_copy(model):
        return (
            "This is a copy of an optimized model, and copies are not optimized: call fxfuse.optimize on it"
        )
    return "This model is not optimized: call fxfuse.optimize on it (copies of optimized models need it too)"


def _backend(
    plan: str,
    logits: str,
    rules: Iterable[str] | None,
    exclude: Iterable[str],
    remainder: str,
    validate: str,
    strict: bool,
    cuda_graphs: bool | str,
) -> Any:
    """The backend that these options describe, checked; equal options give an equal backend."""
    from fxfuse.backend import Backend

    for name, value in (("logits", logits), ("remainder", remainder), ("validate", validate)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} takes one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict takes True or False, got {type(strict).__name__}")
    return Backend(
        rules=None if rules is None else _rule_names("rules", rules),
        exclude=_rule_names("exclude", exclude),
        plan=plan,
        logits=logits,
        validate=validate,
        remainder=remainder,
        strict=strict,
        cuda_graphs=cuda_graphs,
    )


def _rule_names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    """Rule names without repetition, in one order, so that equal choices are equal values."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"{argument} takes a tuple of rule names, got {names!r}; a single name is ({names!r},)"
        )
    chosen = tuple(sorted(set(names)))
    unknown = [name for name in chosen if name not in RULES]
    if unknown:
        raise ValueError(
            f"{argument} holds no such rule: {', '.join(map(repr, unknown))}; there are {', '.join(RULES)}"
        )
    return chosen
