"""Mistakes that need no import are answered without one, and nothing else is refused there."""

import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer
from lightning.pytorch import loggers
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch_fidelity import feature_extractor_inceptionv3
from wrong_settings import CONFIGS, SETTINGS, arguments, callback

from ant_lightning import ConfigError, load_run
from ant_lightning.cli import path_settings
from ant_lightning.cli.bounds import checks_of
from ant_lightning.cli.configs import with_paths_of_configs
from ant_lightning.cli.first_look import first_look, top_settings
from ant_lightning.cli.logger_names import places_of
from ant_lightning.cli.main import main
from ant_lightning.cli.messages import one_line
from ant_lightning.cli.parser import AntCLI
from ant_lightning.cli.source_names import arguments_of
from ant_lightning.cli.trainer_settings import with_classes_of_loggers
from ant_lightning.data.class_map import write_class_map
from ant_lightning.generation import inception_file
from ant_lightning.runtime.run_files import RUN_OR_CHECKPOINT, no_run

DIT = CONFIGS / "digits" / "dit.yaml"
# Rows of the table of wrong settings that can be seen without an import.
SEEN = [
    "misspelt option",
    "option without a value",
    "word without an option",
    "config without a name",
    "option cut short",
    "learning rate in words",
    "steps in words",
    "tasks 2.5",
    "balancer's rate",
    "least loss",
    "learning rate below 0",
    "weight decay",
    "max steps",
    "no depth",
    "no width",
    "no timesteps",
    "warm-up",
    "batch 0",
    "kept checkpoints",
    "unknown weighting",
    "unknown callback",
    "option of a callback",
    "optimizer beside the model",
    "seed below 0",
    "seed too large",
    "log never",
    "sanity steps",
    "epochs of checks",
    "interval of checks",
    "clip by the Trainer",
    "accumulation by the Trainer",
    "accumulation by a callback",
    "averages twice",
    "averages of Lightning",
    "search for a rate",
    "no checkpoint",
    "folder as checkpoint",
    "a word as checkpoint",
    "checkpoint that runs code",
    "no data",
    "no folder of images",
    "no latents",
    "no initial weights",
    "config that is not there",
    "folder as config",
]
MORE = {
    "unknown command": (["train"], ["command: must be one of fit", "'train'"]),
    "misspelt command": (["predcit"], ["found 'predcit'; did you mean 'predict'?"]),
    "group": (["fit", "--trainr.max_steps=3"], ["trainr: the command", "'trainer'"]),
    "flag": (["fit", "--trainer.max_stepz", "3"], ["trainer.max_stepz: ", "'trainer.max_steps'"]),
    "flag without its group": (["fit", "--max_steps=3"], ["max_steps: ", "'trainer.max_steps'"]),
    "images of fit": (["fit", "--images=x"], ["found images for ant-lightning score --images"]),
    "balancer": (
        ["fit", "--model.tasks.balancer=PCGrat"],
        ["model.tasks.balancer", "did you mean 'PCGrad'"],
    ),
    "balancer by its module": (
        ["fit", "--model.tasks.balancer.class_path=ant_lightning.balancing.Nash"],
        ["model.tasks.balancer", "'ant_lightning.balancing.Nash'"],
    ),
    "clustering": (
        ["fit", "--model.init_args.tasks.clustering=SNRClusterin"],
        ["model.tasks.clustering", "did you mean 'SNRClustering'"],
    ),
    "model": (["fit", "--model=ant_lightning.modules.DiTModul"], ["model: no class", "DiTModule"]),
    "data": (["fit", "--data=ant_lightning.data.DigitData"], ["data: no class", "DigitsData"]),
    "option of a balancer": (
        ["fit", "--model.tasks.balancer=UncertaintyWeighting", "--model.tasks.balancer.min_los=1"],
        [
            "model.tasks.balancer.min_los: UncertaintyWeighting has no such",
            "'model.tasks.balancer.min_loss'",
        ],
    ),
    "option of a logger": (
        ["fit", "--trainer.logger=csv", "--trainer.logger.sav_dir=x"],
        ["trainer.logger.sav_dir: CSVLogger has no such setting; did you mean 'trainer.logger.sa"],
    ),
    "option of the default logger": (
        ["fit", "--config=digits/dit", "--trainer.logger.nam=x"],
        ["trainer.logger.nam: TensorBoardLogger has no such setting; did you mean 'trainer.logger"],
    ),
    "bound of a base": (
        ["fit", "--config=digits/dit", "--data=ImageFolderData", "--data.num_workers=-1"],
        ["data.num_workers: must be at least 0, found -1"],
    ),
    "bound of a group": (
        ["fit", "--config=digits/dit", "--model.optimization.max_skipped_steps=0"],
        ["model.optimization.max_skipped_steps: must be at least 1, found 0"],
    ),
    "choice of a class": (
        ["fit", "--config=digits/dit", "--model.sampling.sampler.spacing=foo"],
        ["model.sampling.sampler.spacing: must be one of 'ddim', 'even', 'ldm', ", "found foo"],
    ),
    "callback that is added": (
        ["fit", "--config=digits/dit", "--trainer.callbacks+", "ant_lightning.ConflictMonitr"],
        ["trainer.callbacks: no class is called 'ant_lightning.Conf", "'ConflictMonitor'"],
    ),
    "module that is not here": (
        ["fit", "--config=digits/dit", "--model.backbone", "no_such.Net"],
        ["model.backbone: no module is called 'no_such', found no_such.Net"],
    ),
    "setting of a list of loggers": (
        [
            *("fit", "--config=digits/dit", "--trainer.logger=[csv, mlflow]"),
            "--trainer.logger.name=x",
        ],
        ["trainer.logger[1].name: MLFlowLogger has no such setting; did you mean"],
    ),
    "values of a sweep": (
        ["sweep", ".", "--guidance", "1,2"],
        ["guidance: must be numbers with spaces between them", "found 1,2"],
    ),
    "extractor of a sweep": (
        ["sweep", ".", "--guidance", "1", "--extractor", "ant_lightning.ShapesFeature"],
        ["metrics.extractor: no class is called", "did you mean 'ShapesFeatures'"],
    ),
    "weights of an export": (
        ["export", ".", "--to", "torch", "--weights=lve"],
        ["weights: must be one of 'ema', 'live', found lve"],
    ),
    "callback": (["fit", callback("ConflictMonitr")], ["trainer.callbacks", "ConflictMonitor"]),
    "images": (
        ["predict", "--config=digits/dit", "--samples.num_images=0"],
        ["samples.num_images: must be at least 1"],
    ),
    "images by the name of all commands": (
        ["predict", "--config=digits/dit", "--num_images=0"],
        ["samples.num_images: must be at least 1"],
    ),
    "batch of images": (
        ["predict", "--config=digits/dit", "--samples.batch_size=-1"],
        ["samples.batch_size", "-1"],
    ),
    "nothing": (["fit"], ["data, model: needed, found nothing; give a --config FILE"]),
    "no model": (["test", "--data=DigitsData"], ["model: needed, found nothing"]),
    "option of encode": (["encode", "--cache.shard=3"], ["cache.shard: ", "'cache.shard_size'"]),
    "option of another command": (["encode", "--ema.decay=0.9"], ["ema: ", "no such"]),
    "data of encode": (["encode", "--data=ant_lightning.data.DigitData"], ["DigitsData"]),
    "report": (["report", "/nope"], ["/nope: must be the folder of a run"]),
    "sweep": (["sweep", "/nope", "--guidance", "1"], ["/nope: must be the folder of a run"]),
    "sweep of nothing": (["sweep", "."], ["guidance: needs values, as in --guidance 1 1.5 2"]),
    "diagnose": (["diagnose", "/nope"], ["/nope: must be the folder of a run"]),
    "option of diagnose": (
        ["diagnose", "--config", "digits/dit", "--num_imges=3"],
        ["num_imges: the command has no such setting; did you mean 'num_images'?"],
    ),
    "diagnose of nothing": (["diagnose"], ["diagnose: needs the folder of a run, or --config"]),
    "images of score": (
        ["score", "--data=DigitsData", "--images=/nope"],
        ["images: must be a folder or an npz file, found nothing at /nope"],
    ),
    "extractor of score": (
        [
            *("score", "--data=DigitsData", "--images=.", "--metrics.extractor"),
            *("ant_lightning.CLIPFeatures", "--metrics.extractor.folder=/nope"),
        ],
        ["metrics.extractor.folder: must be a folder with config.json, found nothing at /nope"],
    ),
    "clip of score": (
        ["score", "--data=DigitsData", "--images=.", "--clip=/nope"],
        ["clip: must be a folder with config.json, found nothing at /nope"],
    ),
    "export": (["export", "/nope", "--to", "torch"], ["/nope: must be the folder of a run or a"]),
    "export to nothing": (["export", "."], ["to: needed, one of diffusers, official,"]),
    "export to another": (["export", ".", "--to", "foo"], ["to: must be one of", "found foo"]),
    "the second run of app": (["app", ".", "/nope"], ["/nope: must be the folder of a run or a"]),
    "score without data": (["score", "--images", "."], ["data: needed", "RUN/config.yaml"]),
    "encode without its config": (["encode", "--config=/nope"], ["config", "found nothing"]),
}
DINO = {"class_path": "ant_lightning.DINOv2Features"}
FOLDER = ["--config", "folder/dit_32"]
CAPTIONS = ["--data=CaptionFolderData", "--data.image_size=8"]
DATASET = ["--data=MapStyleData", "--data.dataset"]
# Paths of data, networks and weights, where there is nothing of the kind; `with` has one image.
PATHS = {
    "no root": ([*FOLDER], ["data.root: needed, found nothing"]),
    "root": ([*FOLDER, "--data.root=/nope"], ["data.root: must be a folder of images", "/nope"]),
    "root is a file": ([*FOLDER, "--data.root=a.png"], ["data.root: must", "the file a.png"]),
    "root without images": (
        [*FOLDER, "--data.root=empty"],
        ["data.root: must hold images", "none"],
    ),
    "captions": (
        [*CAPTIONS, "--data.root=with", "--data.embeddings=/nope"],
        ["data.embeddings: must be a cache", "/nope"],
    ),
    "cache": (["--data=LatentsData", "--data.cache=."], ["data.cache: must be a cache", "found"]),
    "latents": (
        ["--data=EDM2LatentsData", "--data.path=/nope"],
        ["data.path: must be a folder"],
    ),
    "REPA": (["--data=REPALatentsData", "--data.root=."], ["data.root: must", "vae-sd"]),
    "LightningDiT": (["--data=LightningDiTLatentsData", "--data.path=x"], ["data.path: must be a"]),
    "zip": ([*DATASET, "EDMImages", "--data.dataset.path=x.zip"], ["data.dataset.path", "x.zip"]),
    "shards": (
        [*DATASET, "ant_lightning.TarShards", "--data.dataset.shards=x/{00..03}.tar"],
        ["data.dataset.shards: must name tar files, found no file x/00.tar"],
    ),
    "torchvision": (
        ["--config", "cifar10/edm"],
        ["data.dataset.root: must be a folder with the files of CIFAR10", ".download true"],
    ),
    "network": (
        ["--model.backbone=ant_lightning.DiffusersBackbone", "--model.backbone.folder=x"],
        ["model.backbone.folder: must be a folder of diffusers, found nothing at x"],
    ),
    "extractor": (
        [callback("GenerationMetrics", extractor={**DINO, "init_args": {"folder": "/nope"}})],
        ["trainer.callbacks[0].extractor.folder: must be a folder with config.json", "/nope"],
    ),
    "initial weights": (["--model.init_from=x.pt"], ["model.init_from: must be", "at x.pt"]),
}
FILES = {
    "no such logger": (
        "trainer: {logger: wandbb}",
        ["trainer.logger: no class is called 'wandbb'; did you mean 'wandb'?"],
    ),
    "no such logger in a list": ("trainer: {logger: [csv, foo]}", ["'foo'; short names are tens"]),
    "no YAML": ("trainer: {max_steps: 3", ["must be YAML, found in line"]),
    "misspelt group": ("trainr: {max_steps: 3}", ["line 1: trainr: ", "did you mean 'trainer'"]),
    "misspelt setting": ("ema: {deacy: 0.9}", ["ema.deacy", "did you mean 'ema.decay'"]),
    "misspelt flag": ("trainer: {max_stepz: 3}", ["trainer.max_stepz", "'trainer.max_steps'"]),
    "clip": ("trainer: {gradient_clip_val: 1.0}", ["use model.optimization.clip_grad_norm", "1.0"]),
    "number of tasks": (
        "model: {init_args: {tasks: {clustering: {init_args: {num_tasks: x}}}}}",
        ["model.tasks.clustering.num_tasks: must be a whole number, found x"],
    ),
    "decay": ("ema: {decay: high}", ["ema.decay: must be a number, found high"]),
    "checkpoints": ("checkpoint: {save_top_k: all}", ["save_top_k: must be a whole number"]),
    "seed": ("seed_everything: -1", ["seed_everything: must be from 0", "-1"]),
    "balancer": (
        "model: {init_args: {tasks: {balancer: {class_path: NashMTLL}}}}",
        ["model.tasks.balancer", "'NashMTL'"],
    ),
    "option of the model": (
        "model: {class_path: ant_lightning.DiTModule, init_args: {clip_norm: 3}}",
        ["model.clip_norm: DiTModule has no such setting"],
    ),
}
# What the parser takes, in spite of how it looks.
VALID = {
    "flags of neutral value": [
        "--trainer.gradient_clip_val=null",
        "--trainer.accumulate_grad_batches=1",
    ],
    "a later flag": ["--trainer.gradient_clip_val=3", "--trainer.gradient_clip_val=null"],
    "seed true": ["--seed_everything=true"],
    "a later seed": ["--seed_everything", "-1", "--seed_everything", "7"],
    "a later list": [callback("EMA"), "--trainer.callbacks=[]"],
    "a later class": [
        "--model.tasks.balancer=UncertaintyWeighting",
        "--model.tasks.balancer.min_loss=0.1",
        "--model.tasks.balancer=PCGrad",
    ],
    "a later list of others": [callback("EMA"), callback("ConflictMonitor")],
    "an appended callback": [
        "--trainer.callbacks+=ConflictMonitor",
        "--trainer.callbacks.log_every_n_steps=3",
    ],
    "a dictionary": [
        '--model.tasks.balancer={"class_path":"UncertaintyWeighting","init_args":{"lr":0.1}}'
    ],
    "no balancer": ["--model.tasks.balancer=null"],
    "another optimizer": [
        "--model.optimization.optimizer=SGD",
        "--model.optimization.optimizer.lr=1e-3",
    ],
    "a config in place": ["--config", '{"trainer": {"max_steps": 3}}'],
    "numbers": [
        "--trainer.max_epochs=null",
        "--model.optimization.optimizer.lr=1e-3",
        "--ema.decay=.5",
        "--ema.length=~",
    ],
    "numbers as words": ["--trainer.limit_val_batches=0.5", "--trainer.val_check_interval=00:01"],
}


