"""Capture over architectures and modes: loss and every gradient equal eager bit for bit, in few graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxfuse.capture import find_installation, install, uninstall
from tests.model import builders as build
from tests.model.builders import CAPTURED, Graphs, PassThrough, differences, step, tokens

MODELS = {
    "llama": (build.llama, tokens, 3),
    "qwen3": (build.qwen3, tokens, 3),
    "gemma2": (build.gemma2, tokens, 4),  # two kinds of blocks
    "mixtral": (build.mixtral, tokens, 3),
    "gpt2": (build.gpt2, tokens, 3),
    "bert": (build.bert, tokens, 4),
    "t5": (build.t5, tokens, 8),  # four kinds of blocks, labels shifted before the encoder
    "vit": (build.vit, build.images, 3),
    "nano": (build.NanoGPT, tokens, 3),
    "plain vit": (build.PlainViT, build.images, 4),
}
QUICK = ("llama", "nano")


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    CAPTURED.clear()


def graphs() -> Graphs:
    return CAPTURED.get("", Graphs())


def names(quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def captured(model: nn.Module) -> nn.Module:
    install(model, PassThrough())
    return model


# Before 2.13, Dynamo cuts a head at a warning that is shown once, and that a loss writes what it found out into the config is another
# graph in the second step.
OLDER = torch.__version__ < (2, 13)


@pytest.mark.parametrize("name", names(("gemma2", "gpt2")))
def test_a_step_equals_eager(name: str):
    make, batch, most = MODELS[name]
    torch.manual_seed(0)
    want = step(make(), batch())
    torch.manual_seed(0)
    model = captured(make())
    assert differences(step(model, batch()), want) == []
    assert 0 < len(graphs()) <= most + OLDER
    assert graphs().calling("cross_entropy") == 1
    assert find_installation(model).errors() == []
    if OLDER:
        step(model, batch())
    made = len(graphs())
    step(model, batch())
    assert len(graphs()) == made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", names(("nano",)))
def test_low_precision_weights(name: str, dtype: torch.dtype):
    make, batch, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    want = step(model, inputs)
    assert differences(step(captured(model), inputs), want) == []


@pytest.mark.parametrize("name", names(("llama",)))
def test_autocast_on_and_off(name: str):
    make, batch, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()

    def mixed() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, batch())

    wanted = mixed(), step(model, batch())
    captured(model)
    for _ in range(2):
        assert differences(mixed(), wanted[0]) == []
        assert differences(step(model, batch()), wanted[1]) == []


@pytest.mark.parametrize("name", names(("nano",)))
def test_train_eval_and_no_grad(name: str):
    make, batch, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()

    def all_modes() -> list[dict[str, torch.Tensor]]:
        results = [step(model.train(), batch()), step(model.eval(), batch())]
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                torch.manual_seed(3)
                results.append({"loss": model.train()(**batch())["loss"]})
        return results

    wanted = all_modes()
    captured(model)
    for _ in range(2):
        for got, want in zip(all_modes(), wanted, strict=True):
            assert differences(got, want) == []


def test_a_forward_that_training_is_compared_with_runs_the_same_blocks():
    """A reference's log-probabilities, or a policy's before its update: no gradients, training mode, no cache."""
    model = captured(build.llama())
    want = model.model(tokens()["input_ids"], use_cache=False).last_hidden_state
    made = len(graphs())
    for _ in range(2):
        with torch.no_grad():
            got = model.model(tokens()["input_ids"], use_cache=False).last_hidden_state
        assert torch.equal(got, want)
        assert not got.requires_grad
        assert len(graphs()) == made + 2  # block and norm, once


def test_calls_without_gradients_make_no_graph():
    model = captured(build.llama()).eval()
    with torch.no_grad():
        model(**tokens())
    with torch.inference_mode():
        model.train()(**tokens())
    assert graphs() == []


@pytest.mark.parametrize("name", names(("nano",)))
def test_requires_grad_changed_afterwards(name: str):
    make, batch, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()

    def phases() -> list[dict[str, torch.Tensor]]:
        results = []
        for frozen in ("norm", "mlp", "attn", "lm_head", "nothing of that name"):
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in parameter_name)
            results.append(step(model, batch()))
        return results

    wanted = phases()
    captured(model)
    for got, want in zip(phases(), wanted, strict=True):
        assert differences(got, want) == []


def test_tied_weights_stay_tied_and_sum_their_gradients():
    model = build.llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = step(model, tokens())
    captured(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert differences(step(model, tokens()), want) == []


def test_dropout_draws_what_eager_draws():
    torch.manual_seed(0)
    model = build.NanoGPT(dropout=0.3)
    want = step(model, tokens())
    assert differences(step(captured(model), tokens()), want) == []


def test_a_block_alone_is_captured_whole():
    torch.manual_seed(0)
    block = build.DiTBlock()
    batch = {"x": torch.randn(2, 9, build.HIDDEN), "condition": torch.randn(2, build.HIDDEN)}
    want = step(block, batch)
    assert differences(step(captured(block), batch), want) == []
    assert len(graphs()) == 1


def test_accumulated_gradients_and_retained_graphs():
    torch.manual_seed(0)
    model = build.NanoGPT()

    def accumulate() -> dict[str, torch.Tensor]:
        model.zero_grad()
        for seed in (0, 1):
            loss = model(**tokens(seed=seed))["loss"]
            loss.backward(retain_graph=True)
            (0.5 * loss).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    want = accumulate()
    captured(model)
    assert differences(accumulate(), want) == []


def test_hidden_states_and_attentions_can_be_asked_for():
    model = build.llama()
    want = model(**tokens(), output_hidden_states=True)
    captured(model)
    got = model(**tokens(), output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))


def test_torch_func_and_dispatch_modes_go_to_eager():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = build.NanoGPT()
    with FlopCounterMode(display=False) as want:
        step(model, tokens())
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, kwargs=tokens())["loss"]

    wanted = torch.func.grad(loss)(parameters)
    captured(model)
    with FlopCounterMode(display=False) as got:
        step(model, tokens())
    assert got.get_total_flops() == want.get_total_flops()
    assert differences(torch.func.grad(loss)(parameters), wanted) == []
    assert graphs() == []
    assert any("TorchDispatchMode" in note for note in find_installation(model).notes())


@pytest.mark.parametrize("make", [build.llama])
def test_cost_does_not_grow_with_depth(make: Any):
    counts = []
    for layers in (2, 12):
        torch.compiler.reset()
        CAPTURED.clear()
        step(captured(make(layers)), tokens(length=6))
        counts.append(len(graphs()))
    assert counts[0] == counts[1]


def test_nothing_is_left_behind():
    import gc
    import weakref

    model = captured(build.NanoGPT())
    step(model, tokens())
    gone = weakref.ref(model)
    del model
    torch.compiler.reset()
    gc.collect()
    assert gone() is None
    uninstall(build.NanoGPT())
