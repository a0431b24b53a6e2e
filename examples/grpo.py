"""Rewards for sampled completions: the model generates in every step.    python examples/grpo.py [--tiny]"""

import sys

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import fxfuse

TINY = "--tiny" in sys.argv
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-0.5B-Instruct"
DATA = tiny.prompts() if TINY else load_dataset("trl-lib/tldr", split="train")


def variety(completions, **kwargs):
    """More different words, more reward."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(len(set(text.split()))) for text in texts]


model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32 if TINY else torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fxfuse.optimize(model)  # <- the added line

arguments = GRPOConfig(
    output_dir="out/grpo",
    num_generations=2 if TINY else 8,
    max_completion_length=8 if TINY else 256,
    per_device_train_batch_size=4 if TINY else 8,
    learning_rate=1e-5,
    max_steps=3 if TINY else 500,
    logging_steps=1,
    save_strategy="no",
    bf16=not TINY,
    use_cpu=TINY,
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
GRPOTrainer(model, reward_funcs=variety, args=arguments, train_dataset=DATA, processing_class=tokenizer).train()
print(fxfuse.report(model))
