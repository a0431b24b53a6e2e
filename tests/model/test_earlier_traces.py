"""The joint graphs of an earlier run are taken only where nothing differs, and from whole files alone."""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse import earlier_runs
from fxfuse.earlier_traces import files, seam
from fxfuse.functions import FUNCTIONS


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FXFUSE_REMEMBER", "1")
    torch._dynamo.reset()
    yield tmp_path / "traces"
    torch._dynamo.reset()


class Block(nn.Module):
    """What has a fused op, a matmul and a parameter of each kind."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.linear(self.norm(x))) * x


class Other(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.linear(self.norm(x))) + x


def outcome(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """Its output and its gradients, as compiled by a process that has compiled nothing."""
    torch._dynamo.reset()
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True) if x is None else x
    output = torch.compile(model, backend="fxfuse")(x)
    output.float().square().sum().backward()
    found = [output.detach(), *(t.grad for t in (x, *model.parameters()) if t.is_leaf and t.grad is not None)]
    model.zero_grad()
    return found


def counted(run: Callable[[], object]) -> dict[str, int]:
    before = seam.counts.copy()
    run()
    return dict(seam.counts - before)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_what_was_kept_is_taken_and_gives_the_same() -> None:
    model = Block()
    traced: list[Tensor] = []
    assert counted(lambda: traced.extend(outcome(model))) == {"kept": 1}
    taken: list[Tensor] = []
    assert counted(lambda: taken.extend(outcome(model))) == {"taken": 1}
    assert same(taken, traced)


def frozen(model: nn.Module) -> nn.Module:
    model.linear.weight.requires_grad_(False)
    return model


DIFFERENT = {
    "another operation": lambda: outcome(Other()),
    "another width": lambda: outcome(Block(64), torch.randn(3, 5, 64, requires_grad=True)),
    "another dtype": lambda: outcome(Block().bfloat16(), torch.randn(3, 5, 32, dtype=torch.bfloat16, requires_grad=True)),
    "other strides": lambda: outcome(Block(), torch.randn(3, 32, 5).transpose(1, 2).requires_grad_()),
    "an input without a gradient": lambda: outcome(Block(), torch.randn(3, 5, 32)),
    "an input that is no leaf": lambda: outcome(Block(), torch.randn(3, 5, 32, requires_grad=True) * 1.0),
    "a frozen parameter": lambda: outcome(frozen(Block())),
    "a length that is known": lambda: outcome(Block(), torch.randn(3, 1, 32, requires_grad=True)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_question_is_traced(what: str) -> None:
    outcome(Block())
    found = counted(DIFFERENT[what])
    assert "taken" not in found, what


def test_other_settings_are_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome(Block())
    with torch.autocast("cpu", torch.bfloat16):
        assert "taken" not in counted(lambda: outcome(Block()))
    with monkeypatch.context() as patched:
        patched.setattr(earlier_runs, "build", lambda: "another build")
        patched.setattr("fxfuse.earlier_traces.conditions.build", lambda: "another build")
        assert "taken" not in counted(lambda: outcome(Block()))
    with monkeypatch.context() as patched:
        patched.setenv("FXFUSE_SOMETHING", "1")
        assert "taken" not in counted(lambda: outcome(Block()))
    with torch._functorch.config.patch(functionalize_rng_ops=True):
        assert "taken" not in counted(lambda: outcome(Block()))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "taken" not in counted(lambda: outcome(Block()))
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    assert "taken" not in counted(lambda: outcome(Block()))
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)  # (a fixture sets it back)
    assert "taken" not in counted(lambda: outcome(Block()))


def test_nothing_is_kept_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    monkeypatch.setenv("FXFUSE_REMEMBER", "0")
    assert counted(lambda: outcome(Block())) == {}
    assert not own_folder.exists()


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({
        "cut off": content[:middle],
        "a bit turned": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
        "empty": b"",
        "another's": b"something else entirely",
    }[how])


@pytest.mark.parametrize("how", ["cut off", "a bit turned", "empty", "another's"])
def test_a_spoiled_file_is_no_trace(how: str, own_folder: Path) -> None:
    traced = outcome(Block())
    (path,) = own_folder.iterdir()
    spoil(path, how)
    again: list[Tensor] = []
    assert counted(lambda: again.extend(outcome(Block()))) == {"kept": 1}
    assert same(again, traced)


def test_another_graphs_trace_under_this_name_is_noticed(own_folder: Path) -> None:
    """The planted fault: a whole file, good in itself, that answers another question."""
    traced = outcome(Block())
    (ours,) = own_folder.iterdir()
    outcome(Other())
    (theirs,) = set(own_folder.iterdir()) - {ours}
    ours.write_bytes(theirs.read_bytes())
    again: list[Tensor] = []
    assert counted(lambda: again.extend(outcome(Block()))) == {"kept": 1}
    assert same(again, traced)


def test_a_whole_file_that_cannot_be_read_is_no_trace(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    traced = outcome(Block())
    monkeypatch.setattr(files, "load", lambda asked: b"\x80\x05cos\nsystem\n.")
    caplog.set_level(logging.DEBUG, "fxfuse")
    again: list[Tensor] = []
    assert counted(lambda: again.extend(outcome(Block()))) == {"left": 1}
    assert "os.system" in caplog.text
    assert same(again, traced)


class Changing(Block):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().forward(x) * self.seen


class Viewing(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = super().forward(x)
        return y.view(-1), y


def test_what_has_no_exact_words_is_traced_every_time() -> None:
    def training_two(model: nn.Module) -> None:
        torch._dynamo.reset()
        sum(part.square().sum() for part in torch.compile(model, backend="fxfuse")(torch.randn(3, 5, 32))).backward()

    for run in (lambda: outcome(Changing()), lambda: training_two(Viewing())):
        assert counted(run) == counted(run) == {"left": 1}


@torch.library.custom_op("fxfuse_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, arriving: arriving * 2)


class OfSomebody(Block):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(super().forward(x))


def test_with_a_function_replaced_while_this_runs_nothing_is_taken_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its derivative is in no source that the question names."""
    assert counted(lambda: outcome(Block()))["kept"]
    monkeypatch.setitem(FUNCTIONS, "sigmoid", replace(FUNCTIONS["sigmoid"]))
    assert set(counted(lambda: outcome(Block()))) == {"left"}


