"""The torch.compile backend: ``torch.compile(model, backend="fxfuse", options={...})``, found through its entry point.

A ``Backend`` is a value: what may be fused, how it is checked, what runs the rest. Equal backends share compiled graphs, so
nothing of one model is in it; counters and reports hang on the modules that run (reporting/records.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from ._torch import TensorifyScalarRestartAnalysis, functorch_level, is_batched_gradient, make_graph_module
from .aot import compile_eager, compile_inductor
from .canonical.facts import is_plain, tensor_of
from .capture.context import current_module, current_role, note_changes
from .capture.known_functions import trace_again
from .errors import DoubleBackwardError, UnsupportedGraph
from .linear_loss.lazy_output import LAZY_OUTPUTS
from .memory.plan import Choice
from .output_contract.fill import FilledOutputs
from .products.arrange import Rules, leave_products
from .remainder import fastest_remainder
from .reporting.records import GraphRecord, Site, attach, withdraw
from .rewriting import Options, example_device, rewrite_graph
from .validation import taken_from_earlier_runs

logger = logging.getLogger("fxfuse")

CHOICES = {
    "logits": ("lazy", "always", "never"),
    "validate": ("fast", "full", "off"),
    "remainder": ("auto", "eager", "inductor"),
}


@dataclass(frozen=True)
class Backend:
    """How graphs are compiled.

    rules, exclude: names of rules to use (None: all) and to leave out
    plan:           "none" saves what eager would, less the cheap outputs of fused ops; "save" saves all that eager would; anything
                    else is the plan of a memory budget (memory/plan.py)
    logits:         what becomes of logits whose loss is fused with the output projection: "lazy" ones are computed when they are
                    read, "always" keeps them an ordinary output (and the loss apart), "never" makes reading them an error
    validate:       how much is compared with float64 before a site is used
    remainder:      who runs what no rule takes
    strict:         raise on internal errors that would otherwise decline a site
    cuda_graphs:    record blocks as CUDA graphs and replay them (cuda_graphs/); "auto": those that wait for the host
    """

    rules: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    plan: str = "none"
    logits: str = "lazy"
    validate: str = "fast"
    remainder: str = "auto"
    strict: bool = False
    cuda_graphs: bool | str = False
    looks_again: ClassVar[bool] = True  # (capture/known_functions.py)

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} takes one of {', '.join(map(repr, accepted))}, got {getattr(self, name)!r}")
        Choice.parse(self.plan)
        if self.plan not in ("none", "save") and self.remainder == "inductor":
            raise ValueError(f"plan={self.plan!r} says what is saved tensor by tensor, and Inductor decides that itself for what it "
                             "compiles; a memory budget needs remainder='auto' or 'eager'")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict takes True or False, got {self.strict!r}")
        if not (isinstance(self.cuda_graphs, bool) or self.cuda_graphs == "auto"):
            raise ValueError(f"cuda_graphs takes True, False or 'auto', got {self.cuda_graphs!r}")
        if self.cuda_graphs is True and self.remainder == "inductor":
            raise ValueError("cuda_graphs=True records what fxfuse runs itself; with remainder='inductor' Inductor runs it: "
                             "use remainder='auto' or 'eager', or Inductor's own CUDA graphs")
        if self.cuda_graphs is True and self.plan not in ("none", "save"):
            raise ValueError("cuda_graphs=True keeps what blocks save in memory that a budget does not see: give either memory= or "
                             "cuda_graphs=True")

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        record = new_record()
        rewritten = self.rewrite(gm, record)
        finish_trace(gm if rewritten is None else rewritten, record)
        if rewritten is None:
            return counted(gm.forward, record)
        compiled = self._compile(rewritten, example_inputs, record)
        given_up = rewritten.meta.get(LAZY_OUTPUTS, ())
        if given_up:
            compiled = FilledOutputs(compiled, given_up, self.logits, record)
        return counted(compiled, record)

    def rewrite(self, gm: fx.GraphModule, record: GraphRecord) -> fx.GraphModule | None:
        """A copy of the graph with fused ops, its sites in the record; None where the graph must run as it is."""
        reason = foreign_input(gm)
        if reason:
            record.notes.append(reason)
            return None
        work = copy_of(gm)
        try:
            options = Options(self.why_not, self.validate, self.strict, lazy_outputs=self.logits != "always", gated=self.rules is None)
            with _unhooked():
                record.sites = rewrite_graph(work, options)
            earlier = taken_from_earlier_runs()
            if earlier:
                record.notes.append(f"{earlier} of its verdicts are from an earlier run of this build on this device")
        except Exception as error:
            self._failed("rewriting", error, record)
            return None
        return work

    def why_not(self, rule: str) -> str:
        """Why a rule is not used, or nothing."""
        if rule in self.exclude:
            return "excluded by the caller"
        if self.rules is not None and rule not in self.rules:
            return "not among the rules that the caller chose"
        return ""

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Callable:
        remainder = self.remainder
        if remainder == "auto":
            free = self.plan in ("none", "save") and self.cuda_graphs is not True
            remainder = fastest_remainder(example_device(gm)) if free else "eager"
        found = [replace(site) for site in record.sites]
        rules = Rules(self.why_not, self.validate, self.strict)
        try:
            if remainder == "inductor":
                return compile_inductor(gm, example_inputs, record, self.plan, rules)
            return compile_eager(gm, example_inputs, record, self.plan, rules, self.cuda_graphs)
        except TensorifyScalarRestartAnalysis:
            raise  # not an error: Dynamo traces again
        except Exception as error:
            if self.strict and not _is_torch_limit(error):
                raise
            record.sites = found  # whatever was arranged by then does not run
            return self._unplanned(gm, error, record)

    def _unplanned(self, gm: fx.GraphModule, error: Exception, record: GraphRecord) -> Callable:
        """The fused ops under plain autograd, where AOTAutograd cannot trace the rest (sizes that depend on data, say)."""
        why = str(error).splitlines()[0] if str(error) else ""
        line = (f"{record.module or 'a graph'} runs without a memory plan, its fused ops one by one: "
                f"{type(error).__name__}: {why}")
        if _is_torch_limit(error):
            logger.warning("%s", line)
            record.notes.append(line)
        else:
            logger.error("%s", line, exc_info=error)
            record.errors.append(line)
        leave_products(record, "its graph runs without a memory plan")
        return gm.forward

    def _failed(self, doing: str, error: Exception, record: GraphRecord) -> None:
        """The whole graph could not be done: it runs as it was, and the report says so."""
        if self.strict:
            raise error
        line = f"{record.module or 'a graph'} runs as it was: {doing} its graph failed with {type(error).__name__}: {error}"
        logger.error("%s", line, exc_info=error)
        record.errors.append(line)
        record.sites = [declined(site, "its graph could not be compiled; see the errors") for site in record.sites]


def _is_torch_limit(error: Exception) -> bool:
    """What torch's tracers cannot do has exceptions of its own; anything else is an error of ours."""
    return type(error).__module__.startswith("torch")


