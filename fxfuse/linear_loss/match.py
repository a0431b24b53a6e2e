"""Finding linears whose output only feeds a loss.

In a canonical graph with its regions: a linear whose output flows, through views of its rows alone, into one region that ends in
numbers per row. Views of the rows commute with the linear (they are taken of the hidden states instead). What else reads the logits
must end in outputs of the graph that could be computed on demand (lazy_output.py); anything else keeps the logits, and the sentence
says what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ..canonical.facts import known_shape, module_path, same_size, static_size, tensor_of, value_of
from ..canonical.vocabulary import CAST, POINTWISE, VIEWS, aten
from ..fused_op import differentiable_arguments
from ..memory.restriction import restricted
from ..program import Program
from ..regions import Region
from ..regions.fusible import epochs_of
from ..regions.region import ArgumentView, OutputView
from .again import why_not_again
from .between import between
from .join import join_over
from .products import LINEARS, left_name, right_name
from .terms import Logits, Term, read_logits

_ROW_VIEWS = frozenset([aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim])
_COPIES = (aten.clone.default,)
_LAZY = POINTWISE | VIEWS | {CAST, *_COPIES}
# A lazy output is computed again from the graph's inputs. Of a head that is its linear; of a whole model it would be the model.
_LAZY_LINEARS, _LAZY_NODES = 3, 64


@dataclass
class LinearLoss:
    """A linear and the region over its logits.

    hidden, weight, bias: the linear's operands        views: of the rows, from the linear's output to the logits, in order
    terms:   products that are added to the linear's        between: the nodes that add them
    region:  its program has outputs without columns only, the differentiable ones first
    logits:  the name of the program's argument that the linear's output is
    lazy:    (position, node) of the graph outputs that the logits are needed for, and nothing else
    sizes:   sizes of their rows that are read off what is computed from the logits
    """

    linear: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    views: list[fx.Node]
    region: Region
    logits: str
    lazy: list[tuple[int, fx.Node]] = field(default_factory=list)
    sizes: list[fx.Node] = field(default_factory=list)
    terms: tuple[Term, ...] = ()
    between: tuple[fx.Node, ...] = ()

    @property
    def program(self) -> Program:
        return self.region.program

    @property
    def view(self) -> ArgumentView:
        """How the region looks at the logits."""
        return next(v for v, a in zip(self.region.arguments, self.program.arguments, strict=True) if a.name == self.logits)

    @property
    def operands(self) -> dict[str, fx.Node]:
        named = {"hidden": self.hidden, "weight": self.weight}
        if self.bias is not None:
            named["bias"] = self.bias
        for k, term in enumerate(self.terms):
            named |= {left_name(k): term.left, right_name(k): term.right}
        return named

    @property
    def members(self) -> list[fx.Node]:
        """What the op takes the place of, but for what comes after the rows."""
        return [self.linear, *self.between, *self.views, *self.region.nodes]

    @property
    def module(self) -> str:
        return module_path(self.between[0] if self.between else self.linear)

    def losses(self) -> list[str]:
        """The outputs that depend on the logits in a way that can be differentiated."""
        return losses_of(self.program, self.logits)


@dataclass(frozen=True)
class NotFused:
    """A linear that ends in a loss, and why its logits are kept."""

    module: str
    reason: str
    program: str = ""


def find_linear_losses(gm: fx.GraphModule, regions: Sequence[Region], differentiable: Collection[fx.Node],
                       lazy_outputs: bool) -> Iterator[LinearLoss | NotFused]:
    """Every linear that ends in a loss, or why it must stay apart from it."""
    epochs = epochs_of(gm.graph)
    for logits in {view.node: None for region in regions for view in region.arguments if _source(view.node)[0] is not None}:
        regions = join_over(regions, logits)
    for region in regions:
        yield from _not_a_linears(region, differentiable)
        for view, argument in zip(region.arguments, region.program.arguments, strict=True):
            source, views = _source(view.node)
            if source is None or argument.kind != "real" or argument.columns is None:
                continue
            if not losses_of(region.program, argument.name):
                continue
            _ask_the_input_for_sizes(source.linear)
            if len(region.arguments) > 1 and view.node not in differentiable and _others_differentiable(region, view, differentiable):
                continue  # the logits of a teacher: an operand like any other
            found = LinearLoss(source.linear, *_operands(source.linear), views, region, argument.name, terms=source.terms,
                               between=source.between)
            reason = _obstacle(gm, found, regions, differentiable, epochs, lazy_outputs)
            yield NotFused(found.module, reason, str(region.program)) if reason else _without_wide_outputs(found)
            break


def _ask_the_input_for_sizes(linear: fx.Node) -> None:
    """The logits have as many rows as the linear's input: who only asks how many does not read them."""
    hidden, logits = _operands(linear)[0], tensor_of(linear)
    if logits is None:
        return
    for user in list(linear.users):
        if user.target is aten.sym_size.int and user.args[1] % logits.dim() != logits.dim() - 1:
            user.args = (hidden, user.args[1] % logits.dim())


