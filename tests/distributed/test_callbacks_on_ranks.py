"""What callbacks measure and write does not depend on the number of ranks."""

import lightning as L
import numpy as np
import timestep_features
import torch
from rank_processes import run_ranks
from tiny_runs import ROUNDING, PartlyUsed, TinyData, module, trainer

from ant_lightning import (
    DDIM,
    FeatureExtractor,
    GenerationMetrics,
    NegativeTransferGap,
    Reclustering,
    SampleWriter,
    StoredImages,
    TaskAffinity,
    TransferMatrix,
)
from ant_lightning.cli.score import score_images
from ant_lightning.generation.extractor import Features
from ant_lightning.generation.reference import real_statistics

INTERVAL = (0, 300)


class Projection(FeatureExtractor):
    """Six fixed random numbers of each image."""

    def __init__(self):
        super().__init__(num_features=6, name="projection")
        matrix = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        self.register_buffer("matrix", matrix)

    def extract(self, images):
        features = images.flatten(1).double() @ self.matrix.double() / 255
        return Features(features.float(), features[:, :4].float())


class Seen(L.Callback):
    """Remembers which held-out images were evaluated."""

    def __init__(self):
        self.indices = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.indices += batch.indices.tolist()


def measured(rank, folder, ranks):
    """Scores, affinity and transfer of a validation, and the images of a prediction."""
    seen = Seen()
    metrics = GenerationMetrics(
        Projection(), num_images=21, batch_size=4, cache_dir=str(folder / f"cache_{ranks}")
    )
    affinity = TaskAffinity(num_points=5, num_images=12, batch_size=5)
    transfer = TransferMatrix(num_images=8)
    gap = NegativeTransferGap(
        by_samples=[str(folder / "specialist.ckpt")],
        intervals=[INTERVAL],
        extractor=Projection(),
        num_images=11,
        num_draws=2,
        num_resamples=3,
        batch_size=4,
    )
    npz = folder / f"{ranks}.npz"
    writer = SampleWriter(num_images=9, batch_size=2, npz=str(npz))
    # In float64, so that no pixel is rounded to another of 256 values by where its image lies in
    # a batch.
    settings = {
        "default_root_dir": folder / str(ranks),
        "limit_val_batches": 1.0,
        "precision": "64-true",
    }
    backbone = timestep_features.exact(PartlyUsed())
    model = module("vanilla", backbone=backbone, sampler=DDIM(num_steps=2))
    data = TinyData(batch_size=6)  # several batches for each rank
    callbacks = [seen, metrics, affinity, transfer, gap]
    run = trainer(ranks=ranks, callbacks=callbacks, **settings)
    run.validate(model, data, verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    trainer(ranks=ranks, callbacks=[writer], **settings).predict(
        model, data, return_predictions=False
    )
    return {
        "seen": seen.indices,
        "scores": metrics.last_scores,
        "logged": logged if rank == 0 else None,
        "affinity": affinity.result.half_dots,
        "transfer": transfer.matrix,
        "gap": gap.result.gaps[0],
        "images": np.load(npz)["arr_0"],
    }


def test_two_ranks_measure_and_write_what_one_does(tmp_path):
    specialist = trainer(steps=1)
    specialist.fit(module("vanilla", interval=INTERVAL), TinyData())
    specialist.save_checkpoint(tmp_path / "specialist.ckpt")
    one = measured(0, tmp_path, 1)
    two = run_ranks(measured, 2, tmp_path / "two", tmp_path, 2)
    assert {"fid", "kid", "inception_score", "precision", "fid_train"} <= one["scores"].keys()
    assert sorted(two[0]["seen"] + two[1]["seen"]) == sorted(one["seen"]) == list(range(20))
    np.testing.assert_allclose(two[0]["logged"]["val/loss"], one["logged"]["val/loss"], rtol=1e-5)
    for rank in two:
        for name, value in one["scores"].items():
            np.testing.assert_allclose(rank["scores"][name], value, rtol=1e-6, err_msg=name)
        torch.testing.assert_close(rank["affinity"], one["affinity"], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(rank["transfer"], one["transfer"], rtol=1e-5, atol=1e-8)
        assert np.array_equal(rank["images"], one["images"])
        for name in ("loss_gap", "fid_gap", "multitask_fid"):
            ours, theirs = getattr(rank["gap"], name), getattr(one["gap"], name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7, err_msg=name)
    assert two[0]["logged"]["val/fid"] == np.float32(one["logged"]["val/fid"])
    assert len(list((tmp_path / "cache_2").iterdir())) == 2


def reclustered(rank, folder, ranks):
    """Clusters of a training that makes them anew, and its weights."""
    callback = Reclustering(recluster_every=2, num_points=20, num_images=6)
    model = module("uw")
    run = trainer(ranks=ranks, steps=4, callbacks=[callback], default_root_dir=folder / str(ranks))
    run.fit(model, TinyData())
    return model.cluster_history, [p.detach() for p in model.backbone.parameters()]


def test_two_ranks_recluster_as_one_does(tmp_path):
    one, weights = reclustered(0, tmp_path, 1)
    assert [step for step, _ in one] == [0, 2, 4]
    assert len({boundaries for _, boundaries in one}) > 1
    for history, own in run_ranks(reclustered, 2, tmp_path / "two", tmp_path, 2):
        assert history == one
        for mine, theirs in zip(own, weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=ROUNDING)


def stored_scores(rank, folder, ranks):
    """Scores of images in an npz file."""
    fabric = L.Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    metrics = GenerationMetrics(Projection(), batch_size=4)
    return score_images(metrics, TinyData(), StoredImages(folder / "stored.npz"), fabric)


def test_two_ranks_score_stored_images_as_one_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "stored.npz", arr_0=pixels)
    one = stored_scores(0, tmp_path, 1)
    assert one["num_images"] == 21
    for two in run_ranks(stored_scores, 2, tmp_path / "two", tmp_path, 2):
        assert two.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(two[name], value, rtol=1e-6, err_msg=name)


def cached_statistics(rank, folder):
    """Statistics of real images, twice, with a disk for each rank, of which rank 0 has the file."""
    dataset, cache = TinyData().held_out_images, folder / str(rank)
    for _ in range(2):
        found = real_statistics(dataset, Projection(), cache_dir=cache)
    return found.features, cache.exists()


def test_ranks_that_see_different_caches_compute_together(tmp_path):
    one = cached_statistics(0, tmp_path / "a")
    two = run_ranks(cached_statistics, 2, tmp_path / "two", tmp_path / "b")
    assert [exists for _, exists in two] == [True, False]
    for features, _ in two:
        torch.testing.assert_close(features, one[0])
