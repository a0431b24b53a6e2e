"""Preferences, with adapters over their own base as the reference.    python examples/dpo.py [--tiny]"""

import sys

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import fxfuse

TINY = "--tiny" in sys.argv
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-1.5B-Instruct"
DATA = tiny.preferences() if TINY else load_dataset("trl-lib/ultrafeedback_binarized", split="train")

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32 if TINY else torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fxfuse.optimize(model)  # <- the added line

arguments = DPOConfig(
    output_dir="out/dpo",
    max_length=64 if TINY else 1024,
    per_device_train_batch_size=2,
    learning_rate=5e-6,
    max_steps=4 if TINY else 500,
    logging_steps=1 if TINY else 10,
    save_strategy="no",
    bf16=not TINY,
    use_cpu=TINY,
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
DPOTrainer(model, args=arguments, train_dataset=DATA, processing_class=tokenizer).train()
print(fxfuse.report(model))
