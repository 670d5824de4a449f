"""The modules without the command line: loading, drawing, loaders of one's own, other networks."""

import pickle

import lightning as L
import numpy as np
import pytest
import torch
from grouped import grouped
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_digits import TinyDiT, module, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ant_lightning import (
    DDIM,
    EMA,
    ADMModule,
    AutoencoderModule,
    Batch,
    ConfigError,
    CosineSchedule,
    DigitsData,
    DigitsFeatures,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    GenerationMetrics,
    LDMModule,
    MultiTaskDiffusion,
    PCGrad,
    SampleGrid,
    SampleWriter,
    SNRClustering,
    TaskAffinity,
    UncertaintyWeighting,
    UNet,
)
from ant_lightning.cli.trainer_settings import check_trainer_settings
from ant_lightning.errors import FileError

IMAGES = torch.linspace(-1, 1, 24 * 64).reshape(24, 1, 8, 8)
LABELS = torch.arange(24) % 10


class Images(Dataset):
    """What one's own data set has to return, or something like it."""

    def __init__(self, make=Batch, images=IMAGES, labels=LABELS):
        self.make, self.images, self.labels = make, images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.make(self.images[i], self.labels[i], torch.tensor(i))


class Net(nn.Module):
    """The least that a network must be."""

    def __init__(self, num_outputs=2, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, num_outputs, 3, padding=1)
        sizes = {"input_size": 8, "in_channels": 1, "out_channels": 2, "num_classes": 0}
        vars(self).update({**sizes, **attributes})

    def forward(self, x_t, timesteps, labels=None):
        return self.conv(x_t)


def dit():
    return TinyDiT()


def adm():
    torch.manual_seed(0)
    return UNet(
        input_size=8, in_channels=1, out_channels=2, model_channels=32, channel_mult=(1,),
        num_res_blocks=1, num_classes=10,
    )  # fmt: skip


def ldm():
    torch.manual_seed(0)
    return UNet(
        input_size=8, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1,),
        num_res_blocks=1, dropout=0.5,
    )  # fmt: skip


def settings(**others):
    return {
        "schedule": CosineSchedule(100),
        "clustering": SNRClustering(3),
        "sampler": DDIM(num_steps=2),
        "seed": 0,
        **others,
    }


def autoencoder():
    torch.manual_seed(0)
    return {"in_channels": 1, "widths": (16, 16), "latent_channels": 1}


KINDS = {
    "DiT": (DiTModule, lambda: grouped(backbone=dit(), balancer=PCGrad(3), **settings())),
    "ADM": (ADMModule, lambda: grouped(backbone=adm(), **settings())),
    "LDM": (LDMModule, lambda: grouped(backbone=ldm(), **settings(variance_type="fixed_small"))),
    "own": (
        MultiTaskDiffusion,
        lambda: grouped(backbone=Net(), balancer=UncertaintyWeighting(3), **settings()),
    ),
    "autoencoder": (AutoencoderModule, autoencoder),
}


def train(folder, made, loader, *callbacks, steps=2, **settings):
    fit = trainer(folder, *callbacks, steps=steps, **{"limit_val_batches": 0, **settings})
    fit.fit(made, loader, loader)
    return fit


def trained(folder, kind):
    """A module that made two steps, and its checkpoint."""
    cls, arguments = KINDS[kind]
    made = cls(**arguments())
    if kind == "LDM":
        made.setup = lambda stage: None  # it trains on pixels here
    fit = train(folder, made, DataLoader(Images(), batch_size=12), EMA(decay=0.5))
    fit.save_checkpoint(folder / "w.ckpt")
    return made, folder / "w.ckpt"


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_made_of_a_checkpoint_and_its_arguments(tmp_path, kind):
    made, path = trained(tmp_path, kind)
    cls, arguments = KINDS[kind]
    loaded = cls.load_from_checkpoint(path, **arguments())
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    if kind != "autoencoder":
        assert loaded.trained_steps == 2
        assert torch.equal(loaded.sample(2), made.sample(2))
    averaged = cls.load_from_checkpoint(path, weights="ema", **arguments()).backbone.state_dict()
    averages = torch.load(path, weights_only=True)["callbacks"]["EMA"]["averages"]
    assert all(
        torch.equal(averaged[key], value.to(averaged[key])) for key, value in averages.items()
    )
    assert any(not torch.equal(averaged[k], v) for k, v in loaded.backbone.state_dict().items())
    with pytest.raises(ConfigError, match=r"^weights: must be one of ema, model, found live"):
        cls.load_from_checkpoint(path, weights="live", **arguments())
    name = next(iter(arguments()))
    others = {key: value for key, value in arguments().items() if key != name}
    if kind != "autoencoder":
        with pytest.raises(ConfigError, match=rf"{cls.__name__} needs.*'{name}'.*load_run\(path\)"):
            cls.load_from_checkpoint(path, **others)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        loaded.load_from_checkpoint(path, **arguments())


