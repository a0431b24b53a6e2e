"""What TRL's trainers take: a tokenizer of a few words with a chat template, and conversations made of them."""

from __future__ import annotations

import random
from typing import Any

from tests.model.builders import VOCABULARY

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <|end|> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
MARKS = ["<pad>", "<s>", "<|end|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = [f"w{i}" for i in range(VOCABULARY - len(MARKS))]


def tokenizer() -> Any:
    """One token a word; ids as the tiny models' configs have them (pad 0, bos 1, eos 2)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*MARKS, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    marks = dict(pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **marks)


def sentence(rng: random.Random, low: int = 2, high: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def dataset(columns: dict[str, Any], rows: int = 16) -> Any:
    """A ``datasets.Dataset``; each column a function of a random generator."""
    from datasets import Dataset

    rng = random.Random(0)
    return Dataset.from_list([{name: make(rng) for name, make in columns.items()} for _ in range(rows)])


def user(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(rng)}]


def assistant(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": sentence(rng)}]
