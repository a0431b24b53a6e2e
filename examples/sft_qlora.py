"""QLoRA: adapters over 4-bit weights, then one 16-bit model.    python examples/sft_qlora.py [--tiny]"""

import sys

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import fxfuse

TINY = "--tiny" in sys.argv
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-7B-Instruct"
DATA = tiny.conversations() if TINY else load_dataset("trl-lib/Capybara", split="train")

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cpu" if TINY else 0}
)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fxfuse.optimize(model)  # <- the added line

arguments = SFTConfig(
    output_dir="out/sft_qlora",
    packing=True,
    max_length=64 if TINY else 4096,
    per_device_train_batch_size=2,
    learning_rate=2e-4,
    max_steps=4 if TINY else 500,
    logging_steps=1 if TINY else 10,
    save_strategy="no",
    bf16=True,
    use_cpu=TINY,
)
SFTTrainer(model, arguments, train_dataset=DATA, processing_class=AutoTokenizer.from_pretrained(MODEL)).train()
print(fxfuse.report(model))

merged = fxfuse.merge(model)  # dequantized once, merged in float32, rounded once: an ordinary transformers model
merged.save_pretrained("out/sft_qlora/merged")
