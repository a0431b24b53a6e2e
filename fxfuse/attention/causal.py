"""Library attention with a mask that is plain causal: the mask is dropped for ``is_causal``, and repeated heads for ``enable_gqa``.

Traced as a whole, a model builds its causal mask out of ``arange`` and repeats keys and values for every head; with either, the
library leaves its fastest kernel. The proof: nothing but sizes enters the mask; it is made of comparisons between positions, and of
what neighbours' differences and sums over positions give; so it is evaluated, for sizes known now at these, for sizes known at run
time at several and beyond every constant in it, and has to be the lower triangle each time. Anything else keeps its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..canonical.facts import known_dtype, known_shape, known_tensor, module_path, same_size, value_of
from ..canonical.vocabulary import aten
from ..reporting.records import Site
from ..surgery import erase_dead, erase_unused
from ..trial import Compared
from ..validation import Verdict, judged
from .match import before_repetition

RULE = "attention"
SDPA = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
# What a mask may be made of.
_POSITIONS = frozenset(
    "arange ones zeros full new_ones new_zeros new_full ones_like zeros_like full_like tril triu unsqueeze squeeze expand slice "
    "reshape view permute transpose select getitem le lt ge gt eq ne logical_and logical_or logical_not bitwise_and bitwise_or "
    "bitwise_not "
    "and_ or_ add sub neg diff cumsum to where __and__ __or__ clone contiguous".split()
)
# Run-time sizes at which a mask is evaluated, beside those beyond its constants; masks longer than this are not.
SIZES, LONGEST = (1, 2, 3, 7, 16, 33), 8192


def use_causal_kernels(gm: fx.GraphModule, why_not: Callable[[str], str], validate: str) -> list[Site]:
    """Rewrite what can be proven, in place; a site for each call that had a mask."""
    sites = []
    proven: dict[fx.Node, bool] = {}  # layers share masks
    for node in [n for n in gm.graph.nodes if n.op == "call_function" and n.target in SDPA]:
        mask = _argument(node, 3, "attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        site = Site(RULE, module_path(node), "declined", why_not(RULE) or _obstacle(node, mask, proven))
        if not site.reason:
            verdict = check(node, validate)
            site.reason, site.error_ratio = verdict.reason, verdict.error_ratio
        if not site.reason:
            node.replace_all_uses_with(_rewritten(gm.graph, node))
            erase_unused([node])
            site.status, site.implementation = "served", "library attention, causal"
        sites.append(site)
    if any(site.status == "served" for site in sites):
        erase_dead(gm.graph)
    return sites


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _obstacle(node: fx.Node, mask: fx.Node, proven: dict[fx.Node, bool]) -> str:
    """Why the mask stays, or nothing."""
    if _argument(node, 5, "is_causal", False):
        return "it has a mask and is causal besides"
    if known_dtype(mask) != torch.bool:
        return "its mask holds numbers, which may be more than hidden or not"
    query, key = known_shape(node.args[0]), known_shape(node.args[1])
    if not same_size(query[-2], key[-2]):
        return "it has other keys than queries"
    if mask not in proven:
        proven[mask] = is_causal(mask)
    return "" if proven[mask] else "its mask is not proven to be plain causal"


def is_causal(mask: fx.Node) -> bool:
    """Is the mask the lower triangle whatever run-time sizes are."""
    members = _made_of_positions(mask)
    if members is None:
        return False
    shape = known_shape(mask)
    if len(shape) < 2 or not same_size(shape[-1], shape[-2]):
        return False
    symbols = {s for leaf in members[1] for s in _expression(value_of(leaf)).free_symbols} | \
              {s for size in shape for s in _expression(size).free_symbols}  # fmt: skip
    length = _expression(shape[-1])
    lengths = (*SIZES, _beyond_constants(members[0])) if length.free_symbols else (int(length),)
    if max(lengths) > LONGEST or (length.free_symbols and not length.is_Symbol):
        return False
    for size in lengths:
        sizes = {symbol: size if symbol == length else 2 for symbol in symbols}
        try:
            found = _evaluated(mask, members, sizes)
        except (RuntimeError, IndexError):  # a size that is no size of this mask
            return False
        lower = torch.ones(size, size, dtype=torch.bool).tril()
        if found.shape[-2:] != lower.shape or not bool((found == lower).all()):
            return False
    return True


def _made_of_positions(mask: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The nodes that the mask is computed by, in order, and the sizes that enter; None where anything else does."""
    found: dict[fx.Node, None] = {}
    sizes: dict[fx.Node, None] = {}
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in found or node in sizes:
            continue
        if isinstance(value_of(node), int | torch.SymInt):
            sizes[node] = None
            continue
        if node.op not in ("call_function", "call_method") or _name(node) not in _POSITIONS:
            return None
        found[node] = None
        pending += node.all_input_nodes
    order = {node: i for i, node in enumerate(mask.graph.nodes)}
    return sorted(found, key=order.__getitem__), list(sizes)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _beyond_constants(nodes: list[fx.Node]) -> int:
    """A length at which every comparison with a constant has both outcomes."""
    numbers: list[Any] = []
    for node in nodes:
        numbers += [a for a in torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(a, int | float)]
    return 3 + int(max((abs(n) for n in numbers if abs(n) < 2**31), default=0))


