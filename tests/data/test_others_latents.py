"""Latents of EDM2, REPA and LightningDiT: their files, formulas, split, and a run on them."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from first_stages import save_first_stages
from grouped import grouped
from lightning import Trainer
from PIL import Image
from safetensors.torch import save_file

from ant_lightning import (
    DDIM,
    CosineSchedule,
    DiT,
    DiTModule,
    EDM2LatentsData,
    FirstStage,
    LightningDiTLatentsData,
    REPALatentsData,
    TimestepClustering,
)
from ant_lightning.data.loader import ShuffledLoader
from ant_lightning.errors import ConfigError

RNG = np.random.default_rng(0)
COUNT = 12
MEAN = RNG.normal(size=(COUNT, 4, 4, 4)).astype(np.float32) * 4
STD = RNG.uniform(0.1, 2, size=(COUNT, 4, 4, 4)).astype(np.float32)
NAMES = [f"{i // 5:05}/img-mean-std-{i:08}.npy" for i in range(COUNT)]
LABELS = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(NAMES)]})


def npy(index):
    file = io.BytesIO()
    np.save(file, np.concatenate([MEAN[index], STD[index]]))
    return file.getvalue()


def edm2_folder(root):
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(npy(i))
    (root / "dataset.json").write_text(LABELS)
    return str(root)


def edm2_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, name in enumerate(NAMES):
            archive.writestr(name, npy(i))
        archive.writestr("dataset.json", LABELS)
    return str(path)


def repa(root):
    edm2_folder(root / "vae-sd")
    for i in range(COUNT):
        path = root / "images" / f"{i // 5:05}" / f"img{i:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(path)
    return str(root)


def lightning_dit(root, **changes):
    z = torch.from_numpy(MEAN)
    for shard, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, COUNT))):
        tensors = {"latents": z[rows], "latents_flip": z[rows].flip(-1)}
        tensors["labels"] = torch.arange(COUNT)[rows] % 3
        tensors = {k: v.contiguous() for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(tensors, root / f"latents_rank{shard % 2:02}_shard{shard // 2:03}.safetensors")
    stats = {"mean": z.mean((0, 2, 3), keepdim=True), "std": z.std((0, 2, 3), keepdim=True)}
    torch.save(stats, root / "latents_stats.pt")
    return str(root)


MADE = {
    "edm2 folder": lambda root, **s: EDM2LatentsData(edm2_folder(root), **s),
    "edm2 zip": lambda root, **s: EDM2LatentsData(edm2_zip(root / "a.zip"), **s),
    "repa": lambda root, **s: REPALatentsData(repa(root), **s),
    "lightning dit": lambda root, **s: LightningDiTLatentsData(lightning_dit(root), **s),
}
SETTINGS = {"batch_size": 2, "num_workers": 0, "seed": 0}


def official(kind, noise):
    """The latents as the programs that wrote the files compute them, float64."""
    mean, std, noise = (np.asarray(each, np.float64) for each in (MEAN, STD, noise))
    if kind.startswith("edm2"):
        raw_mean = np.array([5.81, 3.25, 0.12, -2.15]).reshape(1, 4, 1, 1)
        raw_std = np.array([4.17, 4.62, 3.71, 3.28]).reshape(1, 4, 1, 1)
        return (mean + std * noise) * (0.5 / raw_std) + (0 - raw_mean * (0.5 / raw_std))
    if kind == "repa":
        return (mean + std * noise) * 0.18215
    order = [*range(5), *range(6, COUNT), 5]  # rank 0, its two shards, then rank 1
    z = mean[order]
    return (z - mean.mean((0, 2, 3), keepdims=True)) / mean.std((0, 2, 3), ddof=1, keepdims=True)


@pytest.mark.parametrize("kind", MADE)
def test_latents_follow_the_formula_of_the_program_that_wrote_them(kind, tmp_path):
    data = MADE[kind](tmp_path, **SETTINGS)
    assert data.shape_and_classes() == ((4, 4, 4), 3)
    noise = torch.from_numpy(RNG.normal(size=MEAN.shape)).float()
    parts = (data.train_images, data.held_out_images)
    positions = torch.cat([part.positions for part in parts])
    assert sorted(positions.tolist()) == list(range(COUNT))
    batches = [part.load(list(range(len(part))), epoch=None) for part in parts]
    moments = torch.cat([batch.images for batch in batches])
    found = data.latent_space.sample(moments, noise[positions])
    expected = torch.from_numpy(official(kind, noise))[positions]
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5)
    z = torch.from_numpy(MEAN).double()
    raw = data.latent_space.raw(torch.from_numpy(official(kind, 0 * noise)))
    order = positions if kind != "lightning dit" else torch.tensor([*range(5), *range(6, 12), 5])
    if kind != "lightning dit":
        raw = raw[order]
    assert torch.allclose(raw, z[order], atol=1e-5)
    labels = torch.cat([batch.labels for batch in batches])
    truth = order[positions] if kind == "lightning dit" else positions
    assert labels.tolist() == (truth % 3).tolist()


@pytest.mark.parametrize("kind", ["edm2 zip", "lightning dit"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_latent_once_an_epoch_for_ranks(kind, world_size, tmp_path):
    images = MADE[kind](tmp_path, num_held_out=4, **SETTINGS).train_images
    whole = list(ShuffledLoader(images, batch_size=4, seed=1))
    assert sorted(torch.cat([batch.indices for batch in whole]).tolist()) == list(range(8))
    for rank in range(world_size):
        loader = ShuffledLoader(images, batch_size=4, seed=1, rank=rank, world_size=world_size)
        part = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        for mine, batch in zip(loader, whole, strict=True):
            assert torch.equal(mine.images, batch.images[part])


def test_mirrored_latents_of_lightning_dit_in_half_of_the_epochs(tmp_path):
    data = MADE["lightning dit"](tmp_path, **SETTINGS)
    plain = data.train_images.load([3], epoch=None).images
    drawn = [data.train_images.load([3], epoch=epoch).images for epoch in range(20)]
    mirrored = [torch.equal(each, plain.flip(-1)) for each in drawn]
    assert 4 <= sum(mirrored) <= 16
    same = [torch.equal(each, plain) for each in drawn]
    assert [not each for each in mirrored] == same
    plain_only = MADE["lightning dit"](tmp_path, flip=False, **SETTINGS)
    assert all(
        torch.equal(plain_only.train_images.load([3], epoch=e).images, plain) for e in range(9)
    )


def test_images_beside_latents_are_those_of_the_latents(tmp_path):
    data = MADE["repa"](tmp_path, num_held_out=4, **SETTINGS)
    for part in (data.train_images, data.held_out_images):
        found = part.pixels(range(len(part)))[:, 0, 0, 0]
        assert found.tolist() == (20 * part.positions).tolist()
    without = MADE["edm2 zip"](tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="images: must be given for metrics"):
        without.train_images.pixels([0])


def network(first_stage=None):
    torch.manual_seed(0)
    return DiTModule(
        DiT(input_size=4, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=1,
            num_classes=3),
        first_stage=first_stage,
        **grouped(
            schedule=CosineSchedule(100),
            variance_type="learned_range",
            clustering=TimestepClustering(num_tasks=2),
            sampler=DDIM(num_steps=2),
        ),
    )  # fmt: skip


def test_a_run_on_latents_of_others_decodes_with_their_statistics(tmp_path):
    first_stage = FirstStage(str(save_first_stages(tmp_path) / "kl"))
    data = MADE["edm2 folder"](tmp_path / "data", **SETTINGS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet, limit_val_batches=1,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(network(first_stage), datamodule=data)
    module = trainer.lightning_module
    assert module.latent_space == data.latent_space
    x = torch.from_numpy(official("edm2", 0 * MEAN)).float()[:2]
    z = torch.from_numpy(MEAN)[:2]
    expected = first_stage._autoencoder.decode(z).sample.clamp(-1, 1)
    assert torch.allclose(module.decode(x), expected, atol=1e-4)
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    again = network(first_stage)
    again.on_load_checkpoint(torch.load(tmp_path / "w.ckpt", weights_only=True))
    assert again.latent_space == data.latent_space


@pytest.mark.parametrize(("scale", "mean", "std"), [(0.3, [1.0, -2, 3, 4], [2.0, 1, 4, 0.5])])
def test_means_and_deviations_in_a_first_stage_are_honoured(scale, mean, std, tmp_path):
    folder = save_first_stages(tmp_path) / "kl"
    plain = FirstStage(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"scaling_factor": scale, "latents_mean": mean, "latents_std": std}
    path.write_text(json.dumps(config))
    stage = FirstStage(str(folder))
    z = torch.randn(2, 4, 3, 3)
    x = (z - torch.tensor(mean).view(4, 1, 1)) * scale / torch.tensor(std).view(4, 1, 1)
    moments = torch.cat([z, torch.zeros_like(z)], dim=1)
    assert torch.allclose(stage.space.sample(moments, 0 * z), x, atol=1e-6)
    expected = plain._autoencoder.decode(z).sample.clamp(-1, 1)
    assert torch.allclose(stage.decode(x), expected, atol=1e-5)
    assert stage.fingerprint != plain.fingerprint
    assert FirstStage(str(folder), scale=0.18215, shift=0.0).fingerprint == plain.fingerprint
    with pytest.raises(ConfigError, match="scale: must be one number, or one for each of the 4"):
        FirstStage(str(folder), scale=[1.0, 2.0])


def pickled(root):
    np.save(root / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    return EDM2LatentsData(str(root), **SETTINGS)


def no_statistics(root):
    folder = lightning_dit(root)
    (root / "latents_stats.pt").unlink()
    return LightningDiTLatentsData(folder, **SETTINGS)


WRONG = {
    "no files": (
        lambda r: EDM2LatentsData(str(r), **SETTINGS),
        "path: must hold files of type .npy",
    ),
    "no shards": (
        lambda r: LightningDiTLatentsData(str(r), **SETTINGS),
        "path: must be a folder with latents_rankRR",
    ),
    "no statistics": (no_statistics, "latents_stats.pt: no such file"),
    "no mirrored": (
        lambda r: LightningDiTLatentsData(lightning_dit(r, latents_flip=None), **SETTINGS),
        "must hold latents, labels, latents_flip",
    ),
    "a pickle": (pickled, "must be floats [2c, h, w], found"),
    "channels": (
        lambda r: EDM2LatentsData(edm2_folder(r), raw_mean=[0.0], raw_std=[1.0], **SETTINGS),
        "raw_mean: must have one for each of the 4 channels, found 1",
    ),
    "classes": (
        lambda r: EDM2LatentsData(edm2_folder(r), num_classes=2, **SETTINGS),
        "num_classes: must be at least 3, found 2",
    ),
    "other images": (
        lambda r: EDM2LatentsData(edm2_folder(r), images=[1, 2], **SETTINGS),
        "images: must be the 12 of the latents, found 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_refused(name, tmp_path):
    make, said = WRONG[name]
    with pytest.raises(ConfigError) as error:
        make(tmp_path)
    assert said in str(error.value)
