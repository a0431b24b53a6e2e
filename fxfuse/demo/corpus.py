"""Real text that every Python carries, a byte-level BPE tokenizer trained on it, and batches of tokens."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

ENOUGH = 400_000  # characters
VOCABULARY = 2048


def text() -> str:
    """The Python language reference as ``help()`` knows it; where that is stripped, library sources."""
    if importlib.util.find_spec("pydoc_data") is None:
        return _library_sources()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _library_sources() -> str:
    """Sources of the standard library, in the order of their names, until there is enough."""
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, parts)) >= ENOUGH:
            break
    return "\n\n".join(parts)


def tokens_of(written: str, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """``written`` in the tokens of a byte-level BPE trained on itself: int64 [tokens]."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(written.splitlines(keepends=True), trainer)
    return torch.tensor(tokenizer.encode(written).ids)


def batches(tokens: torch.Tensor, steps: int, rows: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches of random windows of the text: int64 [rows, length]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()])
