"""What TRL's trainers take: the tokenizer and the made-up texts of the examples, for the tiny models of the tests (same ids)."""

from __future__ import annotations

from examples.tiny import MARKS, WORDS, assistant, dataset, sentence, tokenizer, user
from tests.model.builders import VOCABULARY

assert len(MARKS) + len(WORDS) == VOCABULARY
__all__ = ["assistant", "dataset", "sentence", "tokenizer", "user"]