SHORT = DiscreteDiffusion(CosineSchedule(50), variance_type="learned_range")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": adm()}, "must be that of the checkpoint, TinyDiT, found UNet"),
        ({"process": SHORT}, "tasks.clustering"),
        ({"hparams_file": "hparams.yaml"}, "hparams_file"),
        ({"weights_only": False}, "weights_only"),
        ({"no_such": 1}, "found others .*no_such"),
    ],
)
def test_a_module_of_other_arguments_is_refused(tmp_path, options, message):
    _, path = trained(tmp_path, "DiT")
    with pytest.raises(ConfigError, match=message):
        DiTModule.load_from_checkpoint(path, **{**KINDS["DiT"][1](), **options})


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("content", [b"half", pickle.dumps(Runs()), None])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path, content):
    path = tmp_path / "w.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=r"w\.ckpt"):
        DiTModule.load_from_checkpoint(path, **KINDS["DiT"][1]())


class Forgetful(TinyDiT):
    def forward(self, x, timesteps, labels=None):
        return super().forward(nn.functional.dropout(x, 0.5, self.training), timesteps, labels)


def test_images_are_asked_for_in_any_form():
    made = module(Forgetful())
    wanted = made.sample([0, 1, 2], labels=torch.tensor([4, 4, 4]))
    assert wanted.shape == (3, 1, 8, 8)
    for indices in (3, range(3), torch.arange(3), np.arange(3)):
        for labels in (
            4,
            [4, 4, 4],
            np.array([4, 4, 4]),
            torch.tensor([4, 4, 4], dtype=torch.uint8),
        ):
            assert torch.equal(made.sample(indices, labels=labels), wanted)
    assert torch.equal(made.sample(3), made.sample(range(3), labels=[0, 1, 2]))
    assert made.training  # and yet no mask was drawn
    assert all(each.training for each in made.modules())
    assert made.sample(2, labels=made.null_class).shape[0] == 2


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (0, {}, "indices: must be at least one"),
        (-1, {}, "indices: must be at least one"),
        ([], {}, "indices: must be at least one"),
        ([-1], {}, "indices: must be at least one"),
        (1.5, {}, "indices: must be the number of images"),
        ([0.5], {}, "indices: must be the number of images"),
        (IMAGES[:2], {}, "indices: must be the number of images"),
        ("ab", {}, "indices: must be the number of images"),
        (2, {"labels": [1]}, "labels: must be 2 whole numbers"),
        (2, {"labels": [0.5, 1.5]}, "labels: must be 2 whole numbers"),
        (2, {"labels": [3, 11]}, "labels: must be 2 whole numbers from 0 to 10"),
        (2, {"labels": -1}, "labels: must be 2 whole numbers from 0 to 10"),
        (2, {"labels": ["a", "b"]}, "labels: must be whole numbers"),
    ],
)
def test_images_that_cannot_be_drawn_are_refused(indices, options, message):
    with pytest.raises(ConfigError, match=message):
        module().sample(indices, **options)


def test_a_network_without_classes_takes_neither_labels_nor_guidance():
    plain = MultiTaskDiffusion(Net(), **grouped(**settings()))
    assert plain.sample(2).shape == (2, 1, 8, 8)
    with pytest.raises(ConfigError, match="labels: must be left out"):
        plain.sample(2, labels=[0, 1])
    with pytest.raises(ConfigError, match=r"guidance_scale: must be 1 .* found 4"):
        plain.sample(2, guidance_scale=4.0)