@dataclass(frozen=True)
class Planning:
    """A backend that finds the sites and goes no further; what runs is the graph as it was."""

    backend: Backend
    looks_again: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        record = new_record()
        self.backend.rewrite(gm, record)
        finish_trace(gm, record)
        pending(record)
        return counted(gm.forward, record)


def pending(record: GraphRecord) -> None:
    """The sites of a graph that was only looked at: they would be fused."""
    for site in record.sites:
        if site.status == "fused":
            site.status = "pending"


def planning(backend: Backend) -> Planning:
    """The backend that ``explain`` uses."""
    return Planning(backend)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
                  mode: str | None = None, **kwargs: Any) -> Callable[..., Any]:
    """What ``torch.compile(..., backend="fxfuse", options=..., mode=...)`` calls."""
    return backend_from_options(options, mode)(gm, example_inputs)


def backend_from_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Backend:
    """The backend that these options describe. ValueError says what is accepted."""
    if mode not in (None, "default"):
        raise ValueError(f"backend 'fxfuse' has no modes, got mode={mode!r}; use options={{'remainder': 'inductor'}}")
    accepted = [field.name for field in fields(Backend)]
    chosen = dict(options or {})
    unknown = [name for name in chosen if name not in accepted]
    if unknown:
        raise ValueError(f"backend 'fxfuse' has no option {', '.join(map(repr, unknown))}; it takes {', '.join(accepted)}")
    for name in ("rules", "exclude"):
        if isinstance(chosen.get(name), str):
            raise ValueError(f"{name} takes a sequence of rule names, got {chosen[name]!r}")
        if chosen.get(name) is not None:
            chosen[name] = tuple(chosen[name])
    return Backend(**chosen)


