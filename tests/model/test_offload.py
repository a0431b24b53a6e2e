"""Blocks of real models with what they save on the host: the same bits, with products shared and memory reused around the copies."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxfuse import lowering
from fxfuse.backend import Backend
from fxfuse.memory.plan import Choice
from fxfuse.memory.sizes import Sizes
from fxfuse.memory.surveys import survey_of

from ..offloading import Late, traffic

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                                  num_key_value_heads=2, vocab_size=64)).model,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0.0,
                                               embd_pdrop=0.0, attn_pdrop=0.0)).transformer,
}  # fmt: skip


def test_in_tiles_too(records: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back from the host is read by tiles; sums over rows are added up in another order."""
    torch.use_deterministic_algorithms(False)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, vocab_size=64)).model.double()
    ids = torch.randint(0, 64, (2, 64))
    device = Late()
    with traffic(monkeypatch, device) as transfers:
        plain = gradients(model, "keep", ids)
        survey = next(survey for record in records if (survey := survey_of(record)) is not None)
        choice = survey.offloaded(Choice(recompute=survey.chain[-1]), Sizes(survey.compiled_for))[0]
        ours = gradients(model, str(replace(choice, tiles=4)), ids)
        device.finish()
        assert transfers.counts.sent > 0
        assert transfers.pool.in_use() == 0
    assert not device.faults
    assert any("tiles_0" in record.backward_source for record in records)
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("name", "which"), [*((name, 0) for name in MODELS), ("llama", -1)])
def test_gradients_are_the_same_bits(name: str, which: int, records: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)  # or products would be left as they are
    monkeypatch.setattr(lowering, "REUSE_ON_CPU", True)
    model = MODELS[name]()
    ids = torch.randint(0, 64, (2, 9))
    device = Late()
    with traffic(monkeypatch, device) as transfers:
        plain = gradients(model, "keep", ids)
        survey = next(survey for record in records if (survey := survey_of(record)) is not None)
        sizes = Sizes(survey.compiled_for)
        point = survey.point(survey.offloaded(Choice(), sizes)[which], sizes)  # all that is large, or the largest alone
        assert transfers.counts.sent == 0
        ours = gradients(model, point.text, ids)
        device.finish()
        sent, in_use = transfers.counts, transfers.pool.in_use()
    assert not device.faults
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert not sent.kept
    assert sent.sent_bytes == 2 * 3 * point.offloaded_bytes
    assert (sent.late, in_use) == (0, 0)


def gradients(model: torch.nn.Module, plan: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of two steps of a copy of a model whose blocks are compiled under a plan."""
    torch.compiler.reset()
    ours = copy.deepcopy(model)
    backend = Backend(plan=plan, validate="off", strict=True, remainder="eager")
    for block in getattr(ours, "layers", None) or ours.h:
        block.compile(backend=backend, dynamic=True)
    for _ in range(2):
        ours(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
    return [parameter.grad for parameter in ours.parameters() if parameter.grad is not None]
