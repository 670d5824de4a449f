"""Power-function averages: tracked, made from snapshots afterwards, and resumed."""

import copy
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_digits import TinyDiT, module, trainer

from ant_lightning import EMA, Checkpoints, ConfigError, DigitsData, averaged_weights
from ant_lightning.callbacks.ema_snapshots import kept_interval
from ant_lightning.callbacks.power_averages import PowerAverages, snapshot_folder
from ant_lightning.callbacks.power_function import profile_coefficients
from ant_lightning.errors import FileError

FOLDER = Path(__file__).parents[1] / "golden" / "K_edm2"


class OneRank:
    """What snapshots ask of a trainer."""

    is_global_zero = True
    strategy = SingleDeviceStrategy("cpu")


def tracked(theta, lengths, folder=None, *, every=25, most=8):
    """Averages of the rows of `theta`, the weights after each update; row 0 is before training."""
    averages = PowerAverages()
    averages.begin(lengths, num_updates=0)
    for one in averages.tracked.values():
        one["w"] = theta[0].clone()
    if folder is not None:
        averages.keep_in(folder, is_first=True)
    for n, weights in enumerate(theta[1:], 1):
        averages.update({"w": weights}, num_updates=n)
        averages.snapshot(OneRank, num_updates=n, every=every, most=most)
    return averages


def golden():
    with np.load(FOLDER / "power_ema.npz") as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