def _evaluated(mask: fx.Node, members: tuple[list[fx.Node], list[fx.Node]], sizes: dict[sympy.Symbol, int]) -> Tensor:
    """The mask for some sizes, on the CPU."""
    known: dict[fx.Node, Any] = {leaf: int(_expression(value_of(leaf)).subs(sizes)) for leaf in members[1]}
    with torch.device("cpu"), torch.no_grad():
        for node in members[0]:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
            kwargs = {name: torch.device("cpu") if isinstance(value, torch.device) else value for name, value in kwargs.items()}
            run = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            known[node] = run(*args, **kwargs)  # type: ignore[operator]
    return known[mask]


def _rewritten(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The call without its mask, on the keys and values before their repetition."""
    query, key, value = node.args[:3]
    once = tuple(before_repetition(n) for n in (key, value))  # type: ignore[arg-type]
    grouped = all(a is not b for a, b in zip(once, (key, value), strict=True)) and \
        same_size(known_shape(once[0])[1], known_shape(once[1])[1])  # fmt: skip
    kwargs: dict[str, Any] = {"is_causal": True, "dropout_p": _argument(node, 4, "dropout_p", 0.0)}
    if node.kwargs.get("scale") is not None:
        kwargs["scale"] = node.kwargs["scale"]
    if grouped or node.kwargs.get("enable_gqa"):
        kwargs["enable_gqa"] = True
    with graph.inserting_before(node):
        result = graph.call_function(F.scaled_dot_product_attention, (query, *(once if grouped else (key, value))), kwargs)
    result.meta = dict(node.meta)
    return result


def _heads(node: fx.Node) -> tuple[int, int]:
    """Heads of the queries, and of the keys before repetition; 1 and 1 where they are not numbers."""
    key = before_repetition(node.args[1])  # type: ignore[arg-type]
    heads = tuple(known_shape(n)[1] if len(known_shape(n)) == 4 else 1 for n in (node.args[0], key))
    return heads if all(isinstance(h, int) for h in heads) else (1, 1)  # type: ignore[return-value]


def check(node: fx.Node, mode: str) -> Verdict:
    """The verdict on the causal form, found once for equal heads and dtypes."""
    if mode == "off":
        return Verdict()
    query = known_tensor(node.args[0])
    width = query.shape[-1] if isinstance(query.shape[-1], int) else 64
    trial = CausalTrial(query.dtype, *_heads(node), width, query.device)
    return judged(("causal", trial), lambda: iter([trial]), query.device, mode)


@dataclass(frozen=True)
class CausalTrial:
    """The same random operands through the call with a mask in float64, in the model's dtype, and through the causal call."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    device: torch.device

    def run(self, scale: float, rows: int) -> Iterator[Compared]:
        generator = torch.Generator().manual_seed(7)
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        drawn = [torch.randn(2, h, 40, self.width, generator=generator) for h in heads]
        drawn[0] *= scale
        typed = [t.to(self.device, self.dtype) for t in drawn]
        mask = torch.ones(40, 40, dtype=torch.bool, device=self.device).tril()
        truth = self._results([t.double() for t in typed], attn_mask=mask)
        eager = self._results(typed, attn_mask=mask)
        ours = self._results(typed, is_causal=True, enable_gqa=self.heads != self.key_heads)
        for name, a, b, t in zip(("the result", "d query", "d key", "d value"), ours, eager, truth, strict=True):
            yield Compared(name, a.cpu(), b.cpu(), t.cpu())

    def _results(self, tensors: Sequence[Tensor], **how: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
        q, k, v = leaves
        groups = self.heads // self.key_heads
        k, v = (k, v) if "is_causal" in how else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        out = F.scaled_dot_product_attention(q, k, v, **how)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