def looked(args):
    """The message of the first look, if it has one."""
    try:
        first_look(args)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SETTINGS)
def test_of_wrong_settings_it_says_what_the_parser_says_or_nothing(tmp_path, name):
    options, words = SETTINGS[name]
    message = looked(arguments(tmp_path, *options))
    assert message is None or all(word in message for word in words), message
    assert (message is not None) == (name in SEEN)


@pytest.mark.parametrize("name", MORE)
def test_more_mistakes_are_seen(capsys, name):
    args, words = MORE[name]
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_mistakes_in_a_file_are_seen(tmp_path, name, command):
    text, words = FILES[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = looked([command, "--config", str(DIT), f"--config={path}"])
    assert message is not None
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", PATHS)
def test_a_path_at_which_nothing_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    Path("with").mkdir()
    Path("empty").mkdir()
    Image.new("RGB", (9, 9)).save("with/b.PNG")
    options, words = PATHS[name]
    args = with_paths_of_configs(["fit", "--config", str(DIT), *options])
    message = looked(args)
    assert message is not None
    assert all(word in message for word in words), message
    assert looked([*args, "--print_config"]) is None
    others = ["--data=DigitsData", "--model.backbone=DiT", "--model.init_from=null"]
    assert looked([*args, *others, "--trainer.callbacks=null"]) is None


def test_a_broken_image_or_a_class_without_images_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/.4.png", "@eaDir/5.png"):
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(Path("images", name))
    Path("images/dog/.4.png").write_bytes(b"no image, nor looked for")
    args = with_paths_of_configs(["fit", *FOLDER, "--data.root=images"])
    assert looked(args) is None
    Path("images/dog/3.png").write_bytes(Path("images/cat/1.png").read_bytes()[:40])
    found = "data.validate_images: 1 broken image: images/dog/3.png: cannot be decoded"
    assert looked(args).startswith(found)
    for choice in ("skip", "off"):
        assert looked([*args, f"--data.validate_images={choice}"]) is None
    monkeypatch.setattr(path_settings, "_FEW_BYTES", 39)  # of large files, few are decoded
    assert looked(args) is None
    Path("images/empty").mkdir()
    assert looked(args).startswith("data.root: every folder in images is a class and must hold")
    Image.new("RGB", (9, 9)).save("images/6.png")
    assert looked(args).startswith("data.labels: 'auto' needs every image in the folder of its")
    assert looked([*args, "--data.labels=none"]) is None


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ([*DATASET, "EDMImages", "--data.dataset.path=x.zip"], "x.zip"),
        ([*DATASET, "TarShards", "--data.dataset.shards={0..1}.tar"], "1.tar"),
        (["--data=EDM2LatentsData", "--data.path=x.zip"], "x.zip"),
        ([*DATASET, "HuggingFaceDataset", "--data.dataset.data_files=x.parquet"], "x.parquet"),
        (["--images=x.npz"], "x.npz"),
    ],
)
def test_an_archive_that_is_cut_off_or_something_else_is_seen(tmp_path, monkeypatch, options, path):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a", b"1" * 99)
    np.savez("x.npz", np.zeros(9))
    Path("x.parquet").write_bytes(b"PAR1 PAR1")
    for i in range(2):
        with tarfile.open(f"{i}.tar", "w") as archive:
            archive.add("x.zip")
    command = "score" if path == "x.npz" else "fit"
    args = with_paths_of_configs([command, "--config", str(DIT), *options])
    assert looked(args) is None
    whole = Path(path).read_bytes()
    for content in (whole[: len(whole) - 30 if path != "1.tar" else 30], b"<html>", b""):
        Path(path).write_bytes(content)
        kind, size = Path(path).suffix[1:], len(content)
        rule = f"{path}: must be a whole {kind} file, found {size} bytes that are not"
        assert looked(args) == rule


