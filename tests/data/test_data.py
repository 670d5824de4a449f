"""Loaders: every image once an epoch, the same global batches on any number of ranks, resume."""

import pytest
import torch

from ant_lightning import ConfigError, DigitsData
from ant_lightning.data.dataset import TensorImages
from ant_lightning.data.digits import load_digits
from ant_lightning.data.loader import ShuffledLoader


@pytest.fixture(scope="module")
def data():
    module = DigitsData(batch_size=100)
    module.setup("fit")
    return module


def take(loader, count):
    batches = []
    while len(batches) < count:
        for batch in loader:
            batches.append(batch.indices.tolist())
            if len(batches) == count:
                break
    return batches


def test_digits_are_the_real_ones_in_the_documented_range():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_split_is_disjoint_complete_and_seeded(data):
    train, held_out = data.train_images, data.held_out_images
    assert (len(train), len(held_out)) == (1437, 360)
    pool = torch.cat([train.images, held_out.images]).flatten(1).sum(0)
    assert torch.allclose(pool, load_digits()[0].flatten(1).sum(0), atol=1e-3)
    again = DigitsData(batch_size=100)
    assert torch.equal(again.held_out_images.images, held_out.images)
    other = DigitsData(batch_size=100, split_seed=1)
    assert not torch.equal(other.held_out_images.images, held_out.images)


def test_an_epoch_has_every_image_at_most_once_and_the_next_another_order(data):
    loader = ShuffledLoader(data.train_images, batch_size=100, seed=0)
    assert len(loader) == 14
    first, second = take(loader, 14), take(loader, 14)
    seen = [i for batch in first for i in batch]
    assert len(set(seen)) == 1400
    assert first != second


def test_ranks_share_the_global_batches(data):
    def loader(rank, ranks):
        return ShuffledLoader(
            data.train_images, batch_size=100, seed=3, rank=rank, world_size=ranks
        )

    whole = take(loader(0, 1), 20)
    halves = [take(loader(rank, 2), 20) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch_goes_on_with_the_same_batches(data, num_workers):
    def loader():
        return ShuffledLoader(data.train_images, batch_size=100, seed=1, num_workers=num_workers)

    whole = take(loader(), 24)
    first = loader()
    taken = take(first, 9)
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert taken + take(resumed, 15) == whole


def test_what_changed_since_the_checkpoint_is_said(data, caplog):
    def loader(num_images=1437, **settings):
        images = TensorImages(data.train_images.images[:num_images], data.train_images.labels)
        return ShuffledLoader(images, **{"batch_size": 100, "seed": 1, **settings})

    def state(loader, position):
        loader.position = position
        return loader.state_dict()

    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        loader().load_state_dict(state(loader(num_workers=3), 5))
    assert "num_workers: the checkpoint has 3, this run 0: batches and res" in caplog.text
    for changed, words in [
        ({"batch_size": 200}, r"batch_size: the checkpoint has 200, this run 100: the"),
        ({"num_images": 300}, r"number of training images: the checkpoint has 300, this run 1437"),
        ({"seed": 3}, r"seed: the checkpoint has 3, this run 1: images come in another"),
        ({"world_size": 4}, r"number of ranks: the checkpoint has 4, this run 1: the batch of"),
    ]:
        with pytest.warns(UserWarning, match=words):
            loader().load_state_dict(state(loader(**changed), 5))
    old = {"position": 5, "seed": 1, "batch_size": 100}  # as checkpoints were until now
    resumed = loader()
    resumed.load_state_dict(old)
    assert resumed.position == 5


def test_evaluation_loader_covers_every_held_out_image_once(data):
    indices = torch.cat([batch.indices for batch in data.val_dataloader()])
    assert indices.tolist() == list(range(360))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"num_held_out": 1797}, ["num_held_out", "1796", "1797"]),
    ],
)
def test_bad_settings_name_the_setting_the_rule_and_the_value(arguments, words):
    with pytest.raises(ConfigError) as error:
        DigitsData(**arguments)
    assert all(word in str(error.value) for word in words)


def test_batches_that_do_not_fit_are_refused(data):
    with pytest.raises(ConfigError, match=r"1437 training images, found 2000"):
        ShuffledLoader(data.train_images, batch_size=2000, seed=0)
    with pytest.raises(ConfigError, match=r"multiple of their number 3, found 100"):
        ShuffledLoader(data.train_images, batch_size=100, seed=0, world_size=3)
