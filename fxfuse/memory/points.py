"""The points of a kind of block: from everything saved to next to nothing, each the cheapest way to save that little.

Starting from what is saved without a plan, the tensor is given up whose bytes cost the least time to have again, then the next;
what a step costs is told by what would have to run again in all, not by the tensor alone. Each point has a sibling that keeps its
tensors on the host. Points that are beaten in bytes and in time by another are left out, and so are those that differ little.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import fx

from ..quantized_op import is_dequantization
from .costs import Rates, milliseconds, scratch_bytes
from .halves import halves
from .keeping import keep_outputs, spared_ms, worth_keeping
from .live_bytes import STILL, Accounts, Moving, Timeline
from .plan import FEW_TILES, Choice, Kept, Point
from .sizes import Sizes, compiled_for
from .splits import Joint, Split, apply_choice, runs_once
from .tiles import Memory, peak_in

# Tensors this much smaller than the largest that is saved are not worth a choice of their own.
_SMALL = 64
MOST_POINTS = 7
# Into how many tiles the wide part of a block is cut, where it is cut; and at the point that saves least.
TILES, MANY_TILES = FEW_TILES, 16
# What twice as many tiles cost, as a part of the block's time; operations of a tile that the device waits for.
_TILE_COST, _LAUNCHES_IN_A_TILE = 0.003, 6
# What a copy beside a step's other work has of the rate of one alone; times of blocks are estimates.
LINK = 0.9
# What a copy that hides costs all the same, as a part of its time: it takes bandwidth of the device's memory. (0 to 4% in the plans of
# W1 to W3 in benchmarks/results/frontier.jsonl, once what they compute again is taken off.)
_COPIES_SLOW = 0.03
# What one more tensor costs to be recomputed beyond its time: launches, and reads that other kernels wait for.
_OVERHEAD_MS = 0.002


@dataclass
class Block:
    """A kind of block at given sizes: its points, and what its fastest run takes."""

    points: list[Point]
    forward_ms: float
    backward_ms: float
    weights_gradient_bytes: int
    dequantized_bytes: int = 0  # of weights, all together
    dequantization_ms: float = 0.0  # of these, in forward and backward
    compiled: frozenset[str] = frozenset()  # plans under which a graph of this kind was compiled
    roomier: Callable[[], list[Point]] = list  # finds points that save more than the fastest of ``points``, and spare time


class Peaks(NamedTuple):
    """The most that lives in a block's forward and backward, in bytes; and while tensors as large of the block before go or come."""

    forward: int
    backward: int
    going: int
    coming: int


class Half:
    """The forward or the backward of a block under a choice, and what of its values is counted."""

    def __init__(self, graph: fx.Graph, accounts: Accounts) -> None:
        self.graph, self.accounts, self.timeline = graph, accounts, Timeline(graph, accounts)