METRICS = callback("GenerationMetrics")


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["score", "--images=.", "--trainer.callbacks=[]"], "--metrics.extractor"),
        (["score", "--images=.", METRICS], "--metrics.extractor"),
        (["score", "--images=.", "--metrics.extractor=InceptionFeatures"], "--metrics.extractor"),
        (["test", METRICS], ""),
    ],
)
def test_weights_that_cannot_be_downloaded_are_seen(tmp_path, monkeypatch, capsys, args, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert inception_file.inception_file().parents[1] == Path(torch.hub.get_dir())
    assert inception_file.URL == feature_extractor_inceptionv3.URL_INCEPTION_V3

    class Answer:
        headers: ClassVar = {"Content-Length": str(91 * 2**20)}
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    answers = [OSError("no network"), Answer()]

    def opened(url, timeout):
        assert url == inception_file.URL
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(inception_file, "urlopen", opened)
    args = [args[0], "--config", str(DIT), *args[1:]]
    message = looked(args)
    assert message.startswith("weights: could not be downloaded (no network); put weights-incept")
    assert message.endswith(f"{option} ant_lightning.ShapesFeatures" if option else "Features")
    assert looked(args) is None
    said = capsys.readouterr().out
    assert said.startswith(f"{args[0]}: downloads the weights of InceptionV3, 91 MB, from https://")
    own = callback("GenerationMetrics", extractor="ShapesFeatures")
    assert looked([*args[:3], "--images=.", own] if option else [*args, own]) is None
    inception_file.inception_file().parent.mkdir(parents=True)
    inception_file.inception_file().write_bytes(b"")
    assert looked(args) is None


def test_paths_of_the_right_kind_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images/cat/a.png", "cache/index.json", "repa/vae-sd/a.npy", "x/0.tar", "d/e"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(name, "PNG")
    with tarfile.open("x/0.tar", "w"):
        pass
    for options in (
        [*FOLDER, "--data.root=images"],
        [*CAPTIONS, "--data.root=images", "--data.embeddings=cache"],
        ["--data=LatentsData", "--data.cache=cache"],
        ["--data=REPALatentsData", "--data.root=repa"],
        [*DATASET, "ant_lightning.TarShards", "--data.dataset.shards=x/*.tar"],
        [*DATASET, "torchvision.datasets.CIFAR10", "--data.dataset.root=d"],
        [*DATASET, "torchvision.datasets.CIFAR10", "--data.dataset.download=true"],
        ["--model.init_from=x/0.tar"],
        ["--model.init_from=/nope", "--ckpt_path=last"],  # the checkpoint replaces them
        [callback("GenerationMetrics", extractor="/nope")],  # a run goes on without scores
        [callback("GenerationMetrics", extractor={**DINO, "init_args": {}}), "--scores=false"],
    ):
        args = with_paths_of_configs(["fit", "--config", str(DIT), *options])
        assert looked(args) is None, options


@pytest.mark.parametrize("missing", [False, True])
def test_a_folder_of_runs_is_no_run_and_they_are_named(tmp_path, capsys, missing):
    runs = tmp_path / "digits"
    for i in () if missing else range(2):
        (runs / f"version_{i}" / "checkpoints").mkdir(parents=True)
        (runs / f"version_{i}" / "checkpoints" / "last.ckpt").write_bytes(b"")
    for i, each in enumerate(sorted(runs.glob("*/checkpoints/*"))):
        record = each.parents[1] / "config.yaml"
        record.write_text("model: {}")
        os.utime(record, (i, i))
    found = "found nothing"
    if not missing:
        found = f"found a folder of runs (version_1, version_0), such as {runs / 'version_1'}"
    for args in (
        *(["report"], ["diagnose"], ["sweep", "--guidance=1"], ["export", "--to=torch"], ["app"]),
        *(["validate"], ["test"], ["predict"]),
    ):
        assert main([args[0], str(runs), *args[1:]]) == 2
        line = capsys.readouterr().err.strip()
        assert f"{runs}: must be the folder of a run" in line, line
        assert line.endswith(found), line
    with pytest.raises(ConfigError, match=re.escape(found)):
        load_run(runs)
    message = looked(["fit", "--config", str(DIT), f"--ckpt_path={runs}"])
    assert found in message
    if not missing:  # from one folder above
        assert f"(digits/version_1, digits/version_0), such as {runs}" in str(no_run(tmp_path, ""))


def test_a_run_whose_data_are_gone(tmp_path, capsys):
    settings = "{root: /nope, image_size: 8, batch_size: 2}"
    text = f"{{class_path: ant_lightning.ImageFolderData, init_args: {settings}}}"
    newest = tmp_path / "config_1.yaml"
    (tmp_path / "config.yaml").write_text(
        first := "model: {class_path: DiTModule}\ndata: "
    )  # an older record
    newest.write_text(f"{first}{text}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.ckpt").write_bytes(b"")
    for args in (
        ["sweep", str(tmp_path), "--guidance", "1"],
        ["diagnose", str(tmp_path), "--num_images", "8"],
        ["score", "--config", str(newest), "--images", str(tmp_path)],
        ["validate", "--config", str(newest)],
        ["predict", str(tmp_path)],
    ):
        assert main(args) == 2
        line = "data.root: must be a folder of images, found nothing at /nope"
        assert capsys.readouterr().err == f"ant-lightning: error: {line}\n"


@pytest.mark.parametrize("name", ["tensorboard", "WandB", "mlflow", "CSV", "comet", "csvlogger"])
def test_loggers_have_short_names_on_the_command_line(name):
    (kind,) = with_classes_of_loggers([f"--trainer.logger={name}"])
    assert with_classes_of_loggers(["--trainer.logger", name]) == [kind]
    kind = kind.partition("=")[2]
    made = getattr(loggers, kind)
    assert issubclass(made, loggers.Logger)
    assert places_of(kind).keys() <= set(inspect.signature(made).parameters)
    assert with_classes_of_loggers(["--x", name, f"--trainer.logger={kind}"])[1] == name
    message = looked(["fit", "--config", str(DIT), f"--trainer.logger={kind}"])
    assert message is None or message.startswith(f"trainer.logger: {kind} needs a package, found")
    assert looked(["predict", "--config", str(DIT), f"--trainer.logger={kind}"]) is None


@pytest.mark.parametrize(
    "option",
    [
        ["--trainer.logger", "mlflow"],
        ["--trainer.logger.class_path=MLflow"],
        ["--trainer.logger={class_path: mlflow, init_args: {tracking_uri: 'sqlite:///a.db'}}"],
    ],
)
def test_the_name_of_a_run_becomes_the_experiment_of_mlflow(option):
    found = with_classes_of_loggers(["fit", "--config", str(DIT), *option])
    assert found[-1] == "--trainer.logger.experiment_name=digits_dit"
    named = [*option[:-1], option[-1], "--trainer.logger.experiment_name=mine"]
    assert with_classes_of_loggers(["fit", "--config", str(DIT), *named])[-1] == named[-1]
    own = "{class_path: mlflow, init_args: {experiment_name: mine}}"
    given = with_classes_of_loggers(["fit", "--config", str(DIT), "--trainer.logger", own])
    assert not any(each.startswith("--trainer.logger.experiment_name") for each in given)


def test_a_logger_needs_its_package(monkeypatch):
    found = "trainer.logger: {} needs a package, found none; pip install {}"
    monkeypatch.setattr("ant_lightning.cli.logger_names.find_spec", lambda _: None)
    for given, kind, install in (
        ("comet", "CometLogger", "comet_ml"),
        ("[csv, wandb]", "WandbLogger", "'ant-lightning[wandb]'"),
        ("{class_path: mlflow}", "MLFlowLogger", "'ant-lightning[mlflow]'"),
    ):
        options = with_classes_of_loggers([f"--trainer.logger={given}"])
        args = ["fit", "--config", str(DIT), *options]
        assert looked(args) == found.format(kind, install)
        assert looked([*args, "--print_config"]) is None


def test_stored_images_need_the_size_of_the_data(tmp_path):
    for name, size in (("a.png", (9, 9)), ("b.png", (12, 9)), ("c.png", (9, 10))):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "real" / name)
    images = f"--images={tmp_path / 'real'}"
    args = with_paths_of_configs(["score", *FOLDER, f"--data.root={tmp_path}", images])
    args += ["--metrics.extractor=ant_lightning.ShapesFeatures"]
    found = f"found 12 x 9 in {tmp_path / 'real' / 'b.png'}, and 1 more of other sizes"
    sized = [*args, "--data.image_size=9"]
    assert looked(sized) == f"images: must be 9 x 9 (data.image_size), {found}"
    assert looked([*sized, "--metrics.reference=x.npz", "--metrics.with_train=false"]) is None
    (tmp_path / "real" / "c.png").unlink()
    (tmp_path / "real" / "b.png").write_bytes(b"no image: the command says it")
    assert looked([*sized, "--data.validate_images=off"]) is None


