"""Settings that differ between a checkpoint and the run that resumes it, one test for each row of
the table in docs/reliability.md."""

import lightning as L
import pytest
import torch
from test_run_records import arguments
from tiny_fit import BALANCERS, fit, module

from ant_lightning import (
    AutoencoderModule,
    Checkpoints,
    ConfigError,
    DigitsData,
    LatentSpace,
    LinearScalarization,
    UncertaintyWeighting,
)
from ant_lightning.cli.main import main
from ant_lightning.models.state import CheckpointState

NONE = {"warmup_steps": 0}
schedulers = torch.optim.lr_scheduler


def adamw(**settings):
    return lambda groups: torch.optim.AdamW(groups, **{"lr": 0.01, **settings})


def cosine(length):
    return lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=length)


def step_lr(gamma):
    return lambda optimizer: schedulers.StepLR(optimizer, step_size=2, gamma=gamma)


def resumed(folder, first, second, *, method="vanilla", stop=4, end=6):
    """The optimizer's groups and the scheduler after a run that was stopped and changed."""
    fit(folder / "first", method=method, steps=stop, every=stop, model={**NONE, **first})
    path = folder / "first" / f"step={stop}.ckpt"
    more = {**NONE, **second}
    trainer = fit(folder / "second", method=method, steps=end, every=end, resume=path, model=more)
    return trainer.optimizers[0].param_groups, trainer.lr_scheduler_configs


@pytest.mark.parametrize(
    ("name", "setting"),
    [("lr", 0.0), ("weight_decay", 0.5), ("betas", (0.5, 0.6)), ("eps", 0.1)],
)
def test_settings_of_the_optimizer_are_applied_and_said(tmp_path, capsys, name, setting):
    groups, _ = resumed(tmp_path, {"optimizer": adamw()}, {"optimizer": adamw(**{name: setting})})
    assert groups[0][name] == setting
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "checkpoint has" in line]
    assert line.startswith(f"model.optimization.optimizer.{name}: ")


def test_a_learning_rate_of_zero_holds_the_weights(tmp_path):
    resumed(tmp_path, {}, {"optimizer": adamw(lr=0.0)})
    before, after = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "first" / "last.ckpt", tmp_path / "second" / "last.ckpt")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            {"lr_scheduler": cosine(10)},
            {"lr_scheduler": cosine(100)},
            "model.optimization.lr_scheduler.T_max: 100",
        ),
        (
            {"lr_scheduler": cosine(10)},
            {"lr_scheduler": step_lr(0.5)},
            "model.optimization.lr_scheduler: StepLR",
        ),
        (
            {"lr_scheduler": step_lr(0.5)},
            {"lr_scheduler": step_lr(0.1)},
            "model.optimization.lr_scheduler.gamma: 0.1",
        ),
        ({"lr_scheduler": cosine(10)}, {}, "model.optimization.lr_scheduler: None"),
        ({}, {"lr_scheduler": cosine(10)}, "model.optimization.lr_scheduler: CosineAnnealingLR"),
        ({}, {"warmup_steps": 20}, "model.optimization.warmup_steps: 20"),
        ({"warmup_steps": 20}, {}, "model.optimization.warmup_steps: 0"),
        ({"warmup_steps": 20}, {"warmup_steps": 10}, "model.optimization.warmup_steps: 10"),
        (
            {"lr_scheduler": cosine(10)},
            {"lr_scheduler": cosine(10), "optimizer": adamw(lr=0.001, weight_decay=0.0)},
            "model.optimization.optimizer.lr: 0.001",
        ),
    ],
)
def test_the_learning_rate_is_that_of_a_run_with_these_settings(
    tmp_path, capsys, first, second, said
):
    # The groups of a balancer with parameters of its own are those of the network and its own.
    method = "uw" if first else "vanilla"
    groups, configs = resumed(tmp_path, first, second, method=method)
    lines = [line for line in capsys.readouterr().out.splitlines() if "checkpoint has" in line]
    assert len(lines) == 1
    assert lines[0].startswith(said)
    whole = fit(tmp_path / "whole", method=method, steps=6, every=6, model={**NONE, **second})
    expected = whole.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected]
    states = [
        [c.scheduler.state_dict() for c in each] for each in (configs, whole.lr_scheduler_configs)
    ]
    assert [{k: v for k, v in s.items() if k != "lr_lambdas"} for s in states[0]] == [
        {k: v for k, v in s.items() if k != "lr_lambdas"} for s in states[1]
    ]


def test_a_setting_that_needs_another_state_is_refused(tmp_path):
    rule = r"optimization\.optimizer\.amsgrad: must stay False in a resumed run, .* found True"
    with pytest.raises(ConfigError, match=rule):
        resumed(tmp_path, {"optimizer": adamw()}, {"optimizer": adamw(amsgrad=True)})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_may_begin_and_end(tmp_path, momentum):
    def sgd(momentum):
        return lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=momentum)

    groups, _ = resumed(tmp_path, {"optimizer": sgd(0.9 - momentum)}, {"optimizer": sgd(momentum)})
    assert groups[0]["momentum"] == momentum


def test_a_scheduler_that_is_over_is_refused(tmp_path):
    def one_cycle(optimizer):
        return schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=3)

    with pytest.raises(ConfigError, match=r"optimization\.lr_scheduler: must last .* steps is 3"):
        resumed(tmp_path, {}, {"lr_scheduler": one_cycle})


