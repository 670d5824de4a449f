"""A run that breaks keeps the checkpoint from before it broke."""

from pathlib import Path

import lightning as L
import pytest
import torch
from grouped import grouped

from ant_lightning import (
    EMA,
    Checkpoints,
    CosineSchedule,
    DigitsData,
    DiT,
    DiTModule,
    PCGrad,
    SNRClustering,
)
from ant_lightning.errors import NonFiniteError


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


class SaveAfterTwoSkips(L.Callback):
    """What a signal does that comes then."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.num_skipped_steps == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "skipping.ckpt")

    def on_exception(self, trainer, pl_module, exception):
        (Path(trainer.default_root_dir) / "skipped").write_text(str(pl_module.num_skipped_steps))


def run(folder, *, for_good, steps=8, resume=None):
    torch.manual_seed(0)
    size = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8}
    module = DiTModule(
        DiT(**size, depth=1, num_heads=1, num_classes=10),
        **grouped(
            schedule=CosineSchedule(100),
            clustering=SNRClustering(3),
            balancer=PCGrad(3),
            max_skipped_steps=4,
            seed=0,
        ),
    )
    folder.mkdir(exist_ok=True)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[
            EMA(decay=0.9),
            Breaks(for_good=for_good),
            SaveAfterTwoSkips(),
            Checkpoints(dirpath=folder, every_n_train_steps=2, save_last=True),
        ],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(module, DigitsData(batch_size=30), ckpt_path=resume)
    return module, trainer


def test_the_last_good_checkpoint_is_kept(tmp_path):
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        run(tmp_path, for_good=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_skips_in_a_row_are_counted_on_when_a_run_is_resumed(tmp_path):
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        run(tmp_path, for_good=True)
    saved = torch.load(tmp_path / "skipping.ckpt", weights_only=True)["ant_lightning"]
    assert saved["num_skipped_in_a_row"] == saved["num_skipped_steps"] == 2
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        run(tmp_path / "resumed", for_good=True, resume=tmp_path / "skipping.ckpt")
    assert (tmp_path / "resumed" / "skipped").read_text() == "4"


def test_one_bad_batch_is_skipped_counted_and_survived(tmp_path):
    module, trainer = run(tmp_path, for_good=False)
    assert module.num_skipped_steps == 1
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in module.backbone.parameters())


def test_the_end_of_training_is_saved_wherever_it_is(tmp_path):
    run(tmp_path, for_good=False, steps=7)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
