"""TaskAffinity and TransferMatrix measure the model they are given and leave it as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_digits import T, TinyDiT, module, trainer

from ant_lightning import (
    EMA,
    AffinityResult,
    ConfigError,
    CosineSchedule,
    DigitsData,
    DiscreteDiffusion,
    GradientClustering,
    LinearSchedule,
    TaskAffinity,
    TransferMatrix,
)
from ant_lightning.callbacks.fixed_loss import FixedLoss

GRID = [3, 40, 41, 90]


class Silent(TaskAffinity):
    """Draws nothing, which is most of the time."""

    def _publish(self, trainer, pl_module, result):
        pass


def affinity(kind=Silent, **settings):
    return kind(timesteps=GRID, num_images=20, batch_size=7, **settings)


def weights(model):
    return {
        name: p.detach().clone() for name, p in model.backbone.named_parameters() if p.requires_grad
    }


def flat_gradient(model, loss):
    shared = [p for p in model.backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, shared, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads]).double()


def test_validate_gives_the_cosines_of_gradients_made_one_by_one(tmp_path):
    model, data = module().eval(), DigitsData()
    before, callback = weights(model), affinity(TaskAffinity, seed=5)
    run = trainer(tmp_path, callback)
    run.validate(model, data, verbose=False)
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    probe = FixedLoss(model, data.train_images, num_images=20, batch_size=20, seed=5)
    rows = torch.stack(
        [
            torch.stack([flat_gradient(model, sum(probe.at_timestep(t, half))) for half in (0, 1)])
            for t in GRID
        ]
    )
    mean = rows.mean(1)
    unit = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(callback.result.plain, unit @ unit.T, rtol=0, atol=1e-5)
    stored = AffinityResult.load(tmp_path / "task_affinity.safetensors")
    assert torch.equal(stored.plain, callback.result.plain)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "5_affinity_by_timestep.png",
        "5_affinity_by_log_snr.png",
        "5_affinity_by_distance.png",
    }


def test_the_halves_share_no_image_and_the_loss_is_the_denoising_loss(tmp_path):
    model, data = module(class_dropout=0.0).eval(), DigitsData()
    model.trainer = trainer(tmp_path)
    loaded = []

    class Watched:
        def __len__(self):
            return 40

        def load(self, indices, *, epoch):
            assert epoch is None
            loaded.append(indices)
            return data.train_images.load(indices, epoch=None)

    probe = FixedLoss(model, Watched(), num_images=30, batch_size=9, seed=0)
    for t in (1, 50, 99):
        for half in (0, 1):
            first = sum(probe.at_timestep(t, half))
            assert torch.equal(first, sum(probe.at_timestep(t, half)))
    per_call = [[*loaded[i], *loaded[i + 1]] for i in range(0, len(loaded), 2)]
    assert [len(each) for each in per_call] == [15] * 12
    assert all(len(set(each)) == 15 for each in per_call)
    one = {i for n, each in enumerate(per_call) if n // 2 % 2 == 0 for i in each}
    two = {i for n, each in enumerate(per_call) if n // 2 % 2 == 1 for i in each}
    assert not one & two
    assert set(per_call[0]) != set(per_call[4])  # other timesteps, other images
    # A model that predicts 0 (and no variance) has the mean square of the noise as its loss.
    with torch.no_grad():
        for p in model.backbone.final_layer.parameters():
            p.zero_()
    big = FixedLoss(model, data.train_images, num_images=1400, batch_size=700, seed=0)
    assert float(sum(big.at_timestep(60, 0)).detach()) == pytest.approx(1.0, abs=0.05)


def test_fit_averages_validations_and_a_resumed_run_goes_on(tmp_path):
    settings = {
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "enable_checkpointing": True,
    }
    model, data, callback = module(), DigitsData(batch_size=50), affinity()
    run = trainer(tmp_path, callback, EMA(decay=0.5), **settings)
    run.fit(model, data)
    assert callback.result.num_checkpoints == 2
    assert torch.is_grad_enabled()
    assert model.training
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = affinity()
    run = trainer(tmp_path, resumed, EMA(decay=0.5), steps=6, **settings)
    run.fit(module(), DigitsData(batch_size=50), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.result.num_checkpoints == 3
    assert torch.equal(resumed.result.half_dots[:2], callback.result.half_dots)
    path = tmp_path / "affinity.safetensors"
    resumed.result.save(path)
    clusters = GradientClustering(path, 2)(model.process.log_snr)
    assert clusters.num_timesteps == T
    other = DiscreteDiffusion(LinearSchedule(T)).log_snr
    with pytest.raises(ConfigError, match="log-SNR"):
        GradientClustering(path, 2)(other)
    longer = DiscreteDiffusion(CosineSchedule(T + 1)).log_snr
    with pytest.raises(ConfigError, match=f"{T + 1} timesteps, found {T}"):
        GradientClustering(path, 2)(longer)
    alone = affinity(average_with=[str(path)])
    trainer(tmp_path / "next", alone).validate(model, data, verbose=False)
    assert alone.result.num_checkpoints == 4


def test_ema_or_live_weights(tmp_path):
    averages = weights(module(TinyDiT(seed=7)))

    def measured(which, model, *callbacks):
        callback = affinity(weights=which)
        trainer(tmp_path, callback, *callbacks).validate(model, DigitsData(), verbose=False)
        return callback.result.half_dots

    def ema():
        callback = EMA()
        callback.load_state_dict({"averages": averages, "num_updates": 1})
        return callback

    live, averaged = measured("live", module()), measured("live", module(TinyDiT(seed=7)))
    assert not torch.allclose(live, averaged)
    assert torch.equal(measured("live", module(), ema()), live)
    assert torch.equal(measured("ema", module(), ema()), averaged)


def test_a_nan_is_named_and_what_was_measured_is_kept(tmp_path, caplog):
    model, data = module(TinyDiT(nan_from=80)), DigitsData(batch_size=50)
    with pytest.raises(ConfigError, match="timestep 90"):
        trainer(tmp_path, affinity()).validate(model, data, verbose=False)
    partial = AffinityResult.load(tmp_path / "task_affinity_partial.safetensors")
    assert partial.timesteps == (3, 40, 41)
    # Training is not stopped by a measurement.
    model = module(TinyDiT(nan_from=80), interval=(0, 50))
    run = trainer(tmp_path, affinity(), steps=1, val_check_interval=1, limit_val_batches=1)
    run.fit(model, data)
    assert "left out" in caplog.text


def test_a_killed_measurement_goes_on(tmp_path):
    whole = affinity()
    trainer(tmp_path, whole).validate(module(), DigitsData(), verbose=False)

    class Dying(DigitsData):
        left = 5

        @property
        def train_images(self):
            data = self
            images = super().train_images

            class Counted:
                def __len__(self):
                    return len(images)

                def load(self, indices, *, epoch):
                    data.left -= 1
                    if data.left < 0:
                        raise MemoryError
                    return images.load(indices, epoch=epoch)

            return Counted()

    state = tmp_path / "state"
    with pytest.raises(MemoryError):
        trainer(tmp_path, affinity(resume_dir=str(state))).validate(
            module(), Dying(), verbose=False
        )
    second = affinity(resume_dir=str(state))
    data = Dying()
    data.left = 100
    trainer(tmp_path, second).validate(module(), data, verbose=False)
    assert data.left == 100 - 2 * 2 * 3  # timestep 3 was finished; two batches for each half
    assert torch.equal(second.result.half_dots, whole.result.half_dots)
    assert not list(state.iterdir())


def test_transfer_is_what_a_step_by_hand_does(tmp_path):
    model, data = module().eval(), DigitsData()
    before = weights(model)
    callback = TransferMatrix(lr=0.1, num_images=32, batch_size=11)
    trainer(tmp_path, callback).validate(model, data, verbose=False)
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    probe = FixedLoss(model, data.held_out_images, num_images=32, batch_size=32, seed=0)
    stepped = module(copy.deepcopy(model.backbone)).eval()
    stepped.trainer = model.trainer
    optimizer = torch.optim.SGD(stepped.backbone.parameters(), lr=0.1)
    own = FixedLoss(stepped, data.held_out_images, num_images=32, batch_size=32, seed=0)
    own.of_task(2).backward()
    optimizer.step()
    expected = 1 - float(own.of_task(0).detach()) / float(probe.of_task(0).detach())
    assert float(callback.matrix[2, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (tmp_path / "6_transfer_lookahead.png").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TaskAffinity(num_points=0), "num_points"),
        (lambda: TaskAffinity(num_images=1), "num_images"),
        (lambda: TransferMatrix(lr=0.0), "lr: must be above 0"),
        (lambda: TransferMatrix(images="all"), "held_out, found all"),
        (lambda: TransferMatrix(weights="mean"), "weights: must be ema or live"),
        (lambda: TransferMatrix(every_n_epochs=0), "every_n_epochs"),
        (lambda: TaskAffinity(average_with=["nowhere.safetensors"]), "nowhere.safetensors"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_files_of_another_model_are_not_averaged_in(tmp_path):
    path = tmp_path / "other.safetensors"
    one = torch.eye(4, dtype=torch.float64).expand(1, 2, 2, 4, 4)
    other = AffinityResult(tuple(GRID), T, one, num_parameters=9)
    other.save(path)
    callback = affinity(average_with=[str(path)])
    with pytest.raises(ConfigError, match="num_parameters"):
        trainer(tmp_path, callback).validate(module(), DigitsData(), verbose=False)
    replace(other, model="UNet, ema weights").save(path)
    callback = affinity(average_with=[str(path)])
    with pytest.raises(ConfigError, match="'TinyDiT, ema weights', found 'UNet, ema weights'"):
        trainer(tmp_path, callback).validate(module(), DigitsData(), verbose=False)
    with pytest.warns(UserWarning, match="measured on 'UNet, ema weights', and .* a TinyDiT"):
        module(clustering=GradientClustering(path, 2))
