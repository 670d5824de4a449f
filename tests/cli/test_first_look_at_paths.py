"""A path at which nothing is, or something else, is seen before anything is imported."""

import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from wrong_settings import DIT, callback, looked

from ant_lightning import ConfigError, load_run
from ant_lightning.cli import path_settings
from ant_lightning.cli.configs import with_paths_of_configs
from ant_lightning.cli.main import main
from ant_lightning.data.class_map import write_class_map
from ant_lightning.generation import inception_file
from ant_lightning.runtime.run_files import RUN_OR_CHECKPOINT, no_run

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
METRICS = callback("GenerationMetrics")


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


def test_what_measures_nothing_asks_for_no_extractor():
    gone = callback("GenerationMetrics", extractor={**DINO, "init_args": {"folder": "/nope"}})
    args = ["--config", str(DIT), gone]
    assert looked(["predict", *args]) is None
    assert looked(["validate", *args, "--scores", "false"]) is None
    assert "at /nope/config.json; --scores false leaves the scores out" in looked(
        ["validate", *args]
    )


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


def test_a_checkpoint_that_is_there_passes(tmp_path):
    path = tmp_path / "checkpoints" / "a.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"")
    for each in (str(path), str(path.parent), str(tmp_path), "last", "s3://bucket/a.ckpt"):
        assert looked(["validate", "--config", str(DIT), f"--ckpt_path={each}"]) is None
        assert looked(["validate", "--config", str(DIT), "--ckpt_path", each]) is None