def _not_a_linears(region: Region, differentiable: Collection[fx.Node]) -> Iterator[NotFused]:
    """A loss over something that a linear and more went into."""
    if any(_source(view.node)[0] is not None for view in region.arguments):
        return
    for view, argument in zip(region.arguments, region.program.arguments, strict=True):
        if argument.columns is not None and argument.kind == "real" and losses_of(region.program, argument.name):
            if all(o.columns is None for o in region.program.outputs):
                linear, reason = between(view.node, differentiable)
                if linear is not None:
                    yield NotFused(module_path(linear), reason, str(region.program))


def losses_of(program: Program, logits: str) -> list[str]:
    """The outputs of one number a row that the logits can get a gradient from, if the program is one of losses: something in it is
    looked up by a label, or normalised by a sum of exponentials."""
    if not any(node.op in ("check_index", "exp", "logsumexp") for node in program.nodes):
        return []
    return [o.name for o in program.outputs if o.columns is None and logits in differentiable_arguments(program, (o.name,))]


def _source(node: fx.Node) -> tuple[Logits | None, list[fx.Node]]:
    """The linear (with what is added to it) that a node is a view of the rows of, and the views from there."""
    views: list[fx.Node] = []
    while _is_row_view(node):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return read_logits(node), views[::-1]


def _is_row_view(node: fx.Node) -> bool:
    """Does a node only look at its first operand's rows in another way (or copy them)."""
    if node.op != "call_function" or tensor_of(node) is None or node.target not in (*_ROW_VIEWS, *_COPIES):
        return False
    if node.target in _COPIES:
        return True
    if node.target is aten.reshape.default:
        before, after = known_shape(node.args[0]), known_shape(node)
        return len(before) > 0 and len(after) > 0 and same_size(before[-1], after[-1])
    return isinstance(node.args[1], int) and node.args[1] < -1


