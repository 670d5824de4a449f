"""Names, classes and clusters in place of objects, and images in another range."""

import lightning as L
import pytest
import torch
from tiny_fit import SIZE

from ant_lightning import (
    AutoencoderModule,
    Batch,
    ConfigError,
    DigitsData,
    DiscreteDiffusion,
    DiT,
    LatentSpace,
    MultiTaskDiffusion,
    Sampling,
    SNRClustering,
    Tasks,
    UncertaintyWeighting,
)
from ant_lightning.runtime.rank_watch import RankWatch

TASKS = Tasks(SNRClustering(2))


def module(process=None, tasks=TASKS, **settings):
    network = DiT(**SIZE, depth=1, num_heads=1, num_classes=10, learn_sigma=False)
    return MultiTaskDiffusion(
        network, process=process or DiscreteDiffusion(), tasks=tasks, seed=0, **settings
    )


def test_objects_of_another_kind():
    clusters = SNRClustering(2)(DiscreteDiffusion().log_snr)
    for make, words in (
        (lambda: Tasks(clusters), "clustering: must be a Clustering, .*found.*TimestepClusters"),
        (lambda: Tasks(SNRClustering), "clustering: .* found the class SNRClustering$"),
        (lambda: Tasks(SNRClustering(2), balancer="uw"), "balancer: .* found 'uw'$"),
        (
            lambda: Tasks(SNRClustering(2), balancer=UncertaintyWeighting),
            "balancer: must be a Balancer, .* found the class UncertaintyWeighting$",
        ),
        (lambda: module("ddpm"), "process: must be a NoiseProcess, .* found 'ddpm'$"),
        (lambda: module(DiscreteDiffusion), "process: .* found the class DiscreteDiffusion$"),
        (lambda: module(tasks=SNRClustering(2)), "tasks: must be a Tasks, .* found "),
    ):
        with pytest.raises(ConfigError, match=f"^{words}") as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("gradient_clip_val", "clip_grad_norm"),
        ("accumulate_grad_batches", "accumulate_grad_batches"),
    ],
)
def test_flags_of_the_trainer_that_are_settings_of_the_module(flag, ours):
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", **{flag: 2}
    )
    with pytest.raises(ConfigError, match=rf"^trainer.{flag}: .*Optimization\({ours}=2\)"):
        trainer.fit(module(), DigitsData(batch_size=4))


def test_a_trainer_is_used_twice_without_a_word_of_its_callbacks(caplog):
    trainer = L.Trainer(
        max_steps=1,
        limit_val_batches=1,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = module(), DigitsData(batch_size=4)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    assert "will override" not in caplog.text
    assert sum(isinstance(each, RankWatch) for each in trainer.callbacks) == 1


def batch_of(images):
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))


def test_images_in_another_range(recwarn):
    unit = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        model = module().train(training)
        with pytest.raises(ConfigError, match=r"^batch.images: must be in \[-1, 1\] .* from 0\.\d"):
            model.check_images(batch_of(255 * unit))
        assert not recwarn
        with pytest.warns(UserWarning, match=r"expected in \[-1, 1\], and those of the first"):
            model.check_images(batch_of(unit))
        model.check_images(batch_of(255 * unit))  # only the first batch is looked at
    for fine in (2 * unit - 1, 1.4 * (2 * unit - 1), torch.zeros_like(unit)):
        module().check_images(batch_of(fine))
    assert not recwarn
    free = module(sampling=Sampling(clip_denoised=False))
    free.check_images(batch_of(255 * unit))
    latent = module()
    latent.latent_space = LatentSpace(kind="kl", scale=1.0, shift=0.0, fingerprint="", source="")
    latent.check_images(batch_of(9 * unit.repeat(1, 2, 1, 1)))  # moments


def test_images_that_are_encoded_are_pixels():
    moments = batch_of(torch.full((2, 2, 8, 8), 200.0))  # of a latent with one channel
    latent = module()
    latent.latent_space = LatentSpace(kind="kl", scale=1.0, shift=0.0, fingerprint="", source="")
    latent.check_images(moments)
    for model in (latent.eval(), AutoencoderModule(in_channels=1, widths=(16, 16))):
        with pytest.raises(ConfigError, match=r"^batch.images: must be in \[-1, 1\]"):
            model.check_images(batch_of(torch.full((2, 1, 16, 16), 200.0)))


def test_every_run_looks_at_its_first_images():
    model = module()
    images = batch_of(torch.full((2, 1, 8, 8), 2.0))
    for step in (model.training_step, model.eval().validation_step):
        with pytest.raises(ConfigError, match=r"^batch.images: must be in \[-1, 1\]"):
            step(images, 0)
