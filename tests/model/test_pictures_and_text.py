"""Models of pictures and text: towers of blocks, joined by a module that decides by values. Gradients are eager's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model.builders import DECODER, VOCABULARY, step

PICTURE = VOCABULARY - 1  # the token in whose places a picture stands
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4)
TEXT = {**DECODER, "num_hidden_layers": 1}


def paligemma() -> nn.Module:
    """Its tower has a pooling head that nobody reads."""
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, projection_dim=64, vocab_size=VOCABULARY),
        text_config=GemmaConfig(**TEXT, head_dim=16), image_token_index=PICTURE, projection_dim=64, hidden_size=64,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config)


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=PICTURE, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def batch(pictured: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, PICTURE, (2, 24), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if pictured:
        ids[:, :16] = PICTURE
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return inputs


@pytest.mark.parametrize("make", [paligemma, llava])
def test_gradients_are_eagers(make: Callable[[], nn.Module]) -> None:
    """Batches with pictures and without; parameters that no loss depends on have no gradient, rather than one of zeros."""
    torch.manual_seed(0)
    model = make().train()
    torch.manual_seed(0)
    eager = make().train()
    fxfuse.optimize(model, validate="off", remainder="eager", strict=True)
    more = {"use_cache": False} | ({"token_type_ids": torch.ones(2, 24, dtype=torch.long)} if make is paligemma else {})
    for pictured in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = step(model, {**batch(pictured), **more})
        theirs = step(eager, {**batch(pictured), **more})
        assert ours.keys() == theirs.keys()
        size = sum(float(value.square().sum()) for value in theirs.values()) ** 0.5
        for name, want in theirs.items():
            assert (ours[name] - want).norm() <= 2e-5 * want.norm() + 1e-9 * size, name
    report = fxfuse.report(model)
    assert report.errors == []
    assert [graph.kind for graph in report.graphs].count("head") == 2  # the features of the pictures are an output, or are not
    report.assert_fused("linear_loss")
    report.assert_fused("rms_norm")
