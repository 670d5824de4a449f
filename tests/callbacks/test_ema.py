"""The averages follow every method's steps, and never get in the way of training."""

import copy

import lightning as L
import pytest
import torch
from tiny_digits import TinyDiT, module, trainer

from ant_lightning import (
    EMA,
    ConfigError,
    DigitsData,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    averaged_weights,
)


class Recorder(L.Callback):
    """Weights after each step, and what evaluation saw."""

    def __init__(self):
        self.weights = []
        self.evaluated = None

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(copy.deepcopy(dict(pl_module.backbone.named_parameters())))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.evaluated = copy.deepcopy(dict(pl_module.backbone.named_parameters()))


BALANCERS = [
    None,
    LinearScalarization(3),
    UncertaintyWeighting(3),
    PCGrad(3),
    NashMTL(3, update_every=2),
]


@pytest.mark.parametrize("balancer", BALANCERS, ids=lambda b: type(b).__name__)
def test_defect_2_the_average_follows_every_method(tmp_path, balancer):
    model, ema, recorder = module(balancer=balancer), EMA(decay=0.6, warmup=False), Recorder()
    average = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    trainer(tmp_path, ema, recorder, limit_val_batches=0).fit(model, DigitsData(batch_size=30))
    assert len(recorder.weights) == 4
    for weights in recorder.weights:
        average = {n: 0.6 * average[n] + 0.4 * weights[n] for n in average}
    found = ema.state_dict()["averages"]
    for name in found:
        torch.testing.assert_close(found[name], average[name].detach(), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(found[n], recorder.weights[-1][n]) for n in found)


def test_evaluation_sees_the_averages_and_training_gets_its_weights_back(tmp_path):
    model, ema, recorder = module(), EMA(decay=0.9), Recorder()
    trainer(tmp_path, ema, recorder, val_check_interval=4, check_val_every_n_epoch=None).fit(
        model, DigitsData(batch_size=30)
    )
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(recorder.evaluated[name], average)
        assert torch.equal(
            dict(model.backbone.named_parameters())[name], recorder.weights[-1][name]
        )