def new_record() -> GraphRecord:
    """A record for the module that is being compiled, attached to it; what the module changes is noted."""
    note_changes()
    module = current_module()
    record = GraphRecord(current_role() or "whole", "" if module is None else type(module).__name__)
    if module is not None:
        attach(module, record)
    return record


def finish_trace(runs: fx.GraphModule, record: GraphRecord) -> None:
    """What runs has a derivative; where it has none, Dynamo begins anew, and this record was of nothing."""
    try:
        trace_again(runs)
    except TensorifyScalarRestartAnalysis:
        module = current_module()
        if module is not None:
            withdraw(module, record)
        raise


def counted(compiled: Callable[..., Any], record: GraphRecord) -> Callable[..., Any]:
    """The compiled graph, its executions counted; a second derivative of it, or many first ones at once, is a named error."""
    named = False

    def run(*args: Any) -> Any:
        nonlocal named
        record.executed(current_module())
        outputs = compiled(*args)
        if not named and torch.is_grad_enabled():
            named = name_what_it_has_not(outputs)
        return outputs

    return run


def name_what_it_has_not(outputs: Any) -> bool:
    """Let the second derivative of AOTAutograd's function raise DoubleBackwardError, and a backward of a batch of gradients
    UnsupportedGraph. True once that is arranged.

    Done once for a compiled graph, on the class that its outputs' ``grad_fn`` leads to; a call costs nothing.
    """
    for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
        function = getattr(getattr(output, "grad_fn", None), "_forward_cls", None)
        original = getattr(function, "_double_backward", None)
        if function is None or original is None:
            continue

        def named(*args: Any, original: Callable = original) -> Any:
            grads = original(*args)
            for grad in grads:
                if isinstance(grad, Tensor) and grad.grad_fn is not None:
                    grad.grad_fn.register_prehook(refuse_double_backward)
                    break
            return grads

        function._double_backward = staticmethod(named)
        function.backward = staticmethod(one_at_a_time(function.backward))
        return True
    return False


def one_at_a_time(backward: Callable) -> Callable:
    """The backward, which refuses a batch of gradients: a graph that writes into buffers of its own has room for one."""
    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        given = grads[0] if grads and isinstance(grads[0], list) else grads  # (torch 2.13 gives a list, to be emptied)
        if functorch_level() is not None or any(isinstance(each, Tensor) and is_batched_gradient(each) for each in given):
            raise UnsupportedGraph(
                "a captured block takes one gradient at a time, and a batch of them was given (is_grads_batched, vectorize=True, a "
                "torch.func transform); take one after the other, or all of the model without fxfuse (fxfuse.restore)"
            )
        return backward(ctx, *grads)

    return run


def refuse_double_backward(grads: Any) -> None:
    """The hook on the gradient of a gradient."""
    raise DoubleBackwardError(
        "a captured block gives first derivatives only, and a second one was asked for; take it of the model without "
        "fxfuse (fxfuse.restore), or of a function under fxfuse.fuse, which can be differentiated any number of times"
    )


def _unhooked() -> saved_tensors_hooks:
    """What is tried out while a graph is compiled saves nothing under the hooks of the call that compiles it: a checkpoint
    counts what its forward saved, and its recomputation compiles nothing.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def foreign_input(gm: fx.GraphModule) -> str:
    """Why a graph over these inputs is left alone, or nothing."""
    for node in gm.graph.nodes:
        tensor = tensor_of(node) if node.op == "placeholder" else None
        if tensor is not None and not is_plain(tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            return (f"a graph with the {type(tensor).__name__} input {node.name} runs as it was: such tensors have "
                    "operations of their own; apply fxfuse before tensors are wrapped")
    return ""


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, to be changed while the original stays."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    graph.output(output)
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    graph.set_codegen(gm.graph._codegen)  # how inputs and outputs are packed (torch.export)
    copy = make_graph_module(gm, graph)  # (under Dynamo its code is written when somebody wants it)
    copy.meta = dict(gm.meta)
    for name, child in list(copy.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, copy_of(child))
    return copy


def declined(site: Site, reason: str) -> Site:
    """The site, not fused after all."""
    if site.status == "fused":
        site.status, site.reason = "declined", reason
    return site
