"""A LightningModule that holds a fused model: Lightning's precision, accumulation and clipping; checkpoints continue bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model import builders as build
from tests.model.trainer_twins import Texts, assert_runs_fused, distance, fresh_dynamo, padded

lightning = pytest.importorskip("lightning")
__all__ = ["fresh_dynamo"]  # (a fixture)

LENGTHS = [12, 5, 9, 16]
RULES = ("rms_norm", "gated_activation", "lora_linear", "linear_loss")


class Tuning(lightning.LightningModule):
    """As a user writes it; ``fused`` is the added line."""

    def __init__(self, fused: bool, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or build.with_lora(build.llama())
        if fused:
            fxfuse.optimize(self.model, validate="off", remainder="eager", strict=True)
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)


def fitted(folder: Path, fused: bool, resume: Path | None = None, **options: Any) -> Tuning:
    """Trained for two epochs of two batches, a checkpoint written behind each."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    lightning.seed_everything(0, verbose=False)
    module = Tuning(fused)
    data = torch.utils.data.DataLoader(Texts(LENGTHS), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    settings = dict(max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=[saving], **{**settings, **options})
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.mark.parametrize("accumulated", [1, 2])
def test_float32(accumulated: int, tmp_path: Path) -> None:
    options = dict(accumulate_grad_batches=accumulated, gradient_clip_val=1.0)
    ours, theirs = (fitted(tmp_path / str(fused), fused, precision="32-true", **options) for fused in (True, False))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert len(ours.gradients) == len(theirs.gradients) == 4 // accumulated
    assert distance(ours.gradients[0], theirs.gradients[0]) <= 2e-5
    assert_runs_fused(fxfuse.report(ours.model), RULES)


def test_bfloat16_is_as_near_to_float32_as_eager_is(tmp_path: Path) -> None:
    ours, theirs = (fitted(tmp_path / str(fused), fused, precision="bf16-mixed") for fused in (True, False))
    exact = fitted(tmp_path / "exact", False, precision="32-true")
    assert distance(ours.gradients[0], exact.gradients[0]) <= 2 * distance(theirs.gradients[0], exact.gradients[0])
    assert ours.losses == pytest.approx(exact.losses, rel=2e-2)
    assert_runs_fused(fxfuse.report(ours.model), RULES)



def test_resumed_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """And the checkpoint is that of an unfused module, key for key."""
    whole = fitted(tmp_path / "whole", True)
    resumed = fitted(tmp_path / "resumed", True, resume=tmp_path / "whole" / "epoch=0.ckpt")
    assert resumed.losses == whole.losses[2:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    saved = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=False)["state_dict"]
    plain = Tuning(False)
    plain.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in plain.state_dict().items())
