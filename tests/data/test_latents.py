"""The latent cache and the modules on latents: what is read is what was encoded."""

import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from first_stages import save_first_stages
from grouped import grouped
from lightning import Trainer
from safetensors.torch import save_file

from ant_lightning import (
    DDIM,
    Batch,
    ConfigError,
    CosineSchedule,
    DiT,
    DiTModule,
    FirstStage,
    LatentsData,
    LatentWriter,
    LDMModule,
    ShapesData,
    TimestepClustering,
    UNet,
    load_run,
)
from ant_lightning.cli.main import main
from ant_lightning.files.safetensors_file import read_safetensors


@pytest.fixture(scope="module")
def tiny_first_stages(tmp_path_factory):
    return save_first_stages(tmp_path_factory.mktemp("first_stages"))


@pytest.fixture(scope="module")
def stage(tiny_first_stages):
    return FirstStage(str(tiny_first_stages / "kl"), scale=0.5)


def shapes(**options):
    defaults = {
        "image_size": 16,
        "num_images": 13,
        "num_held_out": 5,
        "num_classes": 3,
        "batch_size": 4,
    }
    return ShapesData(**{**defaults, **options})


@pytest.fixture
def cache(tmp_path, stage):
    folder = tmp_path / "cache"
    LatentWriter(str(folder), shard_size=4, batch_size=3).write(shapes(), stage)
    return folder


UNET = {
    "input_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "num_classes": 3,
}
LDM = {
    "class_path": "ant_lightning.LDMModule",
    "init_args": {
        "backbone": {"class_path": "ant_lightning.UNet", "init_args": UNET},
        "process": {
            "class_path": "ant_lightning.DiscreteDiffusion",
            "init_args": {
                "schedule": {
                    "class_path": "ant_lightning.CosineSchedule",
                    "init_args": {"num_timesteps": 50},
                }
            },
        },
        "tasks": {
            "clustering": {
                "class_path": "ant_lightning.TimestepClustering",
                "init_args": {"num_tasks": 2},
            }
        },
        "sampling": {
            "sampler": {"class_path": "ant_lightning.DDIM", "init_args": {"num_steps": 2}}
        },
        "seed": 5,
    },
}


def unet(num_classes=3):
    torch.manual_seed(3)
    return UNet(**{**UNET, "num_classes": num_classes})


def ldm_settings(stage, **options):
    return grouped(
        **{
            "schedule": CosineSchedule(50),
            "variance_type": "fixed_small",
            "clustering": TimestepClustering(2),
            "sampler": DDIM(num_steps=2),
            "first_stage": stage,
            "seed": 5,
            **options,
        }
    )


def unet_module(stage, num_classes=3, **options):
    return LDMModule(unet(num_classes), **ldm_settings(stage, **options))


def trainer(folder, **options):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, **options},
    )


def test_the_cache_holds_the_moments_of_the_images_and_of_their_mirrors(cache, stage):
    data, images = LatentsData(str(cache), batch_size=4), shapes()
    for split in ("train_images", "held_out_images"):
        real, cached = getattr(images, split), getattr(data, split)
        rows = list(range(len(real)))
        plain, batch = real.load(rows, epoch=None), cached.load(rows, epoch=None)
        torch.testing.assert_close(batch.images, stage.encode_moments(plain.images))
        assert torch.equal(batch.labels, plain.labels)
    mirrors = stage.encode_moments(
        images.train_images.load(list(range(13)), epoch=None).images.flip(-1)
    )
    plain = data.train_images.load(list(range(13)), epoch=None).images
    seen = [data.train_images.load(list(range(13)), epoch=epoch).images for epoch in range(8)]
    is_mirror = torch.stack([((each - mirrors).abs().amax((1, 2, 3)) < 1e-4) for each in seen])
    is_plain = torch.stack([((each - plain).abs().amax((1, 2, 3)) < 1e-6) for each in seen])
    assert bool((is_mirror ^ is_plain).all())
    assert 26 <= int(is_mirror.sum()) <= 78  # of 104
    unmirrored = LatentsData(str(cache), batch_size=4, flip=False)
    assert torch.equal(unmirrored.train_images.load([1], epoch=3).images, plain[1:2])
    assert data.num_classes == 3
    assert tuple(data.image_shape) == (3, 16, 16)


