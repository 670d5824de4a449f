"""A training loader whose order is a function of seed and position, so that it resumes anywhere."""

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

# By setting: what changes in a resumed run if the setting differs from that of the stopped run.
_CONSEQUENCES = {
    "num_workers": "batches and results stay the same, bit for bit",
    "world_size": "the batch of a step has the same images, timesteps and noise, but sums are "
    "rounded in another order, so results are no longer the same bit for bit",
    "batch_size": "the number of images seen is kept, but each step gets other images from now on",
    "num_images": "the number of steps done is kept, but images come in another order from now on",
    "seed": "images come in another order from now on",
}
# Words for the entries above that are no settings of a data module.
_LABELS = {"world_size": "number of ranks", "num_images": "number of training images"}


class ShuffledLoader:
    """Batches of the training images, in another random order in each epoch.

    An iteration yields `len(loader)` batches. It begins where the last iteration ended, or at the
    position of a loaded state: a run that is resumed in the middle of an epoch sees the batches
    that it would have seen. Images at the end of an epoch that do not fill a batch are dropped.
    Rank r of N gets the r-th slice of each global batch, so the global batches do not depend on N.

    Args:
        dataset: The images.
        batch_size: Images of one optimizer step, over all ranks and accumulation.
        seed: Decides every permutation.
        rank: Number of this rank.
        world_size: Number of ranks; must divide `batch_size`.
        num_workers: Number of loading processes; 0 loads in this process.
        overfit_batches: Repeat this many batches, the first of epoch 0, as epochs of that length;
            `None` takes all images.

    Raises:
        ConfigError: If `batch_size` does not fit the data or the ranks.
        DataLoadingError: During iteration, if a loading process dies.
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
        # Lightning looks for this name at the end of a run, and stops the loading processes while
        # their queues still work. The garbage collector would wait 5 s for each process.
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
            # Counts batches handed out; loading processes are ahead of it. Counted before the step,
            # so that a checkpoint written after the step does not repeat the batch.
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Number of batches taken since the start of training, and what their order depends on."""
        return {"position": self.position, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of `state`, and report settings that differ from it."""
        # With another batch size a position is another number of images: keep the number of images.
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
        """Endless batches, so that loading processes are started once and not in every epoch."""
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # a key of the sampler is a whole batch
            sampler=_keys(
                self.position,
                self._settings,
                rank=self._rank,
                num_batches=self._overfit_batches or len(self),
                overfit=bool(self._overfit_batches),
            ),
            pin_memory=False,
            **worker_settings(self._settings["num_workers"]),
        )
        return iter(loader)


def _keys(
    position: int,
    settings: dict[str, int],
    *,
    rank: int,
    num_batches: int,
    overfit: bool,
) -> Iterator[tuple[int, list[int]]]:
    """Endless keys (epoch, indices), one for each batch of this rank, from `position` on.

    A function and no method: keys that held the loader would hold it, and with it the loading
    processes, until the garbage collector comes, which waits 5 s for each process.
    """
    seed, batch_size, num_images = (settings[n] for n in ("seed", "batch_size", "num_images"))
    size = batch_size // settings["world_size"]
    epoch, first = divmod(position, num_batches)
    while True:
        # To overfit, every epoch repeats the first batches of epoch 0.
        generator = keyed_generator(seed, "order", 0 if overfit else epoch)
        order = randperm(num_images, generator=generator)
        for batch in range(first, num_batches):
            start = batch * batch_size + rank * size
            yield epoch, order[start : start + size].tolist()
        epoch, first = epoch + 1, 0


class RankKeys(DistributedSampler[Any], SequentialSampler):
    """A sampler that yields the given keys of one rank, in order.

    The two bases keep Lightning from replacing it. A sampler that is no `DistributedSampler` would
    be split among the ranks once more; one that is no `SequentialSampler` would be replaced if
    `overfit_batches` is set.

    Args:
        keys: The keys to ask the data set for.
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
    """Load all images once, in order; rank r of N gets the images r, r + N, ..."""
    mine = list(range(rank, len(dataset), world_size))
    keys = [(None, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    settings = worker_settings(num_workers)
    return DataLoader(dataset, batch_size=None, sampler=RankKeys(keys), **settings)
