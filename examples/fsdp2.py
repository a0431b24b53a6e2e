"""LoRA over sharded weights on several devices.    torchrun --nproc-per-node 2 examples/fsdp2.py [--tiny]

Blocks are captured one by one, and shards are gathered block by block: so optimize first, then shard.
"""

import sys
from itertools import islice

import tiny
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxfuse

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
torch.manual_seed(0)  # (the same model in every process)
MODEL = tiny.path() if TINY else "Qwen/Qwen2.5-7B"
dist.init_process_group("gloo" if TINY else "nccl")
rank = dist.get_rank()
if not TINY:
    torch.cuda.set_device(rank % torch.cuda.device_count())
DTYPE = torch.float32 if TINY else torch.bfloat16
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=DTYPE)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), autocast_adapter_dtype=False)
model = fxfuse.optimize(model.to(DEVICE))  # <- the added line

mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
texts = islice(tiny.texts(), rank, None, dist.get_world_size())
for step in range(5):
    batch = tokenizer(list(islice(texts, 4)), padding=True, return_tensors="pt").to(DEVICE)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss, op=dist.ReduceOp.SUM)
    if rank == 0:
        print(f"step {step}: loss {loss.item() / dist.get_world_size():.4f}")
if rank == 0:
    print(fxfuse.report(model))
dist.destroy_process_group()
