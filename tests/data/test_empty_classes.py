"""A class without real images is named, and its place in the grid stays empty."""

import numpy as np
import pytest
from PIL import Image
from tiny_digits import module, trainer

from ant_lightning import Batch, DigitsData, DigitsFeatures, GenerationMetrics, SampleGrid
from ant_lightning.callbacks.classes import EmptyClassWarning, images_by_class
from ant_lightning.data.dataset import ImageDataset, TensorImages


class WithoutThrees(DigitsData):
    """No held-out image of class 3."""

    def prepare(self):
        train, held_out = super().prepare()
        kept = held_out.labels != 3
        return train, TensorImages(held_out.images[kept], held_out.labels[kept])


def test_the_grid_leaves_the_place_of_a_class_without_images(tmp_path):
    callback = SampleGrid(num_images=20)
    run = trainer(tmp_path, callback, limit_val_batches=1)
    run.validate(module(), WithoutThrees(), verbose=False)
    real = callback._real(run, run.lightning_module, 20)
    empty = [place for place, image in enumerate(real) if not image.any()]
    assert empty == [3, 13]
    labels = run.datamodule.held_out_images.labels
    chosen = images_by_class(run.datamodule.held_out_images, 20, num_classes=10)
    assert [None if i is None else int(labels[i]) for i in chosen] == [
        None if i % 10 == 3 else i % 10 for i in range(20)
    ]
    assert np.asarray(Image.open(callback.path)).size


def test_labels_that_are_not_kept_are_found_by_loading(tmp_path):
    data = DigitsData()
    data.setup("validate")

    class Hidden(ImageDataset):
        def __len__(self):
            return len(data.held_out_images)

        def load(self, indices, *, epoch) -> Batch:
            return data.held_out_images.load(indices, epoch=epoch)

    assert images_by_class(Hidden(), 30, num_classes=10) == images_by_class(
        TensorImages(data.held_out_images.images[:300], data.held_out_images.labels[:300]),
        30,
        num_classes=10,
    )


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_metrics_name_a_class_without_images(tmp_path):
    callback = GenerationMetrics(DigitsFeatures(), num_images=20, cache_dir=str(tmp_path))
    run = trainer(tmp_path, callback, limit_val_batches=1)
    with pytest.warns(EmptyClassWarning, match=r"1 of 10 classes have no held-out image .class 3"):
        run.validate(module(), WithoutThrees(), verbose=False)
