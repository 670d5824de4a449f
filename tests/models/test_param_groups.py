"""Parameter groups of the backbone: settings by name, Muon beside AdamW, stopped and resumed."""

import copy

import lightning as L
import pytest
import torch
from tiny_fit import assert_same, fit, module
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ant_lightning import ConfigError, MuonAdamW, MuonGroups, NamedGroups
from ant_lightning.cli.main import main

NO_DECAY = {"*.bias": {"weight_decay": 0.0}, "blocks.*": {"lr": 0.002}}


def decayed(groups):
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def muon(groups):
    return MuonAdamW(groups, lr=0.01, weight_decay=0.1, momentum=0.9)


CASES = {
    "named": {"optimizer": decayed, "param_groups": NamedGroups(NO_DECAY)},
    "muon": {"optimizer": muon, "param_groups": MuonGroups()},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, name):
    fit(tmp_path / "whole", method="uw", steps=6, every=3, model=CASES[name])
    path = tmp_path / "whole" / "step=3.ckpt"
    fit(tmp_path / "rest", method="uw", steps=6, every=3, resume=path, model=CASES[name])
    assert_same(tmp_path / "whole" / "step=6.ckpt", tmp_path / "rest" / "step=6.ckpt")


def test_groups_have_their_settings_and_one_schedule():
    settings = {**CASES["named"], "warmup_steps": 4}
    model = module("uw", **settings)
    (optimizer,), (scheduler,) = model.configure_optimizers()
    names = {id(p): name for name, p in model.backbone.named_parameters()}
    rest, bias, blocks, _ = optimizer.param_groups
    assert [names[id(p)] for p in bias["params"]] == [
        name for name in names.values() if name.endswith(".bias")
    ]
    assert all(names[id(p)].startswith("blocks.") for p in blocks["params"])
    every = [p for group in (rest, bias, blocks) for p in group["params"]]
    assert sorted(map(id, every)) == sorted(
        id(p) for p in model.backbone.parameters() if p.requires_grad
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0.1, 0]
    for number in range(1, 6):
        scale = min(1, number / 4)
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == pytest.approx([0.01 * scale, 0.01 * scale, 0.002 * scale, 0.025])
        optimizer.step()
        model.optimizer_factory.step(scheduler)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 2, 3), nn.Linear(4, 2), nn.Embedding(5, 3))


def steps(network, optimizers, num, first=0):
    for number in range(first, first + num):
        torch.manual_seed(number)
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def parted(network):
    return MuonGroups(adamw=["3.*"])(list(network.named_parameters()))