def test_init_from_is_there_before_anything_is_drawn(tmp_path, capsys):
    path = tmp_path / "w.pt"
    torch.save(TinyDiT(seed=5).state_dict(), path)
    made = module(init_from=str(path))
    for name, value in TinyDiT(seed=5).state_dict().items():
        assert torch.equal(made.backbone.state_dict()[name], value)
    assert str(path) in capsys.readouterr().out
    # What is loaded by hand afterwards stays.
    made.backbone.load_state_dict(TinyDiT(seed=6).state_dict())
    assert torch.equal(made.sample(1), module(TinyDiT(seed=6)).sample(1))


def test_init_from_need_not_be_there_for_a_checkpoint_only(tmp_path):
    _, path = trained(tmp_path, "DiT")
    arguments = {**KINDS["DiT"][1](), "init_from": str(tmp_path / "gone.pt")}
    drawn = DiTModule.load_from_checkpoint(path, **arguments).sample(1)
    assert torch.equal(drawn, trained(tmp_path, "DiT")[0].sample(1))
    made = DiTModule(**arguments)
    for run in (
        lambda: made.sample(1),
        lambda: trainer(tmp_path).validate(made, DigitsData(batch_size=20), verbose=False),
        lambda: trainer(tmp_path).fit(made, DigitsData(batch_size=20)),
    ):
        with pytest.raises(ConfigError, match=r"init_from: .*gone.*: no such file"):
            run()


def test_a_checkpoint_goes_over_the_weights_of_init_from(tmp_path):
    made, path = trained(tmp_path, "DiT")
    torch.save(TinyDiT(seed=5).state_dict(), tmp_path / "w.pt")
    arguments = {**KINDS["DiT"][1](), "init_from": str(tmp_path / "w.pt")}
    loaded = DiTModule.load_from_checkpoint(path, **arguments)
    resumed = DiTModule(**arguments)
    fit = trainer(tmp_path, EMA(decay=0.5), steps=2)
    fit.fit(resumed, DigitsData(batch_size=20), ckpt_path=path)
    for each in (loaded, resumed):
        assert torch.equal(each.sample(1), made.sample(1))


