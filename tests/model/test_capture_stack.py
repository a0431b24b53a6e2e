"""Models whose one forward embeds, runs its blocks and takes the loss: captured around the blocks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxfuse.capture import find_installation, install, is_copy
from tests.model import builders as build
from tests.model.builders import CAPTURED, Graphs, PassThrough, differences, step, tokens


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    CAPTURED.clear()


def graphs() -> Graphs:
    return CAPTURED.get("", Graphs())


def seeded(make: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def captured(model: nn.Module) -> nn.Module:
    install(model, PassThrough())
    return model


class Windings(build.NanoGPT):
    """What people do between blocks: skips with learned weights, tuples, keyword and plain arguments."""

    class Layer(build.Block):
        def forward(self, x: torch.Tensor, first: torch.Tensor, *, scale: float, values: Any = None) -> Any:
            y = super().forward(x + first * scale)
            return y, y.mean(-1, keepdim=True)

    def __init__(self, layers: int = 3) -> None:
        super().__init__(layers)
        self.transformer.h = nn.ModuleList([self.Layer(build.HIDDEN, 4) for _ in range(layers)])
        self.skips = nn.Parameter(torch.linspace(0.5, 1.5, layers))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        first = x = self.transformer.wte(input_ids)
        means = []
        for i, layer in enumerate(self.transformer.h):
            x, mean = layer(self.skips[i] * x, first, scale=0.5)
            means.append(mean)
        logits = self.lm_head(self.transformer.ln_f(x + sum(means)))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "means": means, "logits": logits}


@pytest.mark.parametrize("make", [build.NanoGPT, Windings])
def test_loss_and_gradients_equal_eager_for_every_shape(make: Any):
    batches = [tokens(), tokens(length=7), tokens(batch=5, length=9)]
    want = [step(seeded(make), batch) for batch in batches]
    model = captured(seeded(make))
    got = [step(model, batch) for batch in batches]
    assert [differences(a, b) for a, b in zip(got, want, strict=True)] == [[], [], []]
    assert graphs().calling("cross_entropy") == 1
    assert find_installation(model).notes() == []


@pytest.mark.parametrize("make", [build.NanoGPT, Windings])
def test_cost_does_not_grow_with_depth(make: Any):
    counts = []
    for layers in (2, 7):
        torch.compiler.reset()
        CAPTURED.clear()
        step(captured(make(layers)), tokens())
        counts.append(len(graphs()))
    assert counts[0] == counts[1]


class Norms(build.NanoGPT):
    """The same norm after every block, outside it."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        x = self.transformer.wte(input_ids)
        for block in self.transformer.h:
            x = F.layer_norm(block(x), (build.HIDDEN,))
        return {"loss": F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())}


def test_what_repeats_between_blocks_is_one_graph():
    want = step(seeded(lambda: Norms(4)), tokens())
    assert differences(step(captured(seeded(lambda: Norms(4))), tokens()), want) == []
    assert len(graphs()) == 4, "the embedding, what lies between blocks, the end, and the block"


def test_models_of_a_class_share_graphs_and_keep_their_weights():
    for seed in range(4):
        model = captured(seeded(build.NanoGPT, seed))
        got = step(model, tokens())
        assert differences(got, step(seeded(build.NanoGPT, seed), tokens())) == []
    assert len(graphs()) == 3


def test_copies_and_pickles():
    model = captured(seeded(build.NanoGPT))
    want = step(model, tokens())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.25)
    assert is_copy(twin)
    made = len(graphs())
    changed = step(twin, tokens())
    assert not torch.equal(changed["loss"], want["loss"])
    assert len(graphs()) == made
    assert differences(step(captured(twin), tokens()), changed) == []
    assert differences(step(pickle.loads(pickle.dumps(model)), tokens()), want) == []
    assert list(model.state_dict()) == list(build.NanoGPT().state_dict())


def test_a_pickle_is_captured_as_a_fresh_model_is():
    model = captured(seeded(build.NanoGPT))
    want = step(model, tokens())
    loaded = captured(pickle.loads(pickle.dumps(model)))
    made = len(graphs())
    assert differences(step(loaded, tokens()), want) == []
    assert len(graphs()) == made, "and shares its graphs"
    assert find_installation(loaded).notes() == []


def test_hooks_on_blocks_fire_once():
    def hooked(model: nn.Module) -> tuple[nn.Module, list[str]]:
        seen: list[str] = []
        block = model.transformer.h[1]
        block.register_forward_hook(lambda module, args, out: out * 1.5)
        block.register_forward_pre_hook(lambda *_: seen.append("before"))
        block.register_full_backward_hook(lambda *_: seen.append("backward"))
        block.mlp.register_forward_hook(lambda *_: seen.append("inside"))
        model.register_forward_hook(lambda *_: seen.append("top"))
        return model, seen

    model = captured(seeded(build.NanoGPT))
    step(model, tokens())
    ours, seen = hooked(model)
    theirs, wanted = hooked(seeded(build.NanoGPT))
    assert differences(step(ours, tokens()), step(theirs, tokens())) == []
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize("make", [build.NanoGPT, build.llama])
def test_hooks_for_all_modules_see_all_modules(make: Any):
    seen: list[str] = []
    model, plain = captured(seeded(make)), seeded(make)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        want = step(plain, tokens()), list(seen)
        seen.clear()
        got = step(model, tokens()), list(seen)
    finally:
        hook.remove()
    assert differences(got[0], want[0]) == []
    assert got[1] == want[1]
    assert any("a hook for all modules" in note for note in find_installation(model).notes())
    step(model, tokens())
    assert graphs().calling("cross_entropy") == 1, "and captured once it is gone"


class Checkpointed(build.NanoGPT):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(dropout=0.2)
        self.reentrant = reentrant

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        x = self.transformer.wte(input_ids)
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        logits = self.lm_head(self.transformer.ln_f(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_inside_the_forward(reentrant: bool):
    def make() -> nn.Module:
        return Checkpointed(reentrant)

    want = step(seeded(make), tokens())
    model = captured(seeded(make))
    for _ in range(2):
        assert differences(step(model, tokens()), want) == []
    assert graphs().calling("scaled_dot_product_attention") >= 1, "blocks are captured all the same"
    assert "Checkpointed (1 modules) is not captured" in "\n".join(find_installation(model).notes())


class Autocast(build.NanoGPT):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input_ids, labels)


def test_autocast_inside_the_forward():
    want = step(seeded(Autocast), tokens())
    model = captured(seeded(Autocast))
    assert differences(step(model, tokens()), want) == []
    assert "autocast" in "\n".join(find_installation(model).notes())


def test_another_compiler_on_top_sees_the_plain_model():
    model = captured(seeded(build.NanoGPT))
    want = step(seeded(build.NanoGPT), tokens())
    outer = torch.compile(model, backend="eager")
    assert differences(step(model, tokens()), want) == []
    loss = outer(**tokens())["loss"]
    assert torch.equal(loss, want["loss"])