def _operands(linear: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    named = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | linear.kwargs
    return named["input"], named["weight"], named.get("bias")  # type: ignore[return-value]


def _others_differentiable(region: Region, view: ArgumentView, differentiable: Collection[fx.Node]) -> bool:
    return any(other.node in differentiable for other in region.arguments if other is not view)


def _obstacle(gm: fx.GraphModule, found: LinearLoss, regions: Sequence[Region], differentiable: Collection[fx.Node],
              epochs: dict[fx.Node, int], lazy_outputs: bool) -> str:
    """Why the logits are kept, or nothing."""
    program, view = found.program, found.view
    if tensor_of(found.weight) is None or tensor_of(found.weight).dim() != 2:  # type: ignore[union-attr]
        return "the linear's weight is not a matrix"
    if view.layout.dims != tuple(range(view.rank)) or not view.layout.column:
        return "the loss looks at the logits with their dimensions in another order"
    if len({epochs[node] for node in found.members}) > 1:
        return "something with an effect stands between the linear and the loss"
    if len(program.axes) != 1 or program.argument(found.logits).columns != program.axes[0][0]:
        return "the loss takes the logits apart"
    classes, columns = static_size(known_shape(found.linear)[-1]), static_size(known_shape(found.hidden)[-1])
    if classes is None:
        return "the number of classes is only known at run time"
    if columns is not None and classes < columns:
        return "the logits are smaller than the hidden states, so nothing is gained by not keeping them"
    for argument, other in zip(program.arguments, found.region.arguments, strict=True):
        if other is not view and other.node in differentiable and argument.kind == "real":
            if set(found.losses()) & {o.name for o in program.outputs if argument.name in differentiable_arguments(program, (o.name,))}:
                several = _source(other.node)[0] is not None
                return "the logits are a sum of several linears (an adapter on the output projection)" if several else \
                    f"the loss has a gradient for {other.node.name} too, not only for the logits"
    return _other_uses(gm, found, lazy_outputs)


def _other_uses(gm: fx.GraphModule, found: LinearLoss, lazy_outputs: bool) -> str:
    """Why what else reads the logits needs them in memory, or nothing; outputs that can wait go to ``found.lazy``."""
    results = _results(gm.graph)
    narrow = {view.node for view in found.region.outputs if not _is_wide(found.program, view)}
    inside = set(found.members)
    reached = _reached(found.linear, narrow)
    found.sizes = [user for node in reached for user in node.users if _is_size(user)]
    for node in reached:
        if node.op != "output" and node not in inside and node.target not in _LAZY:
            return f"the logits are read by {node.name} too, not only by the loss"
    for size in found.sizes:
        if place_of_size(found, size) is None:
            return f"the size {size.name} is read off the logits, and nothing else has it"
    lazy = [(index, node) for index, node in enumerate(results) if isinstance(node, fx.Node) and node in reached]
    if lazy and not lazy_outputs:
        return "the logits are an output of the graph, and outputs are real here"
    for _, node in lazy:
        if reason := _not_lazy(node, found):
            return reason
    found.lazy = lazy
    return ""


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def place_of_size(found: LinearLoss, size: fx.Node) -> int | None:
    """The dimension of the rows of the logits that has a size which was read off something computed from them."""
    sizes = known_shape(found.view.node)[:-1]
    return next((dim for dim, other in enumerate(sizes) if same_size(value_of(size), other)), None)


def _is_wide(program: Program, view: OutputView) -> bool:
    return any(o.columns is not None for o in program.outputs if o.name in view.names)


def _results(graph: fx.Graph) -> list[object]:
    """The graph's outputs, in order."""
    returned = graph.output_node().args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def _reached(start: fx.Node, ends: Collection[fx.Node]) -> dict[fx.Node, None]:
    """What depends on the elements of a node, without looking behind ``ends``."""
    found: dict[fx.Node, None] = {}
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in found and node not in ends and not _is_size(node):
            found[node] = None
            pending += node.users
    return found


def _not_lazy(node: fx.Node, found: LinearLoss) -> str:
    """Why an output is not worth computing on demand, or cannot be, or nothing."""
    shape = known_shape(node)
    if len(shape) < 2 or not same_size(shape[-1], known_shape(found.linear)[-1]):
        return f"{node.name}, an output of the graph, is computed from the logits, and is not the logits"
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending += current.all_input_nodes
    linears = sum(other.target in LINEARS for other in seen)
    computing = [other for other in seen if other.op in ("call_function", "call_method", "call_module")]
    if linears > _LAZY_LINEARS or len(computing) > _LAZY_NODES:
        return "the logits are an output of the graph, and could be had on demand only by running all of it again"
    return why_not_again(node, seen)


def _without_wide_outputs(found: LinearLoss) -> LinearLoss:
    """The region without the outputs that are lazy now; those that can be differentiated first."""
    program, losses = found.program, found.losses()
    kept = [view for view in found.region.outputs if not _is_wide(program, view)]
    kept.sort(key=lambda view: not set(view.names) & set(losses))
    names = tuple(name for view in kept for name in view.names)
    part = restricted(program, names)
    by_name = {o.name: o for o in part.outputs}
    part = replace(part, outputs=tuple(by_name[name] for name in sorted(names, key=lambda name: name not in losses)))
    views = {a.name: view for a, view in zip(program.arguments, found.region.arguments, strict=True)}
    arguments = [views[a.name] for a in part.arguments]
    found.region = replace(found.region, program=part, arguments=arguments, outputs=kept)
    return found