LOADERS = {
    "tuples": (
        lambda: DataLoader(TensorDataset(IMAGES, LABELS), 8),
        "found a list of Tensor, Tensor",
    ),
    "dicts": (
        lambda: DataLoader(Images(lambda x, y, i: {"image": x, "label": y}), 8),
        "found a dict of image, label",
    ),
    "images": (lambda: DataLoader(IMAGES, 8), "found a Tensor"),
    "bytes": (
        lambda: DataLoader(Images(images=IMAGES.byte()), 8),
        "images: must be floating point in .-1, 1., found torch.uint8",
    ),
    "real labels": (
        lambda: DataLoader(Images(labels=LABELS / 2), 8),
        "labels: must be one whole number for each of the 8 images, found torch.float32",
    ),
    "one-hot labels": (
        lambda: DataLoader(Images(labels=nn.functional.one_hot(LABELS)), 8),
        r"labels: must be one whole number .* of shape \[8, 10\]",
    ),
    "no indices": (
        lambda: DataLoader(Images(lambda x, y, i: Batch(x, y, torch.zeros(0))), 8),
        "indices: must be one whole number",
    ),
    "colour": (
        lambda: DataLoader(Images(images=IMAGES.expand(-1, 3, -1, -1)), 8),
        r"images: must be \[1, 8, 8\] each, as backbone says, found \[3, 8, 8\]",
    ),
    "larger": (
        lambda: DataLoader(Images(images=torch.zeros(24, 1, 16, 16)), 8),
        r"images: must be \[1, 8, 8\] each",
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_of_other_things_is_refused_in_training_and_validation(tmp_path, kind):
    make, message = LOADERS[kind]
    with pytest.raises(ConfigError, match=f"batch.*{message}"):
        train(tmp_path, module(), make())
    for run in ("validate", "test"):
        with pytest.raises(ConfigError, match=f"batch.*{message}"):
            getattr(trainer(tmp_path), run)(module(), make())
    # Grey images that would be repeated over the channels of the network.
    if kind == "colour":
        wide = DiT(input_size=8, in_channels=3, hidden_size=8, depth=1, num_heads=1, num_classes=10)
        with pytest.raises(ConfigError, match=r"must be \[3, 8, 8\] each"):
            train(tmp_path, module(wide), DataLoader(Images(), 8))


@pytest.mark.parametrize("kind", ["tuples", "dicts", "bytes"])
def test_an_autoencoder_refuses_them_too(tmp_path, kind):
    make, message = LOADERS[kind]
    with pytest.raises(ConfigError, match=f"batch.*{message}"):
        train(tmp_path, AutoencoderModule(**autoencoder()), make())
    with pytest.raises(ConfigError, match=f"batch.*{message}"):
        trainer(tmp_path).validate(AutoencoderModule(**autoencoder()), make())


class OwnData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Images(), 8)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("as_module", [True, False])
def test_loaders_of_batches_train_as_the_data_module_does(tmp_path, as_module):
    made = module(balancer=PCGrad(3))
    data = OwnData() if as_module else OwnData().train_dataloader()
    fit = trainer(tmp_path, steps=4, limit_val_batches=1)
    before = {name: value.clone() for name, value in made.backbone.state_dict().items()}
    fit.fit(made, data, *([] if as_module else [data]))
    assert fit.global_step == 4
    assert torch.isfinite(fit.callback_metrics["val/loss"])
    after = made.backbone.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("left", [1, 2, 5])
@pytest.mark.parametrize("balancer", [None, UncertaintyWeighting, PCGrad])
def test_the_last_smaller_batch_trains_on_the_tasks_that_it_has(tmp_path, left, balancer):
    made = module(balancer=balancer and balancer(3))
    seen = []
    made.on_train_batch_end = lambda *args: seen.append(made.last_report)
    train(tmp_path, made, DataLoader(Subset(Images(), range(12 + left)), 12))
    assert seen[-1].finite
    assert int(seen[-1].num_samples.sum()) == left
    absent = seen[-1].num_samples == 0
    assert int(absent.sum()) >= 3 - left
    if balancer is not None:
        assert torch.isfinite(seen[-1].task_losses[~absent]).all()


def test_no_training_data_is_said_in_one_line(tmp_path):
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        trainer(tmp_path).fit(module(), val_dataloaders=DataLoader(Images(), 8))


def test_predict_says_which_images_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"predict: needs to know which images.*SampleWriter"):
        trainer(tmp_path).predict(module(), DigitsData(batch_size=20))
    made = module()
    drawn = trainer(tmp_path).predict(made, DataLoader(range(3), batch_size=2))
    assert all(map(torch.equal, drawn, (made.sample([0, 1]), made.sample([2]))))
    for each in (Images(), TensorDataset(IMAGES, LABELS), IMAGES):
        with pytest.raises(ConfigError, match="indices: must be the number of images"):
            trainer(tmp_path).predict(made, DataLoader(each, batch_size=8))
    with pytest.raises(ConfigError, match="each batch must be a list of indices, found 0"):
        trainer(tmp_path).predict(made, range(3))


@pytest.mark.parametrize(
    ("callback", "run"),
    [
        (lambda: SampleGrid(num_images=2), "validate"),
        (lambda: GenerationMetrics(DigitsFeatures(), num_images=20), "validate"),
        (lambda: GenerationMetrics(DigitsFeatures()), "validate"),
        (TaskAffinity, "validate"),
        (lambda: SampleWriter(num_images=2), "predict"),
    ],
)
def test_a_callback_that_asks_for_images_says_so_without_a_data_module(tmp_path, callback, run):
    made = callback()
    data = DataLoader(Images(), 8) if run == "validate" else [[0]]
    with pytest.raises(
        ConfigError, match=rf"{type(made).__name__}: asks the data module .*loaders"
    ):
        getattr(trainer(tmp_path, made), run)(module(), data)


class Lacks(Net):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            delattr(self, name)


class OneInput(Net):
    def forward(self, x_t, timesteps):
        return self.conv(x_t)


class Returns(Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x_t, timesteps, labels=None):
        return self.change(super().forward(x_t, timesteps, labels))


class Output(dict):
    pass