def test_a_misspelt_run_is_answered_with_those_beside_it(tmp_path):
    (tmp_path / "runs" / "mine" / "version_0").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "version_0" / "config.yaml").touch()
    runs = tmp_path / "runs"
    known = f"{runs} is a folder of runs (mine/version_0), such as {runs}/mine/version_0"
    wrong = f"{runs / 'nope'}: must be the folder of a run, found nothing; {known}"
    assert looked(["report", str(runs / "nope")]) == wrong


def test_an_export_needs_a_checkpoint_and_drawn_classes_need_names(tmp_path):
    (tmp_path / "config.yaml").write_text(DIT.read_text())
    no_checkpoint = f"{tmp_path}: must be {RUN_OR_CHECKPOINT}, found no checkpoint in it"
    assert looked(["export", str(tmp_path), "--to=torch"]) == no_checkpoint
    write_class_map(tmp_path / "class_map.json", ["ball", "dahlia", "temple"])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    args = ["predict", "--config", str(DIT), f"--ckpt_path={tmp_path}", "--samples.classes"]
    known = "0 ball, 1 dahlia, 2 temple, or 3 for no class"
    for classes, wrong in (("[bal]", "bal"), ("[0, 7]", "7")):
        assert looked([*args, classes]) == f"samples.classes: must be {known}, found {wrong}"
    for classes in ("[ball, 2]", "[3]", "null"):
        assert looked([*args, classes]) is None


