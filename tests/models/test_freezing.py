"""Parts of a network that are frozen or thawed while it trains, with every engine and balancer."""

import lightning as L
import pytest
import tiny_digits
import torch
from kinds_of_parameters import REFUSED
from torch import nn

from ant_lightning import ConfigError, DigitsData, NashMTL, PCGrad, UncertaintyWeighting

BALANCERS = {
    "none": lambda: None,
    "uw": lambda: UncertaintyWeighting(3),
    "pcgrad": lambda: PCGrad(3),
    "nash": lambda: NashMTL(3, update_every=2),
}
METHODS = [
    *((name, "auto") for name in BALANCERS),
    *(("pcgrad", engine) for engine in ("loop", "one_pass", "low_memory")),
    *(("nash", engine) for engine in ("loop", "one_pass")),
]


class Switch(L.Callback):
    """Before step 2 freezes or thaws the blocks; may give them to the optimizer as others do."""

    def __init__(self, thaw, own_group=False):
        self.thaw, self.own_group = thaw, own_group
        self.moved = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        blocks = module.backbone.blocks
        if trainer.global_step == 2:
            blocks.requires_grad_(self.thaw)
            if self.own_group:
                trainer.optimizers[0].add_param_group({"params": list(blocks.parameters())})
        self.before = torch.cat([p.detach().flatten() for p in blocks.parameters()])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        after = torch.cat([p.detach().flatten() for p in module.backbone.blocks.parameters()])
        self.moved.append(not torch.equal(after, self.before))


def train(
    folder, switch, balancer=None, engine="auto", backbone=None, steps=5, resume=None, **settings
):
    model = tiny_digits.module(backbone, balancer=balancer, engine=engine, **settings)
    model.backbone.blocks.requires_grad_(not switch.thaw)
    run = tiny_digits.trainer(folder, switch, steps=steps, limit_val_batches=0)
    run.fit(model, datamodule=DigitsData(batch_size=12), ckpt_path=resume)
    return model


@pytest.mark.parametrize("thaw", [True, False], ids=["thaw", "freeze"])
@pytest.mark.parametrize(("balancer", "engine"), METHODS)
def test_blocks_move_exactly_while_they_are_trained(tmp_path, balancer, engine, thaw):
    switch = Switch(thaw)
    model = train(tmp_path, switch, BALANCERS[balancer](), engine, warmup_steps=3)
    (rate,) = {group["lr"] for group in model.optimizers().param_groups if len(group["params"]) > 1}
    assert rate == 1e-4  # of thawed parameters too
    assert switch.moved == [not thaw, not thaw, thaw, thaw, thaw]
    trained = [p.grad for p in model.backbone.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm(trained)  # after clipping
    assert 0 < norm <= model.optimization.clip_grad_norm * (1 + 1e-5)
    assert all(p.grad is None for p in model.backbone.parameters() if not p.requires_grad)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_thawed_parameters_may_have_a_group_of_their_own(tmp_path, balancer):
    switch = Switch(thaw=True, own_group=True)
    model = train(tmp_path, switch, BALANCERS[balancer]())
    assert switch.moved == [False, False, True, True, True]
    held = [id(p) for group in model.optimizers().param_groups for p in group["params"]]
    assert len(held) == len(set(held))


def test_a_group_of_their_own_keeps_its_learning_rate_under_a_scheduler(tmp_path):
    switch = Switch(thaw=True, own_group=True)
    model = train(tmp_path, switch, UncertaintyWeighting(3), warmup_steps=10)
    assert switch.moved == [False, False, True, True, True]
    rates = [group["lr"] for group in model.optimizers().param_groups]
    assert rates == [pytest.approx(0.6e-4), 0.025, 1e-4]


@pytest.mark.parametrize("thaw", [True, False], ids=["thaw", "freeze"])
def test_a_run_resumed_after_the_switch_equals_one_never_stopped(tmp_path, thaw):
    def weights(model):
        return torch.cat([p.detach().flatten() for p in model.backbone.parameters()])

    whole = train(tmp_path, Switch(thaw), UncertaintyWeighting(3), warmup_steps=3)
    part = train(tmp_path, Switch(thaw), UncertaintyWeighting(3), warmup_steps=3, steps=4)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    switch = Switch(thaw)
    settings = {"steps": 5, "resume": tmp_path / "part.ckpt", "warmup_steps": 3}
    resumed = train(tmp_path, switch, UncertaintyWeighting(3), **settings)
    assert switch.moved == [thaw]
    assert torch.equal(weights(resumed), weights(whole))
    # Again, from a checkpoint of the resumed run.
    resumed.trainer.save_checkpoint(tmp_path / "again.ckpt")
    settings |= {"steps": 6, "resume": tmp_path / "again.ckpt"}
    again = train(tmp_path, Switch(thaw), UncertaintyWeighting(3), **settings)
    longer = train(tmp_path, Switch(thaw), UncertaintyWeighting(3), warmup_steps=3, steps=6)
    assert torch.equal(weights(again), weights(longer))


def test_a_run_resumed_with_other_parts_frozen_is_refused(tmp_path):
    part = train(tmp_path, Switch(thaw=True), steps=4)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    other = tiny_digits.TinyDiT()
    other.final_layer.requires_grad_(False)
    rule = r"backbone: a resumed run must .*'final_layer\."
    with pytest.raises(ConfigError, match=rule) as error:
        train(tmp_path, Switch(thaw=True), backbone=other, resume=tmp_path / "part.ckpt")
    assert "found 4 that differ" in str(error.value)


class WithMore(tiny_digits.TinyDiT):
    def __init__(self, more):
        super().__init__()
        self.more = more


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("kind", ["expanded", "complex"])
def test_parameters_that_cannot_be_trained_are_refused_before_the_first_step(
    tmp_path, balancer, kind
):
    make, words = REFUSED[kind]
    switch = Switch(thaw=False)
    with pytest.raises(ConfigError) as error:
        train(tmp_path, switch, BALANCERS[balancer](), backbone=WithMore(make().scale))
    assert words in str(error.value)
    assert switch.moved == []


def test_clipping_keeps_the_direction_of_mixed_dtypes(tmp_path):
    class Doubling(tiny_digits.TinyDiT):
        """The first parameter is bfloat16, which has three digits."""

        def __init__(self):
            super().__init__()
            first = {"first": nn.Parameter(torch.ones((), dtype=torch.bfloat16))}
            self._parameters = {**first, **self._parameters}

        def forward(self, x, timesteps, labels=None):
            return super().forward(x.float(), timesteps, labels) * self.first.float()

    model = tiny_digits.module(Doubling(), clip_grad_norm=1e-3, balancer=PCGrad(3), engine="loop")
    run = tiny_digits.trainer(tmp_path, steps=1, limit_val_batches=0)
    run.fit(model, datamodule=DigitsData(batch_size=12))
    grads = [p.grad.double() for p in model.backbone.parameters() if p.grad is not None]
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    others = torch.nn.utils.get_total_norm(grads[1:])
    # Clipped to 1e-3 in all, of which the first has its share, rounded twice to 2^-9 of it.
    share = grads[0].norm()
    assert abs((others**2 + share**2).sqrt() / 1e-3 - 1) < 2**-8 * (share / 1e-3) ** 2 + 1e-5