def test_muon_and_adamw_are_torchs_and_their_state_is_one():
    network, other = layers(), layers()
    matrices, rest = (group["params"] for group in parted(other))
    assert [tuple(p.shape) for p in matrices] == [(4, 3), (2, 4)]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    expected = steps(
        other,
        [
            torch.optim.Muon(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw", **settings),
            torch.optim.AdamW(rest, **settings),
        ],
        5,
    )
    whole = layers()
    assert torch.equal(steps(whole, [muon(parted(whole))], 5), expected)
    optimizer = muon(parted(network))
    steps(network, [optimizer], 3)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = muon(parted(network))
    optimizer.load_state_dict(state)
    found = steps(network, [optimizer], 2, first=3)
    assert torch.equal(found, expected)


def test_a_scheduler_and_a_copy_move_both_parts():
    network = layers()
    optimizer = muon(parted(network))
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    steps(network, [optimizer], 1)
    schedule.step()
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert [part.param_groups[0]["lr"] for part in each.parts] == [0.005, 0.005]
        assert all(part.state is each.state for part in each.parts)


class Thaw(L.Callback):
    """Trains the last layer from step 2 on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            pl_module.backbone.final_layer.requires_grad_(True)


def frozen(folder, steps, resume=None):
    torch.manual_seed(0)
    settings = {"optimizer": decayed, "param_groups": NamedGroups({"final_layer.*": {"lr": 0.5}})}

    class Freeze(L.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.backbone.final_layer.requires_grad_(False)

    callbacks = [Freeze(), Thaw()]
    run = fit(folder, steps=steps, every=1, resume=resume, callbacks=callbacks, model=settings)
    return run, run.lightning_module


@pytest.mark.filterwarnings("ignore:losses. must depend on the parameters")  # frozen at zero
def test_thawed_parameters_join_their_group(tmp_path):
    run, model = frozen(tmp_path / "whole", 5)
    rest, last = run.optimizers[0].param_groups
    own = list(model.backbone.final_layer.parameters())
    assert [id(p) for p in last["params"]] == [id(p) for p in own]
    assert not {id(p) for p in rest["params"]} & {id(p) for p in own}
    assert all(run.optimizers[0].state[p] for p in own)
    frozen(tmp_path / "rest", 5, tmp_path / "whole" / "step=4.ckpt")
    assert_same(tmp_path / "whole" / "step=5.ckpt", tmp_path / "rest" / "step=5.ckpt")


def test_settings_may_change_on_a_resume_and_groups_may_not(tmp_path, capsys):
    cosine = {"lr_scheduler": lambda o: CosineAnnealingLR(o, 9), "warmup_steps": 0}
    fit(tmp_path, method="uw", steps=2, every=2, model={**CASES["named"], **cosine})
    path = tmp_path / "step=2.ckpt"
    other = {"*.bias": {"weight_decay": 0.0}, "blocks.*": {"lr": 0.004}}
    settings = {**CASES["named"], **cosine, "param_groups": NamedGroups(other)}
    run = fit(tmp_path / "lr", method="uw", steps=3, resume=path, model=settings)
    assert run.optimizers[0].param_groups[2]["initial_lr"] == 0.004
    said = [line for line in capsys.readouterr().out.splitlines() if "the checkpoint has" in line]
    assert said == [
        "model.optimization.param_groups.2.lr: 0.004 from now on, the checkpoint has 0.002"
    ]
    for groups in (
        NamedGroups({"*.weight": {}, "blocks.*": {}}),
        NamedGroups({"*.bias": {}}),
        None,
    ):
        with pytest.raises(ConfigError, match="param_groups: must put the same parameters"):
            fit(
                tmp_path / "no",
                method="uw",
                steps=3,
                resume=path,
                model={**settings, "param_groups": groups},
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"param_groups": lambda named: 3}, "must give a list of dicts with the key 'params'"),
        ({"param_groups": lambda named: [{"lr": 1}]}, "list of dicts with the key 'params'"),
        ({"param_groups": lambda named: [{"params": []}]}, "in one group, found 'pos_embed|in 0"),
        (
            {"param_groups": lambda named: 2 * [{"params": [p for _, p in named]}]},
            "each parameter must be in one group, found .* in 2",
        ),
        (
            {"param_groups": lambda n: [{"params": [*(p for _, p in n), torch.zeros(1)]}]},
            "parameters of the network only, found 1 others",
        ),
        ({"param_groups": NamedGroups({"head.*": {}})}, "each pattern must fit a name, found 'hea"),
        ({"optimizer": muon}, r"one has muon: True, found none; set param_groups to"),
        (
            {
                "optimizer": muon,
                "param_groups": lambda n: [{"params": [p for _, p in n], "muon": 1}],
            },
            "Muon only supports 2D parameters",
        ),
        (
            {"optimizer": decayed, "param_groups": MuonGroups()},
            "param_groups: must have settings of AdamW, found muon of MuonGroups",
        ),
        (
            {"optimizer": decayed, "param_groups": NamedGroups({"*.bias": {"weight_deacy": 0.0}})},
            "param_groups: must have settings of AdamW, found weight_deacy of NamedGroups",
        ),
    ],
)
def test_bad_groups_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        module(**settings).configure_optimizers()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("optimization.")


def test_no_pattern_is_refused():
    with pytest.raises(ConfigError, match="settings: must have at least one pattern, found none"):
        NamedGroups({})


def groups_of(folder, *args):
    """The groups in the last checkpoint of a run of two steps."""
    main(
        [
            *("fit", "--config", "digits/dit", "--config", "balancer/uw", *args),
            *("--trainer.max_steps", "2", "--trainer.logger", "false", "--data.batch_size", "10"),
            *("--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"),
            *("--trainer.default_root_dir", str(folder), "--trainer.callbacks", "[]"),
        ]
    )
    (path,) = folder.rglob("last.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["ant_lightning"]["optimizer"] == (
        "MuonAdamW" if "optimizer/muon" in args else "AdamW"
    )
    return state["optimizer_states"][0]["param_groups"]


def test_from_the_command_line(tmp_path):
    matrices, rest, balancer = groups_of(tmp_path / "muon", "--config", "optimizer/muon")
    assert matrices["muon"] is True
    assert min(len(matrices["params"]), len(rest["params"])) > 3
    assert balancer["lr"] == 0.025
    path = "--model.optimization.param_groups"
    settings = "{'*.bias': {weight_decay: 0.1}}"
    groups = f"{{class_path: ant_lightning.NamedGroups, init_args: {{settings: {settings}}}}}"
    found = groups_of(tmp_path / "named", path, groups)
    assert [group["weight_decay"] for group in found] == [0.0, 0.1, 0.0]
