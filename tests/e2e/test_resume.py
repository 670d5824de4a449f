"""A run that was stopped and resumed equals the run that was not, bit for bit on the CPU."""

from pathlib import Path

import pytest
import torch

from ant_lightning.cli import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def arguments(folder, method, steps):
    files = [CONFIGS / "digits" / "dit.yaml", CONFIGS / "balancer" / f"{method}.yaml"]
    args = ["fit", *[x for file in files for x in ("--config", str(file))]]
    return [
        *args,
        f"--trainer.max_steps={steps}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.init_args.batch_size=300",
        "--model.init_args.backbone.init_args.hidden_size=16",
        "--model.init_args.backbone.init_args.depth=1",
        "--model.init_args.warmup_steps=4",
        *(["--model.init_args.balancer.init_args.update_every=4"] if method == "nash" else []),
    ]


def everything(folder):
    state = torch.load(next(folder.rglob("last.ckpt")), weights_only=True)
    callbacks = state["callbacks"]
    return {
        "weights": state["state_dict"],
        "averages": callbacks["EMA"]["averages"],
        "optimizer": state["optimizer_states"],
        "schedule": state["lr_schedulers"],
        "step": state["global_step"],
        "loader": state["loops"]["fit_loop"]["state_dict"]["combined_loader"],
    }


def flat(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")
    else:
        yield path, value


@pytest.mark.parametrize("method", ["vanilla", "uw", "pcgrad", "nash"])
def test_stopped_in_the_middle_of_the_second_epoch(tmp_path, method):
    run(arguments(tmp_path / "whole", method, 9))
    run(arguments(tmp_path / "parts", method, 6))
    last = next((tmp_path / "parts").rglob("last.ckpt"))
    run([*arguments(tmp_path / "resumed", method, 9), f"--ckpt_path={last}"])
    whole = dict(flat(everything(tmp_path / "whole")))
    resumed = dict(flat(everything(tmp_path / "resumed")))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed[name]), name
        else:
            assert value == resumed[name], name
