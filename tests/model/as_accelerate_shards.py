"""accelerate's own preparation of a model for FSDP2, run on a CPU: its plugin says which modules become units."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def as_accelerate_shards(model: nn.Module, precision: torch.dtype | None = None, **options: Any) -> nn.Module:
    """``model`` with its layers, its embedding, and its last norm with the head as units, as ``accelerator.prepare`` leaves it.

    precision: of what units compute in. options: of the plugin. (An Accelerator itself takes FSDP on GPUs only.)
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        **{"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"], **options},
    )  # fmt: skip
    if precision is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=precision, output_dtype=precision)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=mesh, device=torch.device("cpu"), is_main_process=True,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]), mixed_precision="no" if precision is None else "bf16",
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)
