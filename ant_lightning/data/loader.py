"""A training loader whose order is a function of seed and position: it can resume anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import randperm
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.workers import dead_worker, worker_settings
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ant_lightning.data.batch import Batch

__all__ = ["RankKeys", "ShuffledLoader", "evaluation_loader"]

# What a resumed run no longer has in common with the run that was stopped, by what has changed.
_CONSEQUENCES = {
    "num_workers": "batches and results stay the same, bit for bit",
    "world_size": "the batch of a step has the same images, timesteps and noise, but sums are "
    "rounded in another order, so results are no longer the same bit for bit",
    "batch_size": "the number of images seen is kept, but each step gets other images from now on",
    "num_images": "the number of steps done is kept, but images come in another order from now on",
    "seed": "images come in another order from now on",
}
# In words, what is no setting of a data module.
_LABELS = {"world_size": "number of ranks", "num_images": "number of training images"}


class ShuffledLoader:
    """Batches of a permutation of the data for each epoch; the end of an epoch is dropped.

    Iterating over it yields `len(loader)` batches, beginning where the last iteration ended or at
    the position of a loaded state: a run that is resumed in the middle of an epoch sees the batches
    that it would have seen. Rank r of N gets the r-th slice of each global batch, so the global
    batches do not depend on N.

    Args:
        dataset: The images.
        batch_size: Images of one optimizer step, over all ranks and accumulation.
        seed: Decides every permutation.
        rank: Number of this rank.
        world_size: Number of ranks; must divide `batch_size`.
        num_workers: Processes that load; 0 loads in this one.
        overfit_batches: Give only the first so many batches of the first epoch, over and over;
            `None` for all. Each epoch then has that many batches.

    Raises:
        ConfigError: If `batch_size` does not fit the data or the ranks.
        DataLoadingError: While it is iterated over, if one of the workers dies.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        overfit_batches: int | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ConfigError(
                f"batch_size: must be from 1 to the {len(dataset)} training images, "
                f"found {batch_size}"
            )
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size: counts the images of all ranks and must be a multiple of their "
                f"number {world_size}, found {batch_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.position = 0
        self._rank = rank
        self._overfit_batches = overfit_batches
        self._settings = {
            "seed": seed,
            "batch_size": batch_size,
            "num_images": len(dataset),
            "world_size": world_size,
            "num_workers": num_workers,
        }
        # Lightning finds it by this name at the end of a run. Its processes must end while their
        # queues work: the garbage collector would wait 5 s for each.
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            try:
                if self._iterator is None:
                    self._iterator = self._stream()
                batch = next(self._iterator)
            except RuntimeError as error:
                died = dead_worker(error)  # torch reports a killed worker as a RuntimeError
                if died is None:
                    raise
                raise died from error
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches taken since the start of training, and what their order depends on."""
        return {"position": self.position, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of `state`, and report settings that differ from it."""
        # With another batch size the epochs have another length: keep the number of images seen.
        self.position = state["position"] * state["batch_size"] // self.batch_size
        self._iterator = None
        for name, consequence in _CONSEQUENCES.items():
            now = self._settings[name]
            then = state.get(name, now)
            if then != now:
                say = rank_zero_info if name == "num_workers" else rank_zero_warn
                label = _LABELS.get(name, name)
                say(f"{label}: the checkpoint has {then}, this run {now}: {consequence}")

    def _stream(self) -> Iterator[Batch]:
        """Batches without end: workers are started once, not every epoch."""
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # a key of the sampler is a whole batch
            sampler=self._keys(),
            pin_memory=False,
            **worker_settings(self._settings["num_workers"]),
        )
        return iter(loader)

    def _keys(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, indices) of each batch of this rank from `position` on, without end."""
        num_batches = self._overfit_batches or len(self)
        size = self.batch_size // self._settings["world_size"]
        epoch, first = divmod(self.position, num_batches)
        while True:
            # To overfit, every epoch repeats the first batches of epoch 0.
            order_of = 0 if self._overfit_batches else epoch
            generator = keyed_generator(self._settings["seed"], "order", order_of)
            order = randperm(len(self.dataset), generator=generator)
            for batch in range(first, num_batches):
                start = batch * self.batch_size + self._rank * size
                yield epoch, order[start : start + size].tolist()
            epoch, first = epoch + 1, 0


class RankKeys(DistributedSampler[Any], SequentialSampler):
    """The keys of one rank, in order.

    It has these two bases for Lightning, which would distribute the keys of any other sampler among
    the ranks once more, and would replace it if `overfit_batches` is set.

    Args:
        keys: What the data set is asked for.
    """

    def __init__(self, keys: Sequence[Any]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def evaluation_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """All images in order, once; rank r of N gets the images r, r + N, ..."""
    mine = list(range(rank, len(dataset), world_size))
    keys = [(None, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    settings = worker_settings(num_workers)
    return DataLoader(dataset, batch_size=None, sampler=RankKeys(keys), **settings)
