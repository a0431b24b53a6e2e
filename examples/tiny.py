"""What the examples run on with ``--tiny``: a model of two layers, a tokenizer of a few words, and made-up texts. No network."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

MARKS = ["<pad>", "<s>", "<|end|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = [f"w{i}" for i in range(96 - len(MARKS))]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <|end|> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def path() -> str:
    """A folder with a random Llama and its tokenizer, as ``from_pretrained`` takes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    marks = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlamaConfig(vocab_size=len(MARKS) + len(WORDS), max_position_embeddings=256, **sizes, **marks)
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """One token a word, and a chat template."""
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


def user(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(rng)}]


def assistant(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": sentence(rng)}]


def dataset(columns: dict[str, Callable[[random.Random], Any]], rows: int = 16) -> Any:
    """A ``datasets.Dataset``; each column a function of a random generator."""
    from datasets import Dataset

    rng = random.Random(0)
    return Dataset.from_list([{name: make(rng) for name, make in columns.items()} for _ in range(rows)])


def conversations() -> Any:
    return dataset({"messages": lambda rng: user(rng) + assistant(rng)})


def preferences() -> Any:
    return dataset({"prompt": user, "chosen": assistant, "rejected": assistant})


def prompts() -> Any:
    return dataset({"prompt": user})


def texts() -> Iterator[str]:
    """Endless plain text."""
    rng = random.Random(0)
    while True:
        yield sentence(rng, 8, 40)
