"""A run that breaks keeps the checkpoint from before it broke."""

import lightning as L
import pytest
import torch

from ant_lightning.backbones import DiT
from ant_lightning.balancing import PCGrad
from ant_lightning.callbacks import EMA, Checkpoints
from ant_lightning.clustering import SNRClustering
from ant_lightning.data import DigitsData
from ant_lightning.diffusion import CosineSchedule
from ant_lightning.errors import NonFiniteError
from ant_lightning.modules import DiTModule


class Breaks(L.Callback):
    """Puts a NaN into the weights at step 5, or into one batch only."""

    def __init__(self, *, for_good):
        self.for_good = for_good

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= 5 and pl_module.num_skipped_steps == 0:
            if self.for_good:
                torch.nn.init.constant_(next(pl_module.backbone.parameters()), torch.nan)
            else:
                batch.images[0, 0, 0, 0] = torch.nan


def run(folder, *, for_good, steps=8):
    torch.manual_seed(0)
    size = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8}
    module = DiTModule(
        DiT(**size, depth=1, num_heads=1, num_classes=10),
        schedule=CosineSchedule(100),
        clustering=SNRClustering(3),
        balancer=PCGrad(3),
        max_skipped_steps=4,
        seed=0,
    )
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[
            EMA(decay=0.9),
            Breaks(for_good=for_good),
            Checkpoints(dirpath=folder, every_n_train_steps=2, save_last=True),
        ],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DigitsData(batch_size=30))
    return module, trainer


def test_the_last_good_checkpoint_is_kept(tmp_path):
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        run(tmp_path, for_good=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_one_bad_batch_is_skipped_counted_and_survived(tmp_path):
    module, trainer = run(tmp_path, for_good=False)
    assert module.num_skipped_steps == 1
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in module.backbone.parameters())


def test_the_end_of_training_is_saved_wherever_it_is(tmp_path):
    run(tmp_path, for_good=False, steps=7)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