CSV = "{class_path: csv}"
WANDB = "{class_path: wandb, init_args: {offline: true}, dict_kwargs: {new: [a]}}"
SEVERAL = {  # options, and the loggers that they make
    "a dict": (["--trainer.logger", CSV], "CSV"),
    "a class path": (["--trainer.logger.class_path", "csv"], "CSV"),
    "in the trainer": (["--trainer", "{logger: csv}"], "CSV"),
    "in a file of the trainer": (["--trainer", "trainer.yaml"], "CSV"),
    "in a file of the logger": (["--trainer.logger=logger.yaml"], "CSV"),
    "a list": (["--trainer.logger", "[wandb, csv]"], "Wandb CSV"),
    "dicts in a list": (["--trainer.logger", f"[{WANDB}, {CSV}]"], "Wandb CSV"),
    "a list in the trainer": (["--trainer={logger: [wandb, csv]}"], "Wandb CSV"),
    "added": (["--trainer.logger=wandb", "--trainer.logger+=csv"], "Wandb CSV"),
    "added to the config's": (["--trainer.logger+", "CSV"], "TensorBoard CSV"),
    "added to a dict": (["--trainer.logger", WANDB, "--trainer.logger+", CSV], "Wandb CSV"),
    "added to a file": (["--trainer", "trainer.yaml", "--trainer.logger+=wandb"], "CSV Wandb"),
    "a list added": (["--trainer.logger+", "[csv, wandb]"], "TensorBoard CSV Wandb"),
    "two added": (
        ["--trainer.logger+", "csv", "--trainer.logger+", "wandb"],
        "TensorBoard CSV Wandb",
    ),
    "after somebody's": (
        [f"--trainer.logger+={__name__}.TheirLogger", "--trainer.logger+=csv"],
        "TensorBoard Their CSV",
    ),
    "with a setting": (
        ["--trainer.logger=wandb", "--trainer.logger.offline", "true", "--trainer.logger+=csv"],
        "Wandb CSV",
    ),
    "a setting in a list": (
        [
            "--trainer.logger=[csv, wandb]",
            "--trainer.logger.offline=true",
            "--trainer.logger+=mlflow",
        ],
        "CSV Wandb MLFlow",
    ),
    "a list in a file": (["--config", "list.yaml"], "Wandb CSV"),
    "a list in a file, one added": (
        ["--config=list.yaml", "--trainer.logger+=csv"],
        "Wandb CSV CSV",
    ),
    "one in a file, one added": (["--config=one.yaml", "--trainer.logger+=wandb"], "CSV Wandb"),
}
FIRST = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "n"}}