def test_weights_of_linear_scalarization_are_those_of_the_settings(tmp_path, capsys, monkeypatch):
    fit(tmp_path / "first", method="linear", steps=2, every=2, model=NONE)
    monkeypatch.setitem(BALANCERS, "linear", lambda: LinearScalarization(3, weights=[5, 1, 1]))
    path = tmp_path / "first" / "last.ckpt"
    trainer = fit(tmp_path / "second", method="linear", steps=4, resume=path, model=NONE)
    assert trainer.lightning_module.balancer.weights.tolist() == [5, 1, 1]
    name = "model.tasks.balancer.weights"
    said = f"{name}: [5.0, 1.0, 1.0] from now on, the checkpoint has [0.2, 0.3, 0.5]"
    assert said in capsys.readouterr().out


def test_learning_rate_of_uncertainty_weighting(tmp_path, capsys, monkeypatch):
    fit(tmp_path / "first", method="uw", steps=2, every=2, model=NONE)
    monkeypatch.setitem(BALANCERS, "uw", lambda: UncertaintyWeighting(3, lr=0.5))
    path = tmp_path / "first" / "last.ckpt"
    trainer = fit(tmp_path / "second", method="uw", steps=4, resume=path, model=NONE)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.5]
    assert (
        "model.tasks.balancer.lr: 0.5 from now on, the checkpoint has 0.025"
        in capsys.readouterr().out
    )


def test_the_autoencoder_takes_its_settings_too(tmp_path, capsys):
    def run(lr, steps, resume=None):
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[Checkpoints(dirpath=tmp_path / "ckpt", save_last=True)],
        )
        model = AutoencoderModule(
            in_channels=1,
            widths=(8, 8),
            norm_num_groups=4,
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
        )
        trainer.fit(model, DigitsData(batch_size=20), ckpt_path=resume)
        return trainer.optimizers[0].param_groups[0]["lr"]

    run(0.001, 2)
    assert run(0.5, 3, resume=tmp_path / "ckpt" / "last.ckpt") == 0.5
    assert "model.optimizer.lr: 0.5 from now on" in capsys.readouterr().out


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"optimization\.optimizer: .* checkpoint, AdamW, found SGD"
    ):
        resumed(tmp_path, {}, {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)})


def test_an_old_checkpoint_says_what_it_knows(tmp_path, capsys):
    fit(tmp_path / "first", method="vanilla", steps=4, every=4, model=NONE)
    path = tmp_path / "first" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["ant_lightning"]["optimization"]
    torch.save(content, path)
    more = {**NONE, "optimizer": adamw(lr=0.5)}
    trainer = fit(tmp_path / "second", method="vanilla", steps=5, resume=path, model=more)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    lines = [line for line in capsys.readouterr().out.splitlines() if "checkpoint has" in line]
    assert {line.split(":")[0] for line in lines} == {
        "model.optimization.optimizer.lr",
        "model.optimization.optimizer.weight_decay",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--ema.decay=0.5", "--model.init_args.process.loss_weighting=MinSNR"],
            [
                "ema.decay: 0.5 from now on, the checkpoint has 0.999",
                "model.process.loss_weighting: MinSNR from now on",
            ],
        ),
        (
            [
                "--model.init_args.class_dropout=0.3",
                "--model.init_args.optimization.clip_grad_norm=0.5",
                "--data.init_args.batch_size=30",
                "--seed_everything=7",
            ],
            [
                "model.class_dropout: 0.3 from now on",
                "model.optimization.clip_grad_norm: 0.5 from now on",
                "data.batch_size: 30 from now on",
                "seed_everything: 7 from now on, the checkpoint has 0",
            ],
        ),
    ],
)
def test_other_settings_are_said_on_the_command_line(tmp_path, capsys, recwarn, options, said):
    assert main(arguments(tmp_path)) == 0
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    capsys.readouterr()
    assert main(arguments(tmp_path, *options, f"--ckpt_path={last}", steps=3)) == 0
    found = capsys.readouterr().out
    assert [words for words in said if words not in found] == []
    assert last.read_bytes() == before  # the changed run has a folder of its own
    assert (tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt").is_file()


def test_what_a_checkpoint_brings_is_said(tmp_path, capsys):
    pcgrad = [
        "--model.init_args.tasks.balancer=PCGrad",
        "--model.init_args.tasks.balancer.num_tasks=5",
    ]
    assert main(arguments(tmp_path, *pcgrad)) == 0
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    more = [*pcgrad, "--model.init_args.tasks.balancer.seed=3", f"--ckpt_path={last}"]
    assert main(arguments(tmp_path, *more, steps=3)) == 0
    said = "model.tasks.balancer.seed: 3 has no effect in a resumed run, the checkpoint has 0"
    assert said in capsys.readouterr().out


def test_another_first_stage_is_refused(tmp_path):
    fit(tmp_path, method="vanilla", steps=2, every=2, model=NONE)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["ant_lightning"]["first_stage"] = "another"
    space = LatentSpace(source="here", scale=1.0, shift=0.0, fingerprint="this", kind="kl")
    latent = module("vanilla")
    latent.latent_space = space
    rule = r"first_stage \(its fingerprint\): must be .* checkpoint, another, found this"
    with pytest.raises(ConfigError, match=rule):
        CheckpointState.of_checkpoint(content).check_fits(latent.checkpoint_state())
