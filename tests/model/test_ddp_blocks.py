"""Inside a DDP forward blocks are captured whole: Dynamo would cut them at the bounds of DDP's buckets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse._torch import dynamo_config
from tests.model import builders as build
from tests.model.builders import tokens


@pytest.mark.usefixtures("group")
def test_a_block_larger_than_a_bucket_is_one_graph() -> None:
    wide = dict(hidden_size=256, intermediate_size=1024)  # 3.8 MB a layer
    model, eager = fxfuse.optimize(build.llama(1, **wide), validate="off", remainder="eager", strict=True), build.llama(1, **wide)
    before = dynamo_config.optimize_ddp
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    loss, want = parallel(**tokens())["loss"], eager(**tokens())["loss"]
    loss.backward()
    want.backward()
    assert dynamo_config.optimize_ddp == before
    report = fxfuse.report(model)
    report.assert_fused("gated_activation", 1)
    report.assert_fused("shared_input_linears", 2)
    assert [graph.kind for graph in report.graphs].count("block") == 1
    assert abs(loss - want) <= 2e-5 * want
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 2e-5 * theirs.grad.norm(), name


@pytest.mark.usefixtures("group")
def test_the_users_setting_comes_back_when_a_call_fails() -> None:
    model = fxfuse.optimize(build.llama(1), validate="off", remainder="eager")
    parallel = nn.parallel.DistributedDataParallel(model)
    before = dynamo_config.optimize_ddp
    with pytest.raises((RuntimeError, IndexError, TypeError)):
        parallel(input_ids=torch.full((1, 4), 10_000), labels=torch.full((1, 4), 10_000))
    assert dynamo_config.optimize_ddp == before
