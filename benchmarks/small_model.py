"""A small llama that is really trained, here and now: on Python sources, since every machine has them.

The standard library and the installed packages; one file in ``held`` is held out. Tokens of a byte-pair encoding trained on a part
of them; they are kept in the temporary folder, so that a second run on a machine does not tokenize again.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "true"  # encoding a text on one core would take longer than training on it

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    hidden: int = 512
    layers: int = 14
    vocabulary: int = 8192
    batch: int = 64
    length: int = 512
    rate: float = 1e-3
    decay: float = 0.1
    characters: int = 60_000_000
    held: int = 20
    planted: int = 0  # layers that are given outlier channels after training


def sources(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Texts of Python files until there are ``recipe.characters``: for training, and held out."""
    paths = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
    files = sorted({file for folder in paths for file in folder.rglob("*.py")}, key=str)
    random.Random(0).shuffle(files)
    kept: tuple[list[str], list[str]] = ([], [])
    size = 0
    for place, file in enumerate(files):
        text = file.read_text(errors="ignore")
        kept[place % recipe.held == 0].append(text)
        size += len(text)
        if size >= recipe.characters:
            break
    return kept


def tokenizer_for(recipe: Recipe, training: list[str]) -> Any:
    """A byte-pair encoding, learnt from some of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocabulary, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(training[: max(8, len(training) // 12)], trainer)
    return tokenizer


def encoded(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 stream of all texts."""
    return torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids])


def tokenize(recipe: Recipe) -> tuple[Tensor, Tensor, Any]:
    """int64 token streams, for training and held out, and the tokenizer; from the temporary folder if they are there."""
    from tokenizers import Tokenizer

    text = f"{recipe.vocabulary} {recipe.characters} {recipe.held} {sys.prefix}"
    path = Path(tempfile.gettempdir()) / f"fxfuse_tokens_{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"
    if path.exists():
        training, held_out, saved = torch.load(path)
        return training, held_out, Tokenizer.from_str(saved)
    texts = sources(recipe)
    tokenizer = tokenizer_for(recipe, texts[0])
    training, held_out = (encoded(tokenizer, each) for each in texts)
    torch.save((training, held_out, tokenizer.to_str()), path)
    return training, held_out, tokenizer


def batches(stream: Tensor, recipe: Recipe, seed: int, device: str) -> Iterator[Tensor]:
    """int64 [batch, length] from places drawn by ``seed``, for ever. The stream lies on the device: no batch waits for the host."""
    generator = torch.Generator().manual_seed(seed)
    stream, within = stream.to(device), torch.arange(recipe.length, device=device)
    while True:
        starts = torch.randint(len(stream) - recipe.length, (recipe.batch, 1), generator=generator)
        yield stream[starts.to(device, non_blocking=True) + within]


def trained(recipe: Recipe, stream: Tensor, seconds: float, device: str) -> tuple[Any, int]:
    """A model in bfloat16, and the steps it was trained: float32 weights under autocast, warm-up, linear decay by the clock."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxfuse

    torch.manual_seed(0)
    heads = recipe.hidden // 64
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=recipe.layers, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
    )).to(device).train()  # fmt: skip
    fxfuse.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=recipe.decay,
                                  fused=device == "cuda")  # fmt: skip
    began, steps = None, 0
    for ids in batches(stream, recipe, 0, device):
        done = 0.0 if began is None else (time.monotonic() - began) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (steps + 1) / 100) * (1 - done)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 100 == 0 and not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} after {steps} steps: another learning rate")
        began = began or time.monotonic()  # the first step compiles
    model = fxfuse.restore(model).to(torch.bfloat16).eval()
    plant_outliers(model, recipe.planted)
    return model, steps


@torch.no_grad()
def plant_outliers(model: Any, layers: int, factor: float = 32.0, every: int = 64, seed: int = 0) -> list[int]:
    """The layers, drawn by ``seed``, whose output and down projections now read a few large channels. The function stays the same.

    One input channel of each ``every``, drawn too, is multiplied by ``factor`` in the weight that reads it and divided by it in the
    weight that makes it (up projection, value projection). Powers of two, so that no weight loses a bit: what differs from the model
    as trained is only what a block of 4-bit numbers with one scale can hold. Large language models grow such channels by
    themselves, in few layers, by factors of 20 to 100 (Dettmers and others 2022, LLM.int8; Xiao and others 2023, SmoothQuant);
    one of this size does not.
    """
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(model.model.layers)), layers))
    for place in chosen:
        layer = model.model.layers[place]
        for maker, reader in ((layer.mlp.up_proj, layer.mlp.down_proj), (layer.self_attn.v_proj, layer.self_attn.o_proj)):
            width = reader.weight.shape[1]
            channels = [start + draw.randrange(min(every, width - start)) for start in range(0, width, every)]
            maker.weight[channels] /= factor
            reader.weight[:, channels] *= factor
    return chosen
