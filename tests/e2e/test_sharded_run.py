"""`--trainer.strategy fsdp2` on the command line; a run with shards is used like any other."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from ant_lightning import DDIM, load_run
from ant_lightning.cli.main import main

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch >= 2.14"
)


def fit(folder, *arguments):
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.callbacks": "[]",
        "trainer.logger.save_dir": folder,
        "data.batch_size": 8,
        "model.backbone.init_args.hidden_size": 16,
        "model.backbone.init_args.depth": 1,
        "model.backbone.init_args.num_heads": 2,
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    main(["fit", "--config", "configs/digits/dit.yaml", *given, *arguments])


def test_a_sharded_run_is_loaded_and_goes_on_without_shards(tmp_path, capsys):
    try:
        fit(tmp_path, "--trainer.strategy=fsdp2", "--trainer.max_steps=2")
    finally:  # other tests must not see the process group that the strategy made
        torch.distributed.destroy_process_group()
    run = tmp_path / "digits_dit" / "version_0"
    assert len(list((run / "checkpoints").glob("last.ckpt.shards.*"))) == 1
    module = load_run(run)
    assert module.trained_steps == 2
    assert module.sample(2, sampler=DDIM(num_steps=2)).isfinite().all()
    capsys.readouterr()
    fit(tmp_path, "--ckpt_path=last", "--trainer.max_steps=3")
    assert "fit: DiT with" in capsys.readouterr().out
    assert load_run(run).trained_steps == 3
    # One file has replaced last.ckpt and its shards.
    assert not list((run / "checkpoints").glob("last.ckpt.shards.*"))