def test_an_exception_in_validation_puts_the_live_weights_back(tmp_path):
    class Fails(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise KeyError("broken metric")

    model, ema, recorder = module(), EMA(decay=0.9), Recorder()
    run = trainer(
        tmp_path, ema, recorder, Fails(), val_check_interval=4, check_val_every_n_epoch=None
    )
    with pytest.raises(KeyError):
        run.fit(model, DigitsData(batch_size=30))
    for name, weight in model.backbone.named_parameters():
        assert torch.equal(weight, recorder.weights[-1][name])


def test_a_checkpoint_written_during_validation_holds_the_live_weights(tmp_path):
    class Saves(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "mid.ckpt")

    model, recorder = module(), Recorder()
    run = trainer(
        tmp_path,
        EMA(decay=0.5),
        recorder,
        Saves(),
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    run.fit(model, DigitsData(batch_size=30))
    state = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    for name, weight in recorder.weights[-1].items():
        assert torch.equal(state["state_dict"][f"backbone.{name}"], weight)


def test_skipped_steps_do_not_move_the_average(tmp_path):
    model, ema = module(balancer=PCGrad(3)), EMA(decay=0.5)
    torch.nn.init.constant_(next(model.backbone.parameters()), float("nan"))
    before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    run = trainer(tmp_path, ema, limit_val_batches=0, max_epochs=1)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        run.fit(model, DigitsData(batch_size=30))
    assert ema.num_updates == 0
    for name, average in ema.state_dict()["averages"].items():
        torch.testing.assert_close(average, before[name], equal_nan=True)


def test_warm_up_follows_the_formula():
    ema = EMA(decay=0.999)
    model = module()
    fake = type("Trainer", (), {"global_step": 0})()
    ema.on_train_start(fake, model)
    weights = dict(model.backbone.named_parameters())
    name = next(n for n, p in weights.items() if p.requires_grad)
    expected = weights[name].detach().clone()
    for n in range(1, 4):
        fake.global_step = n
        with torch.no_grad():
            weights[name].add_(1.0)
        ema.on_train_batch_end(fake, model)
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * weights[name].detach()
    torch.testing.assert_close(ema.state_dict()["averages"][name], expected)


def test_context_manager_for_one_s_own_callbacks(tmp_path):
    model, ema = module(), EMA(decay=0.5)
    run = trainer(tmp_path, ema, limit_val_batches=0)
    run.fit(model, DigitsData(batch_size=30))
    name, weight = next((n, p) for n, p in model.backbone.named_parameters() if p.requires_grad)
    live = weight.detach().clone()
    with averaged_weights(run, model):
        assert torch.equal(weight, ema.state_dict()["averages"][name])
    assert torch.equal(weight, live)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay(decay):
    with pytest.raises(ConfigError, match=f"decay: must be .*{decay}"):
        EMA(decay=decay)


def shaken(model):
    """Other weights, set behind everybody's back as a loader of official checkpoints may."""
    generator = torch.Generator().manual_seed(5)
    for p in model.backbone.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return weights_of(model)


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.backbone.named_parameters() if p.requires_grad}


def evaluated(tmp_path, model, *callbacks, **settings):
    """What the model is validated with."""
    recorder = Recorder()
    run = trainer(tmp_path, *callbacks, recorder, limit_val_batches=1)
    run.validate(model, DigitsData(batch_size=30), verbose=False, **settings)
    return {n: recorder.evaluated[n].detach() for n in weights_of(model)}


def trained(tmp_path, model, *callbacks, **settings):
    run = trainer(tmp_path, *callbacks, limit_val_batches=0, **settings)
    run.fit(model, DigitsData(batch_size=30))
    return run


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def follows(average, start, weights, decay):
    """Whether averages are those of one step from `start`."""
    for name, value in average.items():
        expected = decay * start[name] + (1 - decay) * weights[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("before", ["fit", "validate", "fit, same object"])
def test_a_training_averages_from_its_own_weights(tmp_path, before):
    ema, model = EMA(decay=0.6, warmup=False), module()
    if before == "validate":
        evaluated(tmp_path, model, ema)
    else:
        trained(tmp_path, model, ema)
    model = model if before != "fit" else module()
    start = shaken(model)
    trained(tmp_path, model, ema, steps=1)
    assert ema.num_updates == 1
    follows(ema.state_dict()["averages"], start, weights_of(model), 0.6)


def test_an_evaluation_has_the_averages_of_its_weights_or_none(tmp_path):
    ema, model = EMA(decay=0.6, warmup=False), module()
    assert_equal(evaluated(tmp_path, model, ema), weights_of(model))
    live = shaken(model)
    assert_equal(evaluated(tmp_path, model, ema), live)
    run = trained(tmp_path, model, ema)
    run.save_checkpoint(tmp_path / "with.ckpt")
    averages, live = copy.deepcopy(ema.state_dict()["averages"]), weights_of(model)
    assert_equal(evaluated(tmp_path, model, ema), averages)
    assert_equal(evaluated(tmp_path, model, ema), averages)
    # Training goes on from these weights: so do their averages.
    trained(tmp_path, model, ema, steps=1)
    assert ema.num_updates == 5
    follows(ema.state_dict()["averages"], averages, weights_of(model), 0.6)
    # A checkpoint brings both, into any module and any object; one without averages brings none.
    other = module(TinyDiT(seed=3))
    assert_equal(evaluated(tmp_path, other, ema, ckpt_path=tmp_path / "with.ckpt"), averages)
    assert_equal(weights_of(other), live)
    bare = module()
    trained(tmp_path, bare).save_checkpoint(tmp_path / "without.ckpt")
    found = evaluated(tmp_path, module(), ema, ckpt_path=tmp_path / "without.ckpt")
    assert_equal(found, weights_of(bare))
    # By hand, after a training: the weights that were set are those that are meant.
    trained(tmp_path, bare, ema)
    live = shaken(bare)
    assert_equal(evaluated(tmp_path, bare, ema), live)


def test_an_interrupted_training_keeps_its_averages(tmp_path):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                raise KeyError("stopped")

    ema, model = EMA(decay=0.9), module()
    with pytest.raises(KeyError):
        trained(tmp_path, model, ema, Stops())
    assert ema.num_updates == 3
    assert_equal(evaluated(tmp_path, model, ema), ema.state_dict()["averages"])


class Switch(L.Callback):
    """Freezes or unfreezes the blocks before the step that follows step 2."""

    def __init__(self, *, train):
        self.train = train

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            blocks = list(pl_module.backbone.blocks.parameters())
            for p in blocks:
                p.requires_grad_(self.train)
            if self.train:
                trainer.optimizers[0].add_param_group({"params": blocks})


@pytest.mark.parametrize("first", ["the average", "the switch"])
@pytest.mark.parametrize("train", [True, False], ids=["thawed", "frozen"])
def test_averages_follow_parameters_that_begin_or_cease_to_train(tmp_path, train, first):
    model, ema, recorder = module(), EMA(decay=0.6, warmup=False), Recorder()
    model.backbone.blocks.requires_grad_(not train)
    expected = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    callbacks = [ema, Switch(train=train)]
    if first == "the switch":
        callbacks.reverse()
    run = trained(tmp_path, model, *callbacks, recorder)
    for weights in recorder.weights:
        expected = {n: 0.6 * expected[n] + 0.4 * weights[n].detach() for n in expected}
    averages = ema.state_dict()["averages"]
    assert any(name.startswith("blocks.") for name in averages)
    for name, average in averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(averages[n], w) for n, w in weights_of(model).items())
    # A run that is resumed starts with what the settings freeze, not with what was frozen last.
    run.save_checkpoint(tmp_path / "switched.ckpt")
    again, resumed = EMA(decay=0.6, warmup=False), module()
    resumed.backbone.blocks.requires_grad_(not train)
    run = trainer(tmp_path, again, limit_val_batches=1)
    run.validate(resumed, DigitsData(), ckpt_path=tmp_path / "switched.ckpt", verbose=False)
    assert_equal(again.state_dict()["averages"], averages)


def test_double_precision_is_averaged_in_double_precision(tmp_path):
    model, ema = module(), EMA(decay=0.6)
    trained(tmp_path, model, ema, precision="64-true", steps=1)
    assert {v.dtype for v in ema.state_dict()["averages"].values()} == {torch.float64}
