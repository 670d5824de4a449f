"""What our modules share: loading, logging by optimizer step, and names of wrapped weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.backbones.official_checkpoints import fill_backbone
from ant_lightning.data.batch import check_batch, check_first_images
from ant_lightning.errors import ConfigError, check_one_of
from ant_lightning.files.checkpoint_shards import check_shards, fill_shards
from ant_lightning.models.adapters import base_fingerprint
from ant_lightning.models.backbone import backbone_name
from ant_lightning.runtime.checkpoint_files import read_whole_checkpoint
from ant_lightning.runtime.csv_rows import keep_csv_rows
from ant_lightning.runtime.rank_watch import RankWatch

if TYPE_CHECKING:
    from typing import Self

    import torch

    from ant_lightning.data.batch import Batch


class BaseModule(L.LightningModule):
    """A LightningModule with a `backbone` that can be constructed from a checkpoint."""

    backbone: Any
    #: Names in the backbone's state that no checkpoint holds: the base of an adapter.
    not_stored: frozenset[str] = frozenset()
    base_weights: str | None = None
    _checked_images: frozenset[bool] = frozenset()

    @_restricted_classmethod  # called on an instance, it would leave the instance unchanged
    def load_from_checkpoint(  # type: ignore[override]
        cls,  # noqa: N805
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        *,
        weights: Literal["ema", "model"] = "model",
        **arguments: Any,
    ) -> Self:
        """Construct the module from its arguments and load the weights of a checkpoint.

        `ant_lightning.load_run` needs no arguments and loads the averaged weights.

        Args:
            checkpoint_path: The checkpoint.
            map_location: The module's device; by default the CPU.
            weights: `model` for the live weights, to train on; `ema` for the averaged weights of
                the callback `EMA`, to draw images.
            arguments: All constructor arguments, as for training; the file holds none, and
                nothing in it can run.

        Raises:
            ConfigError: If an argument is missing, the checkpoint belongs to another model, or it
                has no averaged weights.
            FileError: If the file is damaged, or would run code.
        """
        check_one_of(("ema", "model"), weights=weights)
        content = read_whole_checkpoint(Path(checkpoint_path))
        try:
            module = cls(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"load_from_checkpoint: {cls.__name__} needs the arguments that it was trained "
                f"with, found others ({error}); ant_lightning.load_run(path) takes them from the "
                "settings of the run"
            ) from error
        module.load_content(content)
        if weights == "ema":
            path, held = Path(checkpoint_path), module.not_stored
            fill_backbone(module.backbone, content, path=path, weights=weights, held=held)
        return module.to(map_location or "cpu")

    def leave_out(self, names: frozenset[str]) -> None:
        """From now on the module's state lacks these weights of the backbone.

        They come from where the backbone does, and `base_weights` identifies them.
        """
        self.not_stored = names
        self.base_weights = base_fingerprint(self.backbone.state_dict(), names)
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    def load_content(self, content: dict[str, Any]) -> None:
        """Load the state and the live weights from the content of a checkpoint.

        Raises:
            ConfigError: If the checkpoint belongs to another model.
        """
        self.on_load_checkpoint(content)
        self.load_state_dict(content["state_dict"])

    def configure_callbacks(self) -> list[L.Callback]:
        """Callbacks of every run, also of runs from Python."""
        keep_csv_rows(self.trainer)  # the last hook before Lightning makes the writer
        # One that an earlier run of this trainer has left stays: Lightning would say that another
        # overrides it.
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(each, RankWatch) for each in callbacks) else [RankWatch()]

    def check_images(self, batch: Batch) -> None:
        """Check what a loader yields; the values of images once each for training and validation.

        Raises:
            ConfigError: If the batch is none, or its first images are not in [-1, 1].
        """
        check_batch(batch)
        if self.training not in self._checked_images:
            if self.takes_pixels(batch):
                check_first_images(batch.images)
            self._checked_images |= {self.training}

    def takes_pixels(self, batch: Batch) -> bool:
        """Whether the images of a batch must be in [-1, 1]."""
        return True

    @property
    def log_due(self) -> bool:
        """Whether to log now: true every `trainer.log_every_n_steps` optimizer steps."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.global_step % max(1, every) == 0

    def log_now(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Send numbers to the loggers at `global_step`, which does not count skipped steps.

        `self.log` counts batches, skipped ones included, and would drop numbers that are logged
        between its own multiples of `log_every_n_steps`.
        """
        for logger in self.loggers:
            logger.log_metrics({k: float(v) for k, v in metrics.items()}, step=self.global_step)

    @property
    def is_training_run(self) -> bool:
        """Whether the module belongs to a trainer that runs `fit`."""
        return self._trainer is not None and self.trainer.state.fn == "fit"

    @property
    def stage(self) -> str:
        """First part of the names that an evaluation logs: `val`, or `test` of a test."""
        return "test" if self.trainer.testing else "val"

    def use_own_names(self, checkpoint: dict[str, Any]) -> None:
        """Rename the weights and averages in a checkpoint to the names that this module has.

        The names differ if only one of the two networks is wrapped by torch (`torch.compile`, DDP).
        """
        # Lightning's own reader, which a trainer without `Checkpoints` has, leaves shards out.
        if "shards" in checkpoint:
            path = Path(str(self.trainer.ckpt_path))
            check_shards(path, checkpoint["shards"])
            fill_shards(path, checkpoint)
        saved = checkpoint.get("ant_lightning", {})
        if saved.get("backbone") == "OptimizedModule":  # what 0.1 called every compiled network
            saved["backbone"] = backbone_name(self.backbone)
        checkpoint["state_dict"] = _renamed(checkpoint["state_dict"], self.state_dict())
        # `EMA` names its averages after the backbone's parameters, without the module's prefix.
        own = dict(self.backbone.named_parameters())
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and isinstance(state.get("averages"), Mapping):
                state["averages"] = _renamed(state["averages"], own)
                powers = state.get("powers", {}).items()
                state["powers"] = {length: _renamed(one, own) for length, one in powers}

    def check_weights(self, checkpoint: Mapping[str, Any]) -> None:
        """Compare names and shapes of a checkpoint's weights with those of this module.

        Raises:
            ConfigError: Naming the part and the first weight that differ, with both shapes.
        """
        theirs = checkpoint["state_dict"]
        ours = {name: _shape(value) for name, value in self.state_dict().items()}
        saved = {str(name): _shape(value) for name, value in theirs.items()}
        different = [name for name in {**ours, **saved} if ours.get(name) != saved.get(name)]
        if different:
            part, _, rest = different[0].partition(".")
            then, now = (each.get(different[0], "no") for each in (saved, ours))
            raise ConfigError(
                f"{part}: must be that of the checkpoint in ckpt_path, which has {then} {rest}, "
                f"found {now} {rest}; {len(different)} of its weights differ"
            )


def _without_base(module: BaseModule, state: dict[str, Any], prefix: str, _: object) -> None:
    """A hook of torch: leave the weights that an adapter does not change out of the state."""
    for name in module.not_stored:
        state.pop(f"{prefix}backbone.{name}", None)


def _with_base(module: BaseModule, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A hook of torch: add them again to a state that is loaded."""
    own = module.backbone.state_dict()
    for name in module.not_stored:
        state.setdefault(f"{prefix}backbone.{name}", own[name])


def _renamed(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    if tensors.keys() == own.keys():
        return tensors
    names = bare_names(own)
    return {names.get(bare, name): tensors[name] for bare, name in bare_names(tensors).items()}


def _shape(value: object) -> str:
    """Words for the message of `check_weights`; values that are not tensors all compare equal."""
    return f"{list(value.shape)} as" if isinstance(value, Tensor) else "values as"
