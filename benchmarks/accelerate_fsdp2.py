"""A model sharded by accelerate's own FSDP2 plugin: fused, or with --eager not. Llama-3.1-8B's layers (8 of them), LoRA r16, b2 s4096.

    torchrun --standalone --nproc-per-node 2 benchmarks/accelerate_fsdp2.py [--eager] [--tiny]    # --tiny: gloo, on the CPU

Random weights, bfloat16 adapters on every linear, no checkpointing, eight steps; what rank 0 prints is the median of the last five,
peak memory, the last step's gradient norm, and every step's loss (the mean over ranks).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))
# NVLink multicast can put the GPUs of a shared host out of service: it stays off in whatever starts this.
os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

LAST = 5  # steps that are timed


def adapted(tiny: bool, device: torch.device) -> nn.Module:
    """The model with adapters, not yet sharded."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (512, 128, 256, 2, 4, 2) if tiny else (128256, 4096, 14336, 8, 32, 8)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)), use_cache=False)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), autocast_adapter_dtype=False)


def main() -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    import fxfuse

    eager, tiny = "--eager" in sys.argv, "--tiny" in sys.argv
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True, state_dict_type="SHARDED_STATE_DICT")  # fmt: skip
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin, cpu=tiny)
    model = adapted(tiny, accelerator.device)
    if not eager:
        model = fxfuse.optimize(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    losses, times, norm = [], [], 0.0
    for _ in range(3 + LAST):
        ids = torch.randint(0, 512 if tiny else 128256, (2, 64 if tiny else 4096), generator=generator).to(accelerator.device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(accelerator.reduce(loss.detach().float(), "mean").item(), 5))  # waits for the device
        times.append((time.perf_counter() - start) * 1e3)
    if dist.get_rank() == 0:
        peak = 0 if tiny else torch.cuda.max_memory_allocated() / 2**30
        name = "eager" if eager else "fused"
        sys.stdout.write(f"{name} {statistics.median(times[-LAST:]):.1f} ms, peak {peak:.2f} GiB, norm {norm:.5f}, losses {losses}\n")
        if not eager:
            report = fxfuse.report(model)
            sys.stdout.write(f"linear_loss {report.count('linear_loss')}, errors {report.errors}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
