"""A training loop of one's own.    python examples/plain_loop.py [--tiny]"""

import sys
from itertools import islice

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxfuse

TINY = "--tiny" in sys.argv
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-0.5B"
DEVICE = "cuda" if torch.cuda.is_available() and not TINY else "cpu"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(DEVICE).train()
model = fxfuse.optimize(model)  # <- the added line

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if TINY else 1e-5)
texts = tiny.texts()
for step in range(5):
    batch = tokenizer(list(islice(texts, 4)), padding=True, return_tensors="pt").to(DEVICE)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not TINY):
        loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
print(fxfuse.report(model))