def test_finished_shards_are_kept_and_missing_ones_written(cache, stage):
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == 4 + 2
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    (cache / "train_00001.safetensors").unlink()
    cut = cache / "held_out_00000.safetensors"
    cut.write_bytes(before[cut][1][:-10])
    (cache / ".train_00003.safetensors.123.tmp").write_bytes(b"half")
    writer = LatentWriter(str(cache), shard_size=4, batch_size=3)
    assert writer.write(shapes(), stage) == 2
    for path, (time, content) in before.items():
        assert path.read_bytes() == content
        again = path.name.startswith(("train_00001", "held_out_00000"))
        assert (path.stat().st_mtime_ns == time) != again
    assert writer.write(shapes(), stage) == 0


def test_ranks_write_disjoint_shards_of_the_same_cache(cache, stage, tmp_path):
    writer = LatentWriter(str(tmp_path / "two"), shard_size=4, batch_size=3)
    counts = [writer.write(shapes(), stage, rank=rank, world_size=2) for rank in range(2)]
    assert counts == [3, 3]
    for path in sorted(cache.glob("*.safetensors")):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_cache_of_another_first_stage_or_other_images_is_refused(
    cache, stage, tiny_first_stages, tmp_path
):
    other = FirstStage(str(tiny_first_stages / "kl"), scale=0.25)
    writer = LatentWriter(str(cache), shard_size=4)
    for act in (
        lambda: writer.write(shapes(), other),
        lambda: trainer(tmp_path).fit(
            unet_module(other), datamodule=LatentsData(str(cache), batch_size=4)
        ),
    ):
        with pytest.raises(ConfigError) as error:
            act()
        for word in (stage.fingerprint, other.fingerprint, "0.5", "0.25", "first_stage"):
            assert word in str(error.value)
    with pytest.raises(ConfigError, match=r"num_images.*14"):
        writer.write(shapes(num_images=14), stage)
    with pytest.raises(ConfigError, match=r"shard_size 4, and this run has 8"):
        LatentWriter(str(cache), shard_size=8).write(shapes(), stage)


def damage(name, change):
    def act(cache):
        path = cache / name
        change(path)

    return act


def resave(path):
    tensors, metadata = read_safetensors(path)
    save_file({**tensors, "moments": torch.zeros(4, 2, 8, 4, 4)}, path, metadata)


def replace_by_another(path):
    path.write_bytes((path.parent / "train_00001.safetensors").read_bytes())


