"""What torch finds out of stand-ins while a graph is compiled, found out in fewer steps: the same facts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo import guards as dynamo_guards
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as trees

from fxfuse.capture import fact_keys, kept_facts, plain_trees, plain_views, sizes_once, unread_logs
from tests.swapped_settings import settings


def imagined(tensor: Tensor, symbols: Sequence[int]) -> Tensor:
    """A stand-in, some of whose sizes are symbols."""
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC if dim in symbols else DimDynamic.STATIC for dim in range(tensor.dim())])
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(tensor, symbolic_context=context)


def told(tensor: Tensor) -> tuple:
    return ([str(s) for s in tensor.shape], [str(s) for s in tensor.stride()], str(tensor.storage_offset()), tensor.is_contiguous(),
            tensor._is_view())


VIEWS = {
    "rows": lambda x: x.view(x.shape[0] * x.shape[1], 24),
    "rows and back": lambda x: x.view(-1, 24).view(x.shape[0], x.shape[1], 24),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 4, 6),
    "heads, the number left open": lambda x: x.view(x.shape[0], x.shape[1], -1, 6),
    "folded heads": lambda x: x.view(x.shape[0], x.shape[1], 4, 6).transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * 6),
    "as it is": lambda x: x.view(x.shape),
    "one more": lambda x: x.view(x.shape[0], 1, x.shape[1], 24, 1),
    "one less": lambda x: x[:, None].contiguous().view(x.shape[0], x.shape[1], 24),
    "flat": lambda x: x.view(-1),
    "flat and back": lambda x: x.view(-1).view(x.shape[0], -1),
    "a part of the columns": lambda x: x[..., :12].view(x.shape[0], x.shape[1], 3, 4),
    "later rows": lambda x: x[1:].view(-1, 24),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("symbols", [(0, 1), (1,), (0,)], ids=str)
def test_views_are_torchs(name: str, symbols: tuple[int, ...]) -> None:
    x = torch.randn(3, 10, 24)
    wanted = told(VIEWS[name](imagined(x, symbols)))
    with settings(*plain_views.SETTINGS):
        found = VIEWS[name](imagined(x, symbols))
    assert told(found) == wanted


def test_a_view_of_too_much_is_torchs_error() -> None:
    x = imagined(torch.randn(3, 10, 24), (0, 1))
    with settings(*plain_views.SETTINGS), pytest.raises((RuntimeError, ValueError)):
        x.view(x.shape[0], x.shape[1], 25)
    with settings(*plain_views.SETTINGS), pytest.raises((RuntimeError, ValueError)):
        x.transpose(0, 1).view(-1)


def some_operations(x: Tensor, w: Tensor) -> Tensor:
    h = torch.mm(x.view(-1, 24), w.t())
    return (h.view(-1, 4).t() * 2).sum(0).add(1).to(torch.bfloat16)


def test_what_is_kept_is_what_torch_keeps() -> None:
    facts = []
    for given in ((), kept_facts.SETTINGS):
        with settings(*given):
            for _ in range(2):
                x = imagined(torch.randn(3, 10, 24), (0, 1))
                outputs = [some_operations(x, x.fake_mode.from_tensor(torch.randn(8, 24))) for _ in range(2)]
                kept = x.fake_mode.shape_env.fake_tensor_cache
                facts.append((len(kept), [told(output) for output in outputs]))
    assert facts[0][0] > 3
    assert all(found == facts[0] for found in facts[1:])


def test_one_of_a_kind_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    of_torch = FakeTensorMode._output_from_cache_entry
    monkeypatch.setattr(FakeTensorMode, "_output_from_cache_entry", lambda self, *given: tried.append(1) or of_torch(self, *given))
    monkeypatch.setattr(kept_facts, "_tried", set())
    with settings(*kept_facts.SETTINGS):
        x = imagined(torch.randn(3, 10, 24), (0, 1))
        x + 1, x + 2, x + 3, x * 2
        assert len(tried) == 1
        assert "_output_from_cache_entry" not in vars(x.fake_mode)
        x + 1
        assert len(tried) == 2  # what was kept is used


class Pair(NamedTuple):
    a: int
    b: Any


@pytest.mark.parametrize("tree", [1, (1, "a", [2, {"b": (3, None)}]), Pair(1, (2, "c")), torch.Size([2, 3]), [], {}, None,
                                  (torch.return_types.max((1, 2)), Pair(1, 2))], ids=str)
def test_trees_are_mapped_as_torch_does(tree: Any) -> None:
    def more(x: int) -> int:
        return x + 1

    found, wanted = plain_trees.tree_map_only(int, more, tree), trees.tree_map_only(int, more, tree)
    assert found == wanted
    assert type(found) is type(wanted)
    assert plain_trees._Trees().tree_leaves is trees.tree_leaves


def test_logs_are_written_when_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("fxfuse-test-log")
    monkeypatch.setattr(unread_logs.trace_log, "handlers", [])
    logged = unread_logs.if_kept(lambda: "text", (log,), lambda: None)
    assert logged() is None
    log.setLevel(logging.INFO)
    assert logged() == "text"
    log.setLevel(logging.NOTSET)
    assert logged() is None
    monkeypatch.setattr(unread_logs.trace_log, "handlers", [logging.NullHandler()])
    assert logged() == "text"


def test_a_guard_says_what_it_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """And, for a log of guards, where in the model that was."""
    monkeypatch.setattr(unread_logs.trace_log, "handlers", [])
    place = SimpleNamespace(user_stack=traceback.extract_stack(), stack=None)
    with settings(*unread_logs.SETTINGS):
        assert dynamo_guards.get_verbose_code_part("x is y", place) == "x is y"
        monkeypatch.setattr(dynamo_guards.recompiles_log, "disabled", False)
        monkeypatch.setattr(dynamo_guards.recompiles_log, "isEnabledFor", lambda level: True)
        told = dynamo_guards.get_verbose_code_part("x is y", place)
    assert told.startswith("x is y ")
    assert "# " in told


def test_channels_are_no_question_of_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    of_torch = fact_keys._suggested
    monkeypatch.setattr(fact_keys, "_suggested", lambda tensor: asked.append(tensor) or of_torch(tensor))
    for symbols, times in (((0, 1), 0), ((), 1)):
        x = imagined(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), symbols)
        wanted = fake_tensor.extract_tensor_metadata(x)
        with settings(*fact_keys.SETTINGS):
            assert fake_tensor.extract_tensor_metadata(x).memory_format is wanted.memory_format
        assert len(asked) == times


def joint(x: Tensor, w: Tensor) -> list[Tensor]:
    h = torch.nn.functional.silu(x.view(-1, x.shape[2]) @ w)
    return list(torch.autograd.grad((h * x.shape[1]).sum(), [x, w]))


def test_a_joint_graph_is_torchs() -> None:
    def code() -> str:
        x, w = torch.randn(3, 10, 24, requires_grad=True), torch.randn(24, 8, requires_grad=True)
        return make_fx(joint, tracing_mode="symbolic")(x, w).code

    wanted = code()
    with settings(*kept_facts.SETTINGS, *plain_trees.SETTINGS, *plain_views.SETTINGS, *sizes_once.SETTINGS, *unread_logs.SETTINGS):
        found = code()
    assert found == wanted


class Pair(NamedTuple):
    first: Any
    second: Any


ASKED = {
    "tensors": lambda x: (x, x[..., :3], x.transpose(0, 1), x.to(torch.bfloat16)),
    "no symbols": lambda x: (x.new_empty(3, 4), x.new_empty(())),
    "numbers": lambda x: (1, 1.0, True, None, "a", torch.float32, torch.device("cpu"), torch.strided, torch.contiguous_format, 2**70),
    "sizes": lambda x: (x.shape, list(x.shape), x.shape[0] * 2, x.stride(), [x.shape[1], [1, (2.0,)]]),
    "a dictionary": lambda x: dict(a=x, b=[x, 1], c=dict(d=None)),
    "a pair": lambda x: [Pair(x, 1), Pair(1, (2,))],
    "operations": lambda x: (torch.ops.aten.add.Tensor, 1 + 2j),
    "an empty one": lambda x: (),
}


def asked(written: Any, mode: FakeTensorMode, args: Any) -> Any:
    """What stands for ``args``, or the error that says that nothing does."""
    state, result = fake_tensor._CacheKeyState(mode.shape_env), []
    try:
        written(mode, result, args, state, [])
    except Exception as error:
        return repr(error)
    return [repr(item) for item in result], [type(item) for item in result], len(state.sym_node_lookup), state.known_symbols


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("symbols", [(0, 1), ()], ids=str)
def test_the_cache_is_asked_as_torch_asks_it(name: str, symbols: tuple[int, ...]) -> None:
    x = imagined(torch.empty(4, 6, 24), symbols)
    args = ASKED[name](x)
    assert asked(fact_keys.write, x.fake_mode, args) == asked(fact_keys._write_of_torch, x.fake_mode, args)


@pytest.mark.parametrize("given", [
    lambda x: (torch.ones(2),), lambda x: (imagined(torch.ones(2), ()),), lambda x: (len,), lambda x: (lambda: 1,),
    lambda x: (x.shape[0] > 5,), lambda x: (FakeTensorMode().from_tensor(torch.eye(2).to_sparse()),),
])  # fmt: skip
def test_what_torch_does_not_ask_is_not_asked(given: Any) -> None:
    x = imagined(torch.empty(4, 6, 24), (0, 1))
    args = given(x)
    assert asked(fact_keys.write, x.fake_mode, args) == asked(fact_keys._write_of_torch, x.fake_mode, args)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("ours", [True, False])
def test_views_from_the_cache(name: str, ours: bool) -> None:
    """The second time a view is asked for it comes from the cache: the same facts, in its base's memory."""
    with settings(*(fact_keys.SETTINGS if ours else ())):
        x = imagined(torch.empty(4, 6, 24), (0, 1))
        first, second = VIEWS[name](x), VIEWS[name](x)
        assert told(second) == told(first)
        assert second.untyped_storage()._cdata == first.untyped_storage()._cdata or not first._is_view()
        assert (second._version, second.requires_grad, second.dtype) == (first._version, first.requires_grad, first.dtype)


def test_nothing_is_of_a_module_that_nobody_imported() -> None:
    code = ("import sys, torch\nfrom fxfuse.capture.absent_modules import SETTINGS, _HOME\n"
            "(owner, name, value), = SETTINGS\nsetattr(owner, name, value)\n"
            "assert torch.compile(lambda x: torch.relu(x), backend='eager')(torch.ones(2)).sum() == 2\n"
            "assert _HOME not in sys.modules\n"
            "from torch.distributed.tensor.experimental._func_map import _local_map_wrapped as made\n"
            "assert not owner.should_wrap_in_hop(made) and not owner.should_wrap_in_hop(len)\n"
            "owner._enabled = True\nassert owner.should_wrap_in_hop(made) and not owner.should_wrap_in_hop(len)\n")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