def test_an_operator_of_somebody_else_is_traced_every_time() -> None:
    assert counted(lambda: outcome(OfSomebody())) == {"left": 1}
    assert counted(lambda: outcome(OfSomebody())) == {"left": 1}


class Calling(Block):
    """Calls a function that Dynamo leaves as one node."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


def composed(times: float) -> torch.library.Library:
    """An operator made of torch's, which a trace holds in its stead."""
    library = torch.library.Library("fxfuse_tests", "FRAGMENT")
    library.define("composed(Tensor x) -> Tensor")
    library.impl("composed", lambda x: x * times, "CompositeImplicitAutograd")
    return library


def test_an_operator_of_somebody_else_called_without_its_overload_is_traced_every_time() -> None:
    for times in (2.0, 3.0):
        library = composed(times)
        plain = outcome(Block())
        found: list[Tensor] = []
        assert counted(lambda: found.extend(outcome(Calling(torch.ops.fxfuse_tests.composed)))) == {"left": 1}  # noqa: B023
        torch.testing.assert_close(found[0], plain[0] * times)
        library._destroy()
        del library  # (torch clears its names once more when it goes)


class Named:
    """An object with the name of a function of torch's."""

    def __init__(self, times: float) -> None:
        functools.update_wrapper(self, F.silu)
        self.times = times

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.times


def test_an_object_under_the_name_of_a_function_is_traced_every_time() -> None:
    for times in (2.0, 3.0):
        named = torch._dynamo.allow_in_graph(Named(times))
        plain = outcome(Block())
        found: list[Tensor] = []
        assert counted(lambda: found.extend(outcome(Calling(named)))) == {"left": 1}  # noqa: B023
        torch.testing.assert_close(found[0], plain[0] * times)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_where_a_derivative_of_torchs_is_replaced_nothing_is_taken_or_kept() -> None:
    """Its name alone does not say what it computes."""
    outcome(Block())
    library = torch.library.Library("aten", "IMPL")
    library.impl("mish", lambda x: x * 2.0, "AutogradCPU")
    assert counted(lambda: outcome(Block())) == {"left": 1}
    library._destroy()
    assert counted(lambda: outcome(Block())) == {"taken": 1}


class CallingByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(-1)


def test_a_method_of_tensors_by_somebody_else_is_traced_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph says its name and no more."""
    plain = outcome(Block())[0]
    for times in (2.0, 3.0):
        found: list[Tensor] = []
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "cumsum", lambda x, dim, times=times: x * times, raising=False)
            assert counted(lambda: found.extend(outcome(CallingByName()))) == {"left": 1}  # noqa: B023
        torch.testing.assert_close(found[0], plain * times)
    assert counted(lambda: outcome(CallingByName())) == {"kept": 1}


def test_a_clock_around_backward_leaves_traces_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers put one there; no trace calls it."""
    backward, called = Tensor.backward, []
    monkeypatch.setattr(Tensor, "backward", lambda *args, **named: called.append(1) or backward(*args, **named))
    model = Block()
    assert counted(lambda: outcome(model)) == {"kept": 1}
    assert counted(lambda: outcome(model)) == {"taken": 1}
    assert called == [1, 1]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_no_trace(mode: int, own_folder: Path) -> None:
    outcome(Block())
    (path,) = own_folder.iterdir()
    path.chmod(mode)
    assert counted(lambda: outcome(Block())) == {"kept": 1}
    assert counted(lambda: outcome(Block())) == {"taken": 1}


def test_a_file_of_another_user_is_no_trace(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome(Block())
    facts = list(next(own_folder.iterdir()).stat())
    facts[stat.ST_UID] = os.geteuid() + 1
    monkeypatch.setattr(files.os, "fstat", lambda number: os.stat_result(facts))
    assert counted(lambda: outcome(Block())) == {"kept": 1}


def calling(module: bytes, name: bytes, argument: bytes) -> bytes:
    """A pickle that calls what it names."""
    text = lambda value: b"\x8c" + bytes([len(value)]) + value  # noqa: E731
    return b"\x80\x05" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


@pytest.mark.parametrize(("module", "name"), [
    ("torch", "os.system"), ("torch", "load"), ("sympy", "sympify"), ("operator", "attrgetter"), ("math", "__loader__"),
    ("fxfuse.earlier_traces.graphs", "sys.exit"), ("fxfuse.earlier_traces.graphs", "_of_torch"),
])  # fmt: skip
def test_a_crafted_file_calls_nothing_by_name(module: str, name: str, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(files, "load", lambda asked: calling(module.encode(), name.encode(), b"load"))
    caplog.set_level(logging.DEBUG, "fxfuse")
    assert counted(lambda: outcome(Block())) == {"left": 1}
    assert "in a file of traces" in caplog.text


def test_the_folder_stays_small(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    monkeypatch.setattr(files, "MOST_FILES", 2)
    for number in range(4):
        files.keep(f"question {number}", b"trace")
        os.utime(files._path(f"question {number}"), (number, number))
    files.keep("last", b"trace")
    assert len(list(own_folder.iterdir())) == 2
    assert [files.load(asked) for asked in ("last", "question 3", "question 0")] == [b"trace", b"trace", None]