class Survey:
    """What is known of a compiled graph's memory: its joint graph, and the choices that make sense for it."""

    def __init__(self, joint: fx.Graph, num_fwd_outputs: int, rates: Rates, *, choices: bool = True) -> None:
        """``joint`` is tagged as without a plan; it is copied. ``choices``: whether there is anything to choose (a block) or not."""
        self.joint = Joint(_copied(joint), num_fwd_outputs)
        self.compiled_for = compiled_for(self.joint.graph)
        self.rates = rates
        self.reference: Any = None  # the shape of the batch of that call, where somebody knows it
        self.compiled: set[str] = set()  # plans under which graphs of this kind were compiled
        self.signature = tuple(f"{node.name}:{node.target}" for node in joint.nodes)
        self._tiled: dict[tuple, Peaks] = {}
        self._memories: dict[tuple, tuple[Memory, Memory]] = {}
        self._cut: dict[tuple[str, ...], tuple[Half, Half]] = {}
        self._roomy: dict[tuple[str, ...], Survey] = {}
        self.chain = chain(self.joint, Sizes(self.compiled_for), rates) if choices else [()]

    def block(self, sizes: Sizes, *, offload: bool = True, tiles: bool = False, single: bool = False) -> Block:
        """The points at given sizes, the fastest first; with ``offload`` those that use the host, with ``tiles`` those that cut rows.

        Points in tiles take seconds to find: they are for budgets that do not do without them. ``single``: only one block has this
        graph (the first, whose input needs no gradient), and few points are enough.
        """
        choices = [Choice(recompute=names) for names in self.chain]
        if tiles and len(self.chain) > 1:
            few = dict.fromkeys(choices[-1:] if single else (choices[0], choices[len(choices) // 2], choices[-1]))
            choices += [replace(choice, tiles=TILES) for choice in few]
            choices += [] if single else [replace(choices[-1], tiles=MANY_TILES)]
        found = [self.point(choice, sizes) for choice in choices]
        if offload and len(self.chain) > 1:
            found += [self.point(away, sizes) for choice in choices for away in self.offloaded(choice, sizes)]
        forward = [node for node in self.joint.graph.nodes if node in self.joint.forward]
        backward = [node for node in self.joint.graph.nodes if node not in self.joint.forward]
        backward += self.joint.plain.always
        return Block(
            points=pareto(found),
            forward_ms=sum(milliseconds(node, sizes, self.rates) for node in forward),
            backward_ms=sum(milliseconds(node, sizes, self.rates) for node in backward),
            weights_gradient_bytes=sum(sizes.bytes(gradient.meta.get("val")) for gradient in self.weights_gradients()),
            dequantized_bytes=sum(sizes.bytes(node.meta["val"]) for node in forward if is_dequantization(node)),
            dequantization_ms=2 * sum(milliseconds(node, sizes, self.rates) for node in forward if is_dequantization(node)),
            compiled=frozenset(self.compiled),
            roomier=partial(self.roomier, sizes),
        )

    def roomier(self, sizes: Sizes) -> list[Point]:
        """Points that save everything, and cheap outputs too; each more than the one before."""
        return [self.point(Choice(keep=names), sizes) for names in worth_keeping(self.joint.graph, sizes)]

    def _keeping_more(self, choice: Choice, sizes: Sizes) -> Point:
        """A point of the graph whose backward reads some cheap outputs as the forward left them."""
        names = choice.keep
        if names not in self._roomy:
            graph = _copied(self.joint.graph)
            keep_outputs(graph, names)
            self._roomy[names] = Survey(graph, self.joint.num_fwd_outputs, self.rates, choices=False)
        point = self._roomy[names].point(replace(choice, keep=()), sizes)
        spared = spared_ms(self.joint.graph, names, sizes, self.rates)
        return replace(point, choice=choice, name=f"{point.name}, {len(names)} cheap", spared_ms=spared)

    def weights_gradients(self) -> list[fx.Node]:
        """The gradients of inputs that are weights."""
        return [gradient for placeholder, gradient in self.joint.gradients.items()
                if isinstance(gradient, fx.Node) and not self.joint.is_activation(placeholder)]

    def offloaded(self, choice: Choice, sizes: Sizes) -> list[Choice]:
        """Choices that keep on the host what is large of what ``choice`` saves: all first, as much as the block's work hides, the
        largest alone."""
        split = self.joint.split(choice.recompute)
        kept = [node for node in (*split.saved, *split.inputs) if node.op != "placeholder" or self.joint.is_own(node)]
        kept = [node for node in kept if node not in self.joint.returned]
        weighed = {node.name: sizes.bytes(node.meta["val"]) for node in kept}
        large = [name for name, count in weighed.items() if count * _SMALL > max(weighed.values())]
        room = self._hidden_bytes(split, sizes)
        chosen = large, _largest_within(room, weighed, large), [max(large, key=weighed.__getitem__, default="")]
        found = dict.fromkeys(tuple(name for name in large if name in names) for names in chosen)
        return [replace(choice, offload=names) for names in found if names]

    def leaving_least(self) -> Choice:
        """The choice that leaves least on the device at the sizes of the graph; it names what goes to the host, where there is one."""
        least = Choice(recompute=self.chain[-1])
        on_host = self.offloaded(least, Sizes(self.compiled_for)) if len(self.chain) > 1 else []
        return on_host[0] if on_host else least

    def _copying(self, offloaded: int) -> float:
        """What copies cost the work that hides them; what does not hide them is the plan's to know."""
        return _COPIES_SLOW * (offloaded / self.rates.to_host + offloaded / self.rates.from_host) * 1e3

    def _hidden_bytes(self, split: Split, sizes: Sizes) -> int:
        """How much can go to the host and come back while one block like this one runs."""
        forward = sum(milliseconds(node, sizes, self.rates) for node in self.joint.forward)
        nodes = [node for node in self.joint.graph.nodes if node not in self.joint.forward]
        backward = sum(milliseconds(node, sizes, self.rates) for node in (*nodes, *split.again))
        return int(LINK * min(forward * self.rates.to_host, backward * self.rates.from_host) / 1e3)

    def point(self, choice: Choice, sizes: Sizes) -> Point:
        """What a choice costs at given sizes."""
        if choice.keep:
            return self._keeping_more(choice, sizes)
        joint, rates = self.joint, self.rates
        split = joint.split(choice.recompute)
        own = [node for node in split.inputs if joint.is_own(node)]
        away = [node for node in (*split.saved, *own) if node.name in choice.offload]
        offloaded = sum(sizes.bytes(node.meta["val"]) for node in away)
        saved = joint.saved_bytes(split, sizes) - offloaded
        peaks = self._tiled_peaks(choice, sizes) if choice.tiles > 1 else self._peaks(choice, sizes)
        backward = max(peaks.backward - saved, 0) + offloaded  # what the block before will need is on its way back meanwhile
        recompute_ms = joint.milliseconds(split, sizes, rates)
        recompute_ms += _OVERHEAD_MS * len(split.again)
        return Point(
            choice=choice,
            name=_name(joint, choice),
            saved_bytes=saved,
            offloaded_bytes=offloaded,
            recompute_ms=max(recompute_ms, 0.0),
            copy_ms=self._copying(offloaded) + 2 * rates.launch_ms * len(away),
            tiles_ms=self._tiling(choice.tiles, sizes),
            forward_transient_bytes=peaks.forward,
            backward_transient_bytes=backward,
            forward_spared_bytes=max(peaks.forward + offloaded - peaks.going, 0),
            backward_spared_bytes=max(backward - max(peaks.coming - saved, 0), 0),
            away_input_bytes=sum(sizes.bytes(node.meta["val"]) for node in away if node in own),
            tiles=choice.tiles,
            saved=tuple(self._kept(node, sizes) for node in (*split.saved, *own) if node.name not in choice.offload),
            recomputed=tuple(self._kept(node, sizes) for node in joint.plain.saved if node.name in choice.recompute),
            offloaded=tuple(self._kept(node, sizes) for node in away),
        )

    def _peaks(self, choice: Choice, sizes: Sizes) -> Peaks:
        """The most that lives in forward and backward."""
        first, second = self._halves(choice.recompute)

        def most(half: Half, moving: Moving = STILL) -> int:
            return half.timeline.run(sizes, lambda node: scratch_bytes(node, sizes), moving).peak

        going, coming = _going(first.graph, choice.offload, sizes), _coming(second.graph, choice.offload, sizes)
        return Peaks(most(first), most(second), most(first, going), most(second, coming))

    def _tiled_peaks(self, choice: Choice, sizes: Sizes) -> Peaks:
        """The same in tiles."""
        cut = choice.recompute, tuple(sizes.values.values())
        key = *cut, choice.tiles, choice.offload
        if key not in self._tiled:
            first, second = self._halves(choice.recompute)
            if cut not in self._memories:
                self._memories[cut] = Memory(first.graph, sizes), Memory(second.graph, sizes)

            def most(memory: Memory, half: Half, moving: Moving = STILL) -> int:
                return peak_in(memory, choice.tiles, half.accounts, moving).bytes

            forward, backward = self._memories[cut]
            going, coming = _going(first.graph, choice.offload, sizes), _coming(second.graph, choice.offload, sizes)
            self._tiled[key] = Peaks(most(forward, first), most(backward, second), most(forward, first, going),
                                     most(backward, second, coming))
        return self._tiled[key]

    def _halves(self, recompute: tuple[str, ...]) -> tuple[Half, Half]:
        if recompute not in self._cut:
            graph = _copied(self.joint.graph)
            apply_choice(graph, self.joint.num_fwd_outputs, recompute)
            first, second = halves(Joint(graph, self.joint.num_fwd_outputs))
            foreign = {node.name for node in self.joint.placeholders if not self.joint.is_own(node)}
            inputs = {node.name for node in self.joint.placeholders}
            arriving = {node.name for node in self.joint.tangents}
            gradients = {node.name for node in self.weights_gradients()}
            self._cut[recompute] = (
                Half(first, Accounts(foreign=_named(first, foreign), held=_named(first, inputs))),
                Half(second, Accounts(_named(second, foreign), _named(second, arriving), _named(second, gradients))))
        return self._cut[recompute]

    def _tiling(self, tiles: int, sizes: Sizes) -> float:
        """What smaller matmuls and more launches cost."""
        if tiles == 1:
            return 0.0
        nodes = [node for node in self.joint.graph.nodes if node.op == "call_function"]
        whole = sum(milliseconds(node, sizes, self.rates) for node in nodes)
        return _TILE_COST * math.log2(tiles) * whole + tiles * _LAUNCHES_IN_A_TILE * self.rates.launch_ms

    def _kept(self, node: fx.Node, sizes: Sizes) -> Kept:
        return Kept(node.name, label(node, sizes), sizes.bytes(node.meta["val"]), milliseconds(node, sizes, self.rates))


def _largest_within(room: int, weighed: Mapping[str, int], names: Sequence[str]) -> list[str]:
    """Of these tensors as many as there is room for, by their bytes; larger ones first."""
    found = []
    for name in sorted(names, key=lambda name: -weighed[name]):
        if weighed[name] <= room:
            found.append(name)
            room -= weighed[name]
    return found


def chain(joint: Joint, sizes: Sizes, rates: Rates) -> list[tuple[str, ...]]:
    """What is given up, in the order of time per byte: () first, each longer by a tensor or more than the one before."""
    plain = joint.plain
    weighed = {node: sizes.bytes(node.meta["val"]) for node in plain.saved if not runs_once(node) and node not in joint.returned}
    smallest = max(weighed.values(), default=0) / _SMALL
    candidates = [node for node, count in weighed.items() if count > smallest]
    dropped: tuple[str, ...] = ()
    bytes_now, ms_now = joint.saved_bytes(plain, sizes), 0.0
    found = [(dropped, bytes_now, ms_now)]
    while candidates:
        best = None
        for node in candidates:
            names = (*dropped, node.name)
            split = joint.split(names)
            less, ms = bytes_now - joint.saved_bytes(split, sizes), joint.milliseconds(split, sizes, rates)
            if less > 0:
                price = (ms - ms_now + _OVERHEAD_MS) / less
                if best is None or price < best[0]:
                    best = price, node, names, less, ms
        if best is None:
            break
        _, node, dropped, less, ms_now = best
        candidates.remove(node)
        bytes_now -= less
        found.append((dropped, bytes_now, ms_now))
    return [names for names, _, _ in _spread(found)]


def _spread(found: list[tuple[tuple[str, ...], int, float]]) -> list[tuple[tuple[str, ...], int, float]]:
    """At most ``MOST_POINTS`` of a chain, the first and the last always: of more, the one goes that leaves the smallest gap."""
    while len(found) > MOST_POINTS:
        whole_bytes, whole_ms = max(found[0][1] - found[-1][1], 1), max(found[-1][2] - found[0][2], 1e-9)
        gaps = [(found[i - 1][1] - found[i + 1][1]) / whole_bytes * ((found[i + 1][2] - found[i - 1][2]) / whole_ms + 1e-3)
                for i in range(1, len(found) - 1)]
        del found[1 + gaps.index(min(gaps))]
    return found


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in time, in what is saved here and there, and in transients at once; the fastest first."""
    ordered = sorted(points, key=lambda p: (p.ms, p.saved_bytes, p.backward_transient_bytes))
    kept: list[Point] = []
    for point in ordered:
        if not any(other.saved_bytes <= point.saved_bytes and other.offloaded_bytes <= point.offloaded_bytes
                   and _needs(other) <= _needs(point) for other in kept):
            kept.append(point)
    return kept


def _needs(point: Point) -> int:
    return point.saved_bytes + max(point.backward_transient_bytes, point.forward_transient_bytes - point.saved_bytes)


def label(node: fx.Node, sizes: Sizes) -> str:
    """What a tensor is, for people: the module that made it, or the operation; and its shape."""
    source, value = node.args[0] if node.target is operator.getitem else node, node.meta["val"]
    shape = "x".join(map(str, sizes.shape(value)))
    if node.op == "placeholder":
        return f"block input {shape}"
    assert isinstance(source, fx.Node)
    stack = source.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    module = path.replace("L['self']", "").strip(".")
    if "attention" in str(getattr(source, "target", "")):
        return f"attention {shape}"
    return f"{module or node.name} {shape}"


def _name(joint: Joint, choice: Choice) -> str:
    whole = len([node for node in joint.plain.saved if not runs_once(node)])
    parts = [f"recompute {len(choice.recompute)} of {whole}"] if choice.recompute else ["keep all"]
    parts += [f"{len(choice.offload)} on the host"] * bool(choice.offload)
    parts += [f"{choice.tiles} tiles"] * (choice.tiles > 1)
    return ", ".join(parts)


def _going(forward: fx.Graph, offload: Sequence[str], sizes: Sizes) -> Moving:
    """With as much of the block before on its way to the host: as each tensor is sent, one as large has left (offload_runtime.py)."""
    found = {node: sizes.bytes(node.meta["val"]) for node in forward.nodes if node.name in offload}
    made = {node: count for node, count in found.items() if node.op != "placeholder"}  # inputs are sent before anything runs
    return Moving(start=sum(made.values()), fewer=made)


def _coming(backward: fx.Graph, offload: Sequence[str], sizes: Sizes) -> Moving:
    """With as much of the block before on its way back: as each tensor is taken, before its first use, one as large is sent for."""
    order = {node: i for i, node in enumerate(backward.nodes)}
    found: dict[fx.Node, int] = {}
    for node in backward.find_nodes(op="placeholder"):
        if node.name in offload and node.users:
            first = min(node.users, key=order.__getitem__)
            found[first] = found.get(first, 0) + sizes.bytes(node.meta["val"])
    return Moving(more=found)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, copies)
    copy.output(output)
    for old, new in copies.items():
        new.name = old.name
    return copy


def _named(graph: fx.Graph, names: set[str]) -> tuple[fx.Node, ...]:
    return tuple(node for node in graph.nodes if node.name in names)
