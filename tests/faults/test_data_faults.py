"""Loading processes that die, scheduler signals that reach them, images that break meanwhile."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from test_killed_runs import process
from tiny_fit import assert_same, fit, module

from ant_lightning import EMA, Checkpoints, DigitsData, ImageFolderData, __main__
from ant_lightning.cli import parser as cli
from ant_lightning.data.dataset import TensorImages
from ant_lightning.data.loader import ShuffledLoader
from ant_lightning.data.workers import dead_worker
from ant_lightning.errors import DataLoadingError, FileError, message_of

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"


def command_line(run, stderr, *args):
    """A process that ends as the command line would after `run`."""
    torch.set_num_threads(1)
    cli.run = lambda arguments: run(*args)
    sys.stderr = stderr.open("w")
    sys.exit(__main__.main(["fit", f"--config={CONFIG}"]))  # what it holds is not run


class KillWorker(L.Callback):
    """One of the loading processes dies, as for want of memory, while a step is made."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5:
            trainer.train_dataloader._iterator._workers[0].kill()


def with_a_worker_that_dies(folder):
    fit(folder, workers=2, callbacks=[KillWorker()], every=2)


@pytest.mark.slow
def test_a_loading_process_that_dies_ends_the_run_in_one_line(tmp_path):
    stderr = tmp_path / "stderr"
    assert process(command_line, with_a_worker_that_dies, stderr, tmp_path / "run") == 1
    line = stderr.read_text().splitlines()[-1]
    assert line.startswith("ant-lightning: error: data.num_workers: the processes that load data")
    assert "found DataLoader worker (pid" in line
    last = tmp_path / "run" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] in {4, 6}
    fit(tmp_path / "run", workers=2, every=2, resume=last)
    fit(tmp_path / "whole", workers=2, every=2)
    assert_same(last, tmp_path / "whole" / "last.ckpt")


def test_loading_processes_end_with_the_run(tmp_path):
    trainer = fit(tmp_path, workers=2)
    assert trainer.train_dataloader._iterator is None
    assert not multiprocessing.active_children()


class Deadly(TensorImages):
    def load(self, indices, *, epoch):
        os._exit(7)


def test_a_loader_says_that_its_process_died():
    images = Deadly(torch.zeros(4, 1, 8, 8), torch.zeros(4))
    loader = ShuffledLoader(images, batch_size=2, seed=0, num_workers=1)
    try:
        with pytest.raises(DataLoadingError, match=r"data\.num_workers: .* \(pid.*\) exited"):
            next(iter(loader))
    finally:  # until then PyTorch reports it at the end of every other process, too
        loader._iterator._shutdown_workers()
    assert dead_worker(RuntimeError("shapes do not match")) is None


class KillAll(L.Callback):
    """A scheduler tells every process of the run, as SLURM does, in the middle of a step."""

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 3:
            for each in ("-USR1", "-TERM"):
                subprocess.run(
                    ["kill", each, "--", f"-{os.getpgid(0)}"], check=True, start_new_session=True
                )


class Patient(L.Callback):
    """Waits for workers that are to die of a signal."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            for worker in trainer.train_dataloader._iterator._workers:
                worker.join(0.5)
                assert worker.is_alive()


def told_to_stop(folder):
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    try:
        fit(folder, workers=2, callbacks=[KillAll(), Patient()], every=100)
    except SIGTERMException:
        os._exit(143)


def test_a_signal_to_all_processes_leaves_a_checkpoint_of_the_step(tmp_path):
    assert process(told_to_stop, tmp_path) == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_workers_end_when_the_run_ends_them():
    data = DigitsData(batch_size=300)
    data.num_workers = 1
    loader = data.train_dataloader()
    next(iter(loader))
    (worker,) = loader._iterator._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


class Corrupt(L.Callback):
    """An image is overwritten after it was checked and before it is read."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            self.path.write_bytes(b"no longer an image")


def train_on_folder(
    folder, images, *callbacks, resume=None, validate_images="raise", steps=9, labels="none"
):
    data = ImageFolderData(
        str(images),
        image_size=8,
        channels=1,
        batch_size=4,
        num_held_out=2,
        num_workers=1,
        validate_images=validate_images,
        labels=labels,
        seed=0,
    )
    checkpoints = Checkpoints(dirpath=folder, every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[EMA(decay=0.9), *callbacks, checkpoints],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    # Without labels all images are of class 0.
    trainer.fit(module(num_classes=1 if labels == "none" else 2), data, ckpt_path=resume)
    return data


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(34):  # 32 to train on: 8 steps an epoch
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.slow
def test_an_image_that_breaks_meanwhile_is_named_and_nothing_is_lost(tmp_path, images):
    data = train_on_folder(tmp_path / "whole", images)
    order = [i for batch in data.train_dataloader() for i in batch.indices.tolist()]
    path = data.train_images.paths[order[-1]]
    content = path.read_bytes()

    stderr = tmp_path / "stderr"
    arguments = (train_on_folder, stderr, tmp_path / "run", images, Corrupt(path))
    assert process(command_line, *arguments) == 2
    line = stderr.read_text().splitlines()[-1]
    assert line.startswith(f"ant-lightning: error: {path}: cannot be decoded")
    last = tmp_path / "run" / "last.ckpt"
    assert 4 <= torch.load(last, weights_only=True)["global_step"] <= 7
    # Without it the run goes on, and says that the order of the images is another.
    with (
        pytest.warns(UserWarning, match="left out 1 broken"),
        pytest.warns(UserWarning, match="number of training images: the checkpoint has 32, .* 31:"),
    ):
        train_on_folder(tmp_path / "skip", images, resume=last, validate_images="skip")
    path.write_bytes(content)
    train_on_folder(tmp_path / "run", images, resume=last)
    assert_same(tmp_path / "whole" / "last.ckpt", last)


def test_a_run_on_names_that_are_not_utf8_resumes(tmp_path, images):
    latin = os.fsdecode(b"caf\xe9")
    for i, path in enumerate(sorted(images.iterdir())):
        folder = images / ["b", latin][i % 2]
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{latin}{i}.png")
    run = {"labels": "folders"}
    train_on_folder(tmp_path / "whole", images, **run)
    train_on_folder(tmp_path / "run", images, steps=4, **run)
    train_on_folder(tmp_path / "run", images, resume=tmp_path / "run" / "last.ckpt", **run)
    assert_same(tmp_path / "whole" / "last.ckpt", tmp_path / "run" / "last.ckpt")


def test_the_message_of_an_error_in_a_worker_has_no_traceback():
    error = FileError(
        "Caught FileError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py"\nant_lightning.errors.FileError: image a.png: cannot\n'
    )
    assert message_of(error) == "image a.png: cannot"
    assert message_of(ValueError("FileError: two\nlines")) == "FileError: two lines"