def test_tracked_averages_are_edm2s():
    arrays, lengths = golden(), json.loads((FOLDER / "power_ema.json").read_text())["stds"]
    averages = PowerAverages()
    averages.begin(lengths, num_updates=0)
    for one in averages.tracked.values():
        one["w"] = arrays["theta"][0].clone()
    for n, weights in enumerate(arrays["theta"][1:], 1):
        averages.update({"w": weights}, num_updates=n)
        for length, expected in zip(lengths, arrays["ema"][n - 1], strict=True):
            found = averages.tracked[length]["w"]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_snapshots_give_the_averages_that_edm2_reconstructs(tmp_path, monkeypatch):
    arrays = golden()
    # The official code refuses no length; with eight snapshots 0.02 and 0.2 are far off.
    monkeypatch.setattr("ant_lightning.callbacks.ema_snapshots._MAX_ERROR", 1.0)
    averages = tracked(arrays["theta"], [0.05, 0.1], tmp_path)
    for length, expected in zip(arrays["out_std"], arrays["reconstructed"], strict=True):
        found = averages.of_length(float(length), num_updates=200)["w"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


# With three lengths and 16 to 32 snapshots the profiles between are off by less than 3e-4.
@pytest.mark.parametrize("length", [0.05, 0.06, 0.07, 0.1, 0.13, 0.2])
@pytest.mark.parametrize("steps", [700, 1024])
def test_a_reconstructed_average_equals_the_same_one_tracked(tmp_path, steps, length):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(steps + 1, 50, generator=generator, dtype=torch.float64)
    theta = noise.cumsum(0) / steps**0.5 + 0.1 * noise  # a path, and what each step adds to it
    averages = tracked(theta, [0.05, 0.1, 0.2], tmp_path, every=10, most=32)
    found = averages.of_length(length, num_updates=steps)["w"]
    direct = tracked(theta, [length]).tracked[length]["w"]
    assert (found - direct).abs().max() <= 1e-3 * direct.abs().max()


@pytest.mark.parametrize(
    ("lengths", "num", "least", "largest", "bound"),
    [
        ([0.05, 0.1], 16, 0.036, 0.19, 2e-2),
        ([0.05, 0.1], 32, 0.046, 0.12, 1e-3),
        ([0.05, 0.1, 0.2], 16, 0.041, 0.22, 1e-3),
        ([0.05, 0.1, 0.2], 32, 0.014, 0.27, 2e-2),
    ],
)
def test_the_documented_lengths_can_be_made(lengths, num, least, largest, bound):
    snapshots = [(100 * n, length) for n in range(1, num + 1) for length in lengths]
    for length in np.linspace(least, largest, 9):
        _, error = profile_coefficients(snapshots, 100 * num, float(length))
        assert error < bound, length


@pytest.mark.parametrize(("every", "most"), [(1, 2), (10, 8), (7, 5), (100, 32)])
def test_snapshots_are_few_even_and_a_matter_of_the_count_alone(every, most):
    kept = []
    for n in range(1, 40 * every * most):
        interval = kept_interval(n, every=every, most=most)
        kept = [each for each in kept if each % interval == 0]
        kept += [n] if n % interval == 0 else []
        assert kept == list(range(interval, n + 1, interval))
        assert len(kept) <= most
        assert interval == every or len(kept) >= most // 2


def settings(**changed):
    return {"lengths": [0.05, 0.1, 0.2], "snapshot_every": 1, "num_snapshots": 5, **changed}


def trained(folder, ema, *, steps, resume=None):
    model = module(TinyDiT())
    saves = Checkpoints(
        dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="step_{step}"
    )
    made = trainer(
        folder,
        ema,
        saves,
        steps=steps,
        enable_checkpointing=True,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    made.fit(model, DigitsData(batch_size=100), ckpt_path=resume)
    return model


def evaluate(path, length, model=None, *callbacks):
    again = trainer(
        path.parent,
        EMA(length=length),
        Checkpoints(),
        *callbacks,
        enable_checkpointing=True,
        limit_val_batches=1,
    )
    model = module(TinyDiT()) if model is None else model
    again.validate(model, DigitsData(), ckpt_path=path, verbose=False)


def compiled(network):
    return torch.compile(network, backend="eager")


def bits(folder):
    """Every snapshot of a run, as it can be compared."""
    return {path.name: torch.load(path, weights_only=True) for path in (folder / "ema").iterdir()}


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("folder", ["the same folder", "another folder"])
def test_a_resumed_run_has_the_same_averages_and_snapshots(tmp_path, folder):
    whole, first = tmp_path / "whole", tmp_path / "first"
    trained(whole, EMA(**settings()), steps=9)
    trained(first, EMA(**settings()), steps=5)
    second = first if folder == "the same folder" else tmp_path / "second"
    trained(second, EMA(**settings()), steps=9, resume=first / "step_5.ckpt")
    assert sorted(bits(whole)) == [f"update_{n}.pt" for n in (2, 4, 6, 8)]
    assert same(bits(whole), bits(second))
    states = [
        torch.load(each / "step_9.ckpt", weights_only=True)["callbacks"]["EMA"]
        for each in (whole, second)
    ]
    assert states[0]["snapshots"].keys() == {2, 4, 6, 8}
    assert same(*states)


def test_an_evaluation_uses_the_average_that_is_asked_for(tmp_path):
    ema = EMA(**settings())
    model = trained(tmp_path, ema, steps=9)
    live = copy.deepcopy(model.backbone.state_dict())
    direct = EMA(**settings(lengths=[0.07]))
    trained(tmp_path / "direct", direct, steps=9)
    expected = direct.state_dict()["powers"][0.07]
    for state, length in ((ema.state_dict()["powers"][0.1], 0.1), (expected, 0.07)):
        # The snapshots were made by a network that is not compiled.
        network = TinyDiT(seed=3) if length == 0.1 else compiled(TinyDiT(seed=3))
        other, seen = module(network), {}

        class Sees(L.Callback):
            def on_validation_epoch_end(self, trainer, pl_module, seen=seen):
                seen.update(copy.deepcopy(dict(pl_module.backbone.named_parameters())))

        evaluate(tmp_path / "step_9.ckpt", length, other, Sees())
        for name, value in state.items():
            own = name if length == 0.1 else f"_orig_mod.{name}"
            torch.testing.assert_close(seen[own], value, rtol=0, atol=1e-3 * value.abs().max())
            assert torch.equal(dict(other.backbone.named_parameters())[own], live[name])
    # After the training, in the same process.
    ema.length = 0.07
    with averaged_weights(model.trainer, model):
        for name, value in expected.items():
            found = model.backbone.get_parameter(name)
            torch.testing.assert_close(found, value, rtol=0, atol=1e-3 * value.abs().max())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [0.3]}, "lengths: must be above 0 and below 0.289, found 0.3"),
        ({"length": 0.0}, r"length: must be above 0 and below 0.289, found 0\.0"),
        ({"length": float("nan")}, "length: must be above 0 .* found nan"),
        ({"snapshot_every": 0}, "snapshot_every: must be at least 1, found 0"),
        ({"num_snapshots": 1}, "num_snapshots: must be at least 2, found 1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EMA(**wrong)


def test_what_cannot_be_right_is_refused(tmp_path):
    trained(tmp_path, EMA(**settings()), steps=4)
    path = tmp_path / "step_4.ckpt"

    with pytest.raises(ConfigError, match=r"length: .* found 0.01, whose profile .* off by \d+"):
        evaluate(path, 0.01)
    with pytest.raises(ConfigError, match=r"length: must be in lengths \[0.05\] in training.* 0.1"):
        trained(tmp_path, EMA(lengths=[0.05], length=0.1), steps=4)
    with pytest.raises(ConfigError, match=r"lengths: must be among .*0.2\], found \[0.15\]"):
        trained(tmp_path, EMA(lengths=[0.15]), steps=6, resume=path)
    # Fewer lengths go on.
    trained(tmp_path / "fewer", EMA(lengths=[0.1]), steps=5, resume=path)
    # Snapshots of another run under the same names.
    snapshot = snapshot_folder(tmp_path) / "update_3.pt"
    torch.save({"averages": {0.1: {"w": torch.zeros(2)}}, "digest": "another"}, snapshot)
    with pytest.raises(ConfigError, match="length: needs the snapshots of this run, found"):
        evaluate(path, 0.07)
    torch.save({"averages": [1]}, snapshot)
    with pytest.raises(FileError, match=r"update_3\.pt: must hold averages of weights"):
        evaluate(path, 0.07)
    plain = tmp_path / "plain"
    trained(plain, EMA(), steps=1)
    with pytest.raises(ConfigError, match=r"length: needs averages .*ema\.lengths.*found 0\.1"):
        evaluate(plain / "step_1.ckpt", 0.1)
    assert not (plain / "ema").exists()


def test_a_full_disk_leaves_the_training_alone(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ant_lightning.callbacks.power_averages.write_snapshot", full)
    ema = EMA(**settings())
    with pytest.warns(UserWarning, match="ema: no snapshot of update 1, as .*No space left"):
        trained(tmp_path, ema, steps=1)
    assert ema.num_updates == 1
    assert ema.state_dict()["snapshots"] == {}