def edit_index(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


BAD = {
    "truncated": (
        damage("train_00001.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-8])),
        ["train_00001.safetensors: truncated", "encode again"],
    ),
    "missing": (
        damage("train_00002.safetensors", lambda p: p.unlink()),
        ["train_00002.safetensors: no such file"],
    ),
    "wrong shape": (
        damage("train_00000.safetensors", resave),
        ["[4, 2, 8, 8, 8]", "[4, 2, 8, 4, 4]"],
    ),
    "another shard": (
        damage("train_00000.safetensors", replace_by_another),
        ["train_00000.safetensors: its metadata shard must be 0, found 1"],
    ),
    "version": (
        damage("index.json", edit_index(format_version=3)),
        ["must be 2, found 3"],
    ),
    "dtype": (damage("index.json", edit_index(dtype="int8")), ["int8"]),
    "no index": (damage("index.json", lambda p: p.unlink()), ["index.json"]),
    "no json": (damage("index.json", lambda p: p.write_text("{")), ["index.json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_caches_are_refused_and_the_file_named(cache, name):
    act, words = BAD[name]
    act(cache)
    with pytest.raises(ConfigError) as error:
        LatentsData(str(cache), batch_size=4).setup("fit")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_training_on_the_cache_is_training_on_the_images(cache, stage, tmp_path):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1)

    weights = []
    for data in (shapes(), LatentsData(str(cache), batch_size=4, flip=False)):
        module = unet_module(stage, optimizer=sgd)
        start = torch.cat([p.detach().flatten() for p in module.backbone.parameters()])
        fit = trainer(tmp_path)
        fit.fit(module, datamodule=data)
        weights.append(torch.cat([p.detach().flatten() for p in module.backbone.parameters()]))
        state = module.state_dict()
        assert all(name.startswith("backbone.") for name in state)
    without = unet_module(None, optimizer=sgd)
    trainer(tmp_path).fit(without, datamodule=LatentsData(str(cache), batch_size=4, flip=False))
    found = torch.cat([p.detach().flatten() for p in without.backbone.parameters()])
    # The encoder rounds by batch, to 1e-6 of a moment or so. SGD makes no more of it; Adam makes
    # whole steps of a gradient that is 0 but for rounding.
    update = (weights[1] - start).norm()
    assert update > 1e-3
    for other in (weights[0], found):
        assert (other - weights[1]).norm() < 1e-4 * update
    assert without.sample([0, 1]).shape == (2, 4, 8, 8)
    assert not without.clip_denoised


def test_posterior_noise_is_keyed_by_step_or_by_image(stage, tmp_path):
    module = unet_module(stage)
    module.trainer = trainer(tmp_path)
    batch = shapes().train_images.load([2, 5, 7], epoch=None)
    at_3 = module.encode(batch, step=3)
    assert torch.equal(at_3, module.encode(batch, step=3))
    assert not torch.equal(at_3, module.encode(batch, step=4))
    by_index = module.encode(batch)
    alone = module.encode(Batch(*(part[1:2] for part in batch[:3])))
    torch.testing.assert_close(by_index[1:2], alone, rtol=1e-4, atol=1e-5)
    assert module.images_of(batch) is batch.images
    moments = Batch(stage.encode_moments(batch.images), batch.labels, batch.indices)
    assert module.images_of(moments).shape == (3, 3, 16, 16)


def test_samples_are_images_and_validation_runs(stage, tmp_path):
    module = unet_module(stage)
    (scores,) = trainer(tmp_path, limit_val_batches=1.0).validate(
        module, datamodule=shapes(), verbose=False
    )
    assert np.isfinite(scores["val/loss"])
    images = module.sample([0, 1])
    assert images.shape == (2, 3, 16, 16)
    assert images.abs().max() <= 1


@pytest.mark.parametrize(
    ("data", "module", "words"),
    [
        ({"image_size": 32}, {}, ["input_size", "latents", "(4, 16, 16)", "(4, 8, 8)"]),
        ({"image_size": 15}, {}, ["source", "multiples of 2", "(3, 15, 15)"]),
        ({"num_classes": 4}, {}, ["num_classes", "4", "3"]),
        ({}, {"no_stage": True}, ["first_stage", "ShapesData"]),
    ],
)
def test_data_that_do_not_fit_the_first_stage_or_the_classes_are_refused(
    stage, tmp_path, data, module, words
):
    built = unet_module(None if module else stage)
    if module:
        built.backbone.in_channels, built.backbone.input_size = 3, 16
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path).fit(built, datamodule=shapes(**data))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_labels_are_refused_for_a_conditional_model_only(stage, tmp_path):
    data = shapes()
    data.num_classes = 0
    with pytest.raises(ConfigError, match=r"must have labels .*num_classes = 3, found 0"):
        trainer(tmp_path).fit(unet_module(stage), datamodule=data)
    data = shapes()
    data.num_classes = 0
    trainer(tmp_path, max_steps=1).validate(
        unet_module(stage, num_classes=0), datamodule=data, verbose=False
    )


def test_metrics_on_a_cache_need_its_images(cache):
    data = LatentsData(str(cache), batch_size=4)
    with pytest.raises(ConfigError, match=r"^images: .*reference"):
        list(data.pixels(data.held_out_images))
    data = LatentsData(str(cache), batch_size=4, images=shapes())
    (pixels,) = data.pixels(data.held_out_images)
    (wanted,) = shapes().pixels(shapes().held_out_images)
    assert torch.equal(pixels, wanted)
    with pytest.raises(ConfigError, match=r"^images: .*num_images 13, found 14"):
        LatentsData(str(cache), batch_size=4, images=shapes(num_images=14)).setup("fit")


def dit(num_classes=3):
    return DiT(
        input_size=16,
        patch_size=8,
        in_channels=3,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=num_classes,
    )


def dit_module(path, num_classes=3, **options):
    return DiTModule(
        dit(num_classes),
        **grouped(
            schedule=CosineSchedule(50),
            clustering=TimestepClustering(2),
            init_from=str(path),
            **options,
        ),
    )


def test_init_from_starts_from_an_official_file_but_not_when_resuming(tmp_path, capsys):
    torch.manual_seed(8)
    network = dit()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    averages = {name: value + 1 for name, value in network.state_dict().items()}
    path = tmp_path / "official.pt"
    torch.save({"model": network.state_dict(), "ema": averages}, path)
    for weights, wanted in (("model", network.state_dict()), ("ema", averages)):
        module = dit_module(path, init_weights=weights)
        trainer(tmp_path, limit_val_batches=1).validate(module, datamodule=shapes(), verbose=False)
        found = module.backbone.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert f"{weights} weights" in capsys.readouterr().out
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=shapes())
    fit.save_checkpoint(tmp_path / "ours.ckpt")
    path.unlink()
    resumed = dit_module(path)
    trainer(tmp_path, limit_val_batches=1).validate(
        resumed, datamodule=shapes(), ckpt_path=tmp_path / "ours.ckpt", verbose=False
    )
    for a, b in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_init_from_says_that_classes_are_made_anew_and_names_a_truncated_file(tmp_path, capsys):
    path = tmp_path / "official.pt"
    torch.save(dit(7).state_dict(), path)
    dit_module(path)
    assert "class table made anew (8 rows in the file, 4 here)" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ConfigError, match=r"official\.pt.*(truncated|damaged)"):
        trainer(tmp_path).fit(dit_module(path), datamodule=shapes())


def test_the_command_encodes_what_a_config_says(tiny_first_stages, tmp_path, capsys):
    args = [
        "encode",
        "--data=ShapesData",
        "--data.image_size=16",
        "--data.num_images=5",
        "--data.num_held_out=2",
        "--data.batch_size=2",
        f"--first_stage.source={tiny_first_stages / 'kl'}",
        f"--cache.output={tmp_path / 'cache'}",
        "--device=cpu",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(args) == 0
    assert "wrote 2 shards" in capsys.readouterr().out
    data = LatentsData(str(tmp_path / "cache"), batch_size=2)
    data.setup("fit")
    assert [len(data.train_images), len(data.held_out_images)] == [5, 2]
    assert main([*args, "--first_stage.scale=0.7"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "fingerprint" in error[0]
    assert main([*args, "--cache.shard_size=0"]) == 2
    assert "shard_size" in capsys.readouterr().err


def test_a_checkpoint_says_what_its_latents_mean(cache, stage, tmp_path):
    """Else a model of cached latents would clip them, as if they were pixels."""
    fit = trainer(tmp_path)
    fit.fit(unet_module(None), datamodule=LatentsData(str(cache), batch_size=4))
    fit.save_checkpoint(tmp_path / "w.ckpt")
    arguments = {"backbone": unet(), **ldm_settings(None)}
    loaded = LDMModule.load_from_checkpoint(tmp_path / "w.ckpt", **arguments)
    assert loaded.latent_space == stage.space
    assert not loaded.clip_denoised
    drawn = fit.lightning_module.sample(2)
    assert torch.equal(loaded.sample(2), drawn)
    assert float(drawn.abs().max()) > 1
    # An older checkpoint does not say it; its settings name the cache that does.
    content = torch.load(tmp_path / "w.ckpt", weights_only=True)
    del content["ant_lightning"]["latent_space"]
    torch.save(content, tmp_path / "old.ckpt")
    config = {"model": LDM, "data": {"class_path": "ant_lightning.LatentsData"}}
    config["data"]["init_args"] = {"cache": str(cache), "batch_size": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    old = {"config": tmp_path / "config.yaml", "weights": "model"}
    assert torch.equal(load_run(tmp_path / "old.ckpt", **old).sample(2), drawn)
    cache.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="cache"):
        load_run(tmp_path / "old.ckpt", **old)
    assert torch.equal(load_run(tmp_path / "w.ckpt", **old).sample(2), drawn)
