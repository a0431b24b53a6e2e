"""Pretraining from a config, all weights, by the trainer of transformers.    python examples/pretrain.py [--tiny]"""

import sys

import tiny
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fxfuse

TINY = "--tiny" in sys.argv
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-0.5B"  # (its config and tokenizer only)
LENGTH = 32 if TINY else 1024

tokenizer = AutoTokenizer.from_pretrained(MODEL)
data = tiny.dataset({"text": tiny.sentence}) if TINY else load_dataset("roneneldan/TinyStories", split="train[:1%]")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=LENGTH), remove_columns=["text"])

model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
model = fxfuse.optimize(model)  # <- the added line

arguments = TrainingArguments(
    output_dir="out/pretrain",
    per_device_train_batch_size=2 if TINY else 16,
    gradient_accumulation_steps=2,
    learning_rate=1e-3 if TINY else 3e-4,
    max_steps=4 if TINY else 2000,
    logging_steps=1 if TINY else 20,
    save_strategy="no",
    bf16=not TINY,
    use_cpu=TINY,
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
print(fxfuse.report(model))