class TheirLogger(loggers.CSVLogger):
    def __init__(self, save_dir: str = "logs", name: str = "n"):
        super().__init__(save_dir, name)


@pytest.fixture(scope="module")
def loggers_of(tmp_path_factory):
    """The loggers that the parser makes of options."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, "trainer")

    def made(options):
        args = with_classes_of_loggers(["fit", *options])
        assert looked([*args, "--print_config"]) is None
        found = parser.parse_args(args[1:]).trainer.logger
        return found if isinstance(found, list) else [found]

    return made


def kinds(made):
    return [each.class_path.rpartition(".")[2].removesuffix("Logger") for each in made]


@pytest.mark.parametrize("what", SEVERAL)
def test_loggers_by_short_names_log_where_the_configs_would(
    what, loggers_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("trainer: {logger: [wandb, csv]}")
    Path("one.yaml").write_text("trainer: {logger: {class_path: csv}}")
    Path("trainer.yaml").write_text("logger: csv")
    Path("logger.yaml").write_text("class_path: csv")
    options, expected = SEVERAL[what]
    made = loggers_of(["--config", json.dumps({"trainer": {"logger": FIRST}}), *options])
    assert kinds(made) == expected.split()
    for each in made:
        assert each.init_args.save_dir == "logs"
        assert each.init_args.get("name", "n") == "n"
        if "setting" in what and hasattr(each.init_args, "offline"):
            assert each.init_args.offline is True
        if WANDB in options:
            assert "Wandb" not in each.class_path or each.dict_kwargs == {"new": ["a"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.logger+", "csv"], "CSV"),
        (["--trainer.logger=true", "--trainer.logger+", "csv"], "TensorBoard CSV"),
        (["--trainer.logger=false", "--trainer.logger+", "csv"], "CSV"),
        ([f"--trainer.logger=[{WANDB}, csv]"], "Wandb CSV"),
        ([f"--trainer.logger=[comet, {CSV}]"], "Comet CSV"),
        (["--trainer.logger=csv"], "CSV"),
        (["--trainer.logger=lightning.pytorch.loggers.CSVLogger"], "CSV"),
        (["--trainer.logger", WANDB], "Wandb"),
        (["--trainer.logger", WANDB, "--trainer.logger+=csv"], "Wandb CSV"),
        (["--config={trainer: {logger: [wandb, csv]}}"], "Wandb CSV"),
    ],
)
def test_loggers_without_a_place_log_into_runs(options, expected, loggers_of):
    made = loggers_of(options)
    assert kinds(made) == expected.split()
    assert {each.init_args.get("save_dir", "runs") for each in made} == {"runs"}
    assert made[-1].init_args.save_dir == "runs"


def test_a_mistake_in_the_trainer_given_as_a_whole_is_named_once():
    said = 'Parser key "trainer": Parser key "trainer.max_steps": '
    said += "Expected a <class 'int'>. Got value: x"
    assert one_line(said) == "trainer.max_steps: must be a whole number, found x"


def test_what_measures_nothing_asks_for_no_extractor():
    gone = callback("GenerationMetrics", extractor={**DINO, "init_args": {"folder": "/nope"}})
    args = ["--config", str(DIT), gone]
    assert looked(["predict", *args]) is None
    assert looked(["validate", *args, "--scores", "false"]) is None
    assert "at /nope/config.json; --scores false leaves the scores out" in looked(
        ["validate", *args]
    )


def configs():
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in {"studies"})


@pytest.mark.parametrize("path", configs(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_passes(path):
    args = ["fit", "--config", str(DIT), "--config", str(path), "--print_config"]  # without data
    if path.stem == "encode":
        args = ["encode", "--config", str(path), "--print_config"]
    assert looked(args) is None


@pytest.mark.parametrize("name", VALID)
def test_what_the_parser_accepts_is_never_refused(tmp_path, name):
    assert looked(arguments(tmp_path, *VALID[name])) is None


def test_the_parser_accepts_all_of_it(tmp_path):
    options = [option for each in VALID.values() for option in each]
    args = arguments(tmp_path, *options)
    assert looked(args) is None
    parsed(args)


def parsed(args):
    """Raises what the whole parser says."""

    class Parsed(AntCLI):
        def before_instantiate_classes(self):
            super().before_instantiate_classes()
            raise KeyboardInterrupt  # far enough

    from ant_lightning.cli import parser as cli

    kept, cli.AntCLI = cli.AntCLI, Parsed
    try:
        with pytest.raises(KeyboardInterrupt):
            cli.run(args)
    finally:
        cli.AntCLI = kept


def test_a_class_of_somebody_else_may_bring_others_with_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    own = [
        "--data=mine.Data",
        "--model.tasks.balancer=MyBalancer",
        "--model.tasks.balancer.strength=3",
    ]
    assert looked(arguments(tmp_path, *own)) is None


def test_a_checkpoint_that_is_there_passes(tmp_path):
    path = tmp_path / "checkpoints" / "a.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"")
    for each in (str(path), str(path.parent), str(tmp_path), "last", "s3://bucket/a.ckpt"):
        assert looked(["validate", "--config", str(DIT), f"--ckpt_path={each}"]) is None
        assert looked(["validate", "--config", str(DIT), "--ckpt_path", each]) is None


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_names_at_the_top_are_the_parsers(command, monkeypatch):
    found = {}

    class Names(AntCLI):
        def parse_arguments(self, parser, args):
            actions = self._subcommand_parsers[args[0]]._actions
            found.update(dict.fromkeys(a.dest.split(".")[0] for a in actions))
            raise KeyboardInterrupt

    from ant_lightning.cli import parser as cli

    monkeypatch.setattr(cli, "AntCLI", Names)
    with pytest.raises(KeyboardInterrupt):
        cli.run([command])
    assert top_settings(command) == sorted(found.keys() - {"help"})


@pytest.mark.parametrize("name", ["CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"])
def test_the_arguments_of_loggers_are_those_of_the_class(name):
    if name == "WandbLogger":
        wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
        own = set(inspect.signature(wandb.init).parameters)
    else:
        own = set(inspect.signature(SummaryWriter).parameters) if "Tensor" in name else set()
    own |= set(inspect.signature(getattr(loggers, name)).parameters) - {"kwargs"}
    assert arguments_of(name) == own


def test_bounds_are_those_of_constructors():
    check = "check_whole"
    assert checks_of("UncertaintyWeighting")["num_tasks"] == ((check, (1,)),)  # of its base
    assert "num_held_out" not in checks_of("DigitsMixture")  # which has a check of its own
    assert checks_of("NoSuchClass") == {}


def test_arguments_that_are_handed_on_are_known():
    assert {"backbone", "tasks", "class_dropout", "optimization"} <= arguments_of("DiTModule")
    assert {"at_steps", "monitor", "save_top_k"} <= arguments_of("Checkpoints")
    assert arguments_of("NoSuchClass") is None


BLOCKED = """
import sys
from importlib.machinery import PathFinder
class Blocked:  # they can be found, but not imported
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "lightning.pytorch", "lightning.fabric"}:
            found = PathFinder.find_spec(name, path)
            found.loader = self
            return found
    def create_module(self, spec):
        raise ImportError(spec.name + " was imported")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocked())
import inspect
import json
from ant_lightning.cli.logger_names import places_of
from ant_lightning.cli.main import main
from ant_lightning.cli.messages import one_line
for args in json.loads(sys.argv[1]):
    assert main(args) == 2, args
"""


def test_mistakes_are_answered_where_torch_and_lightning_cannot_be_imported(tmp_path):
    commands = [args for args, _ in MORE.values()]
    for name, (text, _) in FILES.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        commands.append(["fit", "--config", str(DIT), "--config", str(path)])
    commands += [arguments(tmp_path, *SETTINGS[name][0]) for name in SEEN]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    assert all(line.startswith("ant-lightning: error: ") for line in lines)