def made_of(backbone):
    return MultiTaskDiffusion(backbone, **grouped(**settings()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lacks("input_size"), "Lacks must have .* found no input_size$"),
        (lambda: Lacks("in_channels", "num_classes"), "found no in_channels, null_condition$"),
        (lambda: Lacks("out_channels"), "found no out_channels$"),
        (lambda: nn.DataParallel(Net()), "DataParallel must have .* found no input_size"),
        (lambda: torch.compile(Lacks("input_size")), "Lacks must have .* found no input_size$"),
        (lambda: Net(input_size=(8, 0)), r"Net.input_size must be a whole number .*\(8, 0\)"),
        (lambda: Net(input_size=None), "Net.input_size must be a whole number .* found None"),
        (lambda: Net(in_channels=0), "Net.in_channels must be a whole number of at least 1"),
        (lambda: Net(num_classes=-1), "Net.num_classes must be a whole number of at least 0"),
        (lambda: Net(null_class="none"), "Net.null_class must be a whole number"),
        (lambda: Net(out_channels=1), "out_channels: must be 2 .* found 1"),
        (OneInput, r"OneInput.forward must take \(x_t, t, labels\), found \(x_t"),
        (nn.Identity, "must be a torch.nn.Module with parameters, found Identity"),
        (lambda: lambda x, t, y: x, "must be a torch.nn.Module with parameters, found function"),
    ],
)
def test_a_network_without_a_part_of_the_protocol_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=f"^backbone.*{message}"):
        made_of(make())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda y: (y,), "a tuple"),
        (lambda y: Output(sample=y), "a Output"),
        (lambda y: None, "a NoneType"),
        (lambda y: y[..., :4, :4], r"\[\d+, 2, 4, 4\]"),
        (lambda y: y[:, :1], r"\[\d+, 1, 8, 8\]"),
        (lambda y: y.mean((2, 3), keepdim=True), r"\[\d+, 2, 1, 1\]"),
        (lambda y: y[:1], r"\[1, 2, 8, 8\]"),
    ],
)
def test_an_output_of_another_kind_or_shape_is_refused_in_the_first_step(tmp_path, change, found):
    message = f"backbone: Returns must return one tensor of shape .* found {found}"
    with pytest.raises(ConfigError, match=message):
        made_of(Returns(change)).sample(2)
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, made_of(Returns(change)), DataLoader(Images(), 8))


@pytest.mark.parametrize("engine", ["loop", "one_pass", "low_memory"])
def test_every_engine_says_it(tmp_path, engine):
    made = MultiTaskDiffusion(
        Returns(lambda y: y[:, :1]),
        **grouped(**settings(balancer=PCGrad(3), engine=engine)),
    )
    with pytest.raises(ConfigError, match="Returns must return one tensor"):
        train(tmp_path, made, DataLoader(Images(), 8))


@pytest.mark.parametrize(
    "settings_of_it",
    [
        {"accumulate_grad_batches": 2},
        {"callbacks": [Namespace(class_path="lightning.GradientAccumulationScheduler")]},
    ],
)
def test_the_command_line_does_not_refer_an_autoencoder_to_a_setting_it_lacks(settings_of_it):
    with pytest.raises(ConfigError, match=r"of an autoencoder: a larger data.batch_size"):
        check_trainer_settings(Namespace(**settings_of_it))


@pytest.mark.parametrize(
    ("options", "export", "message"),
    [
        ({"accumulate_grad_batches": 2}, None, "accumulate_grad_batches.* use a larger data.batch"),
        (
            {"gradient_clip_val": 0.5},
            None,
            "gradient_clip_val.* use clip_grad_norm",
        ),
        ({}, "first_stage", "export: must be None without an ant_lightning.ImageDataModule"),
    ],
)
def test_an_autoencoder_names_settings_that_it_has(tmp_path, options, export, message):
    made = AutoencoderModule(**autoencoder(), export=export and str(tmp_path / export))
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, made, DataLoader(Images(), 8), **options)
    with pytest.raises(ConfigError, match="predict: an AutoencoderModule draws no images"):
        trainer(tmp_path).predict(made, [[0]])


def test_the_interval_of_validations_may_be_a_time(tmp_path):
    run = trainer(tmp_path, val_check_interval={"seconds": 60}, check_val_every_n_epoch=None)
    run.fit(module(), DigitsData(batch_size=30))
    assert run.global_step == 4
