"""Moving averages of the backbone's weights, which evaluation and sampling use."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

from ant_lightning.balancing.local_parts import from_full, local_part
from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.power_averages import PowerAverages, snapshot_folder
from ant_lightning.callbacks.power_function import check_length
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.files.identity import tensors_digest
from ant_lightning.runtime.sharded_backbone import reshard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from ant_lightning.models.module import MultiTaskDiffusion


class EMA(RunCallback):
    """Keeps `m <- d m + (1 - d) w` of the backbone's weights `w` after every optimizer step.

    With warm-up, `d = min(decay, (1 + n) / (10 + n))` at the n-th update, so that the initial
    weights do not dominate a short run. Validation, test and prediction use the averages. The
    live weights are restored afterwards, also after an exception, and a checkpoint's `state_dict`
    holds the live weights. A skipped step does not change the averages. They are a dict of float32
    tensors in the callback's part of the checkpoint, not a second copy of the model.

    Beside it, `lengths` tracks power-function averages: `d = (1 - 1 / n)^(g + 1)`, which gives the
    weights after update t a share that grows with `t^g`. A length is the standard deviation of
    `t / n` under these shares (EDM2's sigma_rel), so that the average covers the same part of a run
    of any length. Snapshots of them, at most `num_snapshots`, lie in `ema` beside the checkpoints;
    a run without checkpoints writes none. From these, `validate --ema.length 0.07` makes the
    average of a length that was not tracked. With lengths 0.05, 0.1 and 0.2 and 16 snapshots the
    profiles of all lengths between are right to 3e-4; a length that cannot be made is refused.

    The averages belong to the live weights at the end of the last call. If a later call finds other
    weights (another module, or weights loaded by hand), the averages restart from those. Every
    parameter that is or was trained has an average: one that gets frozen is still averaged, one
    that is thawed starts at its current value.

    Args:
        decay: `d`, from 0 (no averaging) up to but not 1.
        warmup: Whether `d` starts small.
        lengths: Lengths of the power-function averages to track, from 0 to 0.289; each is a copy of
            the backbone's weights. EDM2 has 0.05 and 0.1.
        length: Evaluate the average of this length in place of that of `decay`. In training it must
            be one of `lengths`.
        snapshot_every: Updates between snapshots at first; the interval doubles as they get too
            many.
        num_snapshots: Largest number of snapshots that are kept.

    Raises:
        ConfigError: If a number is out of range; in training, if `length` is not in `lengths`, or a
            resumed run asks for a length that its checkpoint has not tracked; in an evaluation, if
            the average of `length` cannot be made.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
        arXiv 2312.02696, section 3 and appendix C.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(decay=0.999)], logger=False)
        >>> trainer.callbacks[0].state_dict()
        {'averages': {}, 'num_updates': 0}
    """

    module_type = L.LightningModule  # also an autoencoder
    num_updates: int
    _averages: dict[str, Tensor]
    # Digest of the live weights that the averages belong to; None while these change, or after a
    # checkpoint set both.
    _made_of: str | None
    _powers: PowerAverages
    run_state: ClassVar = {
        "num_updates": int,
        "_averages": dict,
        "_powers": PowerAverages,
        "_made_of": NoneType,
    }

    def __init__(
        self,
        *,
        decay: float = 0.9999,
        warmup: bool = True,
        lengths: list[float] | None = None,
        length: float | None = None,
        snapshot_every: int = 100,
        num_snapshots: int = 32,
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay: must be at least 0 and below 1, found {decay}")
        for name, each in [("lengths", each) for each in lengths or []] + [("length", length)]:
            if each is not None:
                check_length(name, each)
        check_at_least(1, snapshot_every=snapshot_every)
        check_at_least(2, num_snapshots=num_snapshots)
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self.lengths = sorted(set(lengths or []))
        self.length = length
        self.snapshot_every = snapshot_every
        self.num_snapshots = num_snapshots
        self._live: dict[str, Tensor] | None = None
        self._last_step = 0
        self._in_fit = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset nothing yet: a checkpoint may still replace the weights that decide it."""
        self._in_fit = stage == "fit"

    # Not earlier: a strategy that shards the model loads the checkpoint after `on_fit_start`.
    def on_train_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Start from the weights, unless they already have averages."""
        self._forget_others(pl_module)
        if self.length is not None and self.length not in self.lengths:
            raise ConfigError(
                f"length: must be in lengths {self.lengths} in training, or be given to an "
                f"evaluation afterwards, found {self.length}"
            )
        self._powers.begin(self.lengths, num_updates=self.num_updates)
        for averages in self._all():
            _bind(averages, pl_module)
        self._add_trainable(pl_module)
        if self.lengths:
            dirpath = getattr(callback_of(trainer, ModelCheckpoint), "dirpath", None)
            self._powers.keep_in(dirpath, is_first=trainer.is_global_zero)
        self._made_of = None
        self._last_step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, optimizer: Optimizer
    ) -> None:
        """Start averaging thawed parameters before their first step changes them."""
        self._add_trainable(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *args: Any
    ) -> None:
        """Update the averages if the optimizer made a step."""
        stepped = trainer.global_step != self._last_step and not pl_module.last_step_skipped
        self._last_step = trainer.global_step
        if not stepped:
            return
        self.num_updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        # Of sharded weights this rank's parts: without communication.
        weights = {n: local_part(w).to(_dtype(w)) for n, w in self._weights(pl_module).items()}
        # In place and for all tensors at once: m + (1 - d) (w - m).
        torch._foreach_lerp_(
            [local_part(self._averages[name]) for name in weights],
            list(weights.values()),
            1 - decay,
        )
        self._powers.update(weights, num_updates=self.num_updates)
        self._powers.snapshot(
            trainer,
            num_updates=self.num_updates,
            every=self.snapshot_every,
            most=self.num_snapshots,
        )

    @contextmanager
    def averaged(self, pl_module: MultiTaskDiffusion) -> Iterator[None]:
        """Inside, the backbone has the averaged weights."""
        was_swapped = self._live is not None  # an evaluation loop has the averages in already
        self._swap_in(pl_module)
        try:
            yield
        finally:
            if not was_swapped:
                self._swap_out(pl_module)

    @contextmanager
    def live(self, pl_module: MultiTaskDiffusion) -> Iterator[None]:
        """Inside, the backbone has the weights that are trained."""
        was_swapped = self._live is not None
        self._swap_out(pl_module)
        try:
            yield
        finally:
            if was_swapped:
                self._swap_in(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Evaluate the averages."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Restore the live weights."""
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Record which weights the averages belong to."""
        if self._averages and self._made_of is None:
            self._made_of = _digest(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, exception: BaseException
    ) -> None:
        """Restore the live weights: an evaluation may have failed."""
        self._swap_out(pl_module)
        try:
            self.teardown(trainer, pl_module, "")
        except RuntimeError:  # the device failed: its weights cannot be read, so drop the averages
            self.reset()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint that is written during an evaluation holds the live weights as well."""
        for name, weight in (self._live or {}).items():
            checkpoint["state_dict"][f"backbone.{name}"] = weight

    def state_dict(self) -> dict[str, Any]:
        """The averages, the number of updates, and the digests of the snapshots."""
        state: dict[str, Any] = {"averages": dict(self._averages), "num_updates": self.num_updates}
        return state | self._powers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the averages of a checkpoint, whose weights the model already has."""
        self._averages = {name: value.clone() for name, value in state_dict["averages"].items()}
        self._powers = PowerAverages.of_state(state_dict, self._powers.folder)
        self.num_updates = int(state_dict["num_updates"])
        self._made_of = None

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, checkpoint: dict[str, Any]
    ) -> None:
        """Find the snapshots of the checkpoint's run."""
        path = str(trainer.ckpt_path or "")
        self._powers.folder = (
            snapshot_folder(Path(path).parent) if path and "://" not in path else None
        )

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the averages, if the parent gets the weights too."""
        return super().child_state(trainer) if trainer.state.fn == "fit" else {}

    def _forget_others(self, pl_module: MultiTaskDiffusion) -> None:
        """Drop the averages if they belong to other weights."""
        if self._made_of not in (None, _digest(pl_module)):
            rank_zero_info("ema: the averages belong to other weights and restart from these")
            self.reset()

    def _all(self) -> list[dict[str, Tensor]]:
        """The averages of every kind."""
        return [self._averages, *self._powers.tracked.values()]

    def _add_trainable(self, pl_module: MultiTaskDiffusion) -> None:
        """Start averages of trained parameters that have none, at their current values."""
        for name, weight in pl_module.backbone.named_parameters():
            if weight.requires_grad and name not in self._averages:
                for averages in self._all():
                    averages[name] = weight.detach().to(_dtype(weight), copy=True)

    def _evaluated(self) -> dict[str, Tensor]:
        """The averages that an evaluation uses."""
        # The sanity check of a new run comes before its first update.
        if self.length is None or (self._in_fit and not self.num_updates):
            return self._averages
        return self._powers.of_length(self.length, num_updates=self.num_updates)

    def _weights(self, pl_module: MultiTaskDiffusion) -> dict[str, Tensor]:
        """The parameters that have averages, by name."""
        named = pl_module.backbone.named_parameters()
        return {name: p for name, p in named if name in self._averages}

    def _swap_in(self, pl_module: MultiTaskDiffusion) -> None:
        if self._live is None:
            self._forget_others(pl_module)
            averages = self._evaluated()
            _bind(averages, pl_module)
            weights = self._weights(pl_module)
            self._live = {name: w.detach().clone() for name, w in weights.items()}
            _copy(averages, weights)

    def _swap_out(self, pl_module: MultiTaskDiffusion) -> None:
        if self._live is not None:
            reshard(pl_module.backbone)  # FSDP2 gathered the averages for the evaluation
            _copy(self._live, self._weights(pl_module))
            self._live = None


def averaged_weights(
    trainer: L.Trainer, pl_module: MultiTaskDiffusion
) -> AbstractContextManager[None]:
    """A context in which `pl_module` has its EMA weights, if the trainer keeps them.

    Examples:
        >>> import torch, lightning as L
        >>> from ant_lightning import averaged_weights
        >>> trainer = L.Trainer(logger=False)  # without an EMA, the weights stay as they are
        >>> with averaged_weights(trainer, L.LightningModule()):
        ...     print("sample here")
        sample here
    """
    callback = callback_of(trainer, EMA)
    return nullcontext() if callback is None else callback.averaged(pl_module)


def _bind(averages: dict[str, Tensor], pl_module: MultiTaskDiffusion) -> None:
    """Move averages to the device of the weights, and shard them as these are."""
    weights = dict(pl_module.backbone.named_parameters())
    for name, average in averages.items():
        if name not in weights or weights[name].shape != average.shape:
            raise ConfigError(
                f"ckpt_path: must have EMA weights of this backbone, found others at {name}"
            )
        weight = weights[name]
        # Replacing values is safe in this loop: no key is added or removed.
        averages[name] = from_full(average.to(weight.device, _dtype(weight)), weight)


def _digest(pl_module: MultiTaskDiffusion) -> str:
    """Digest of every byte of the backbone's weights; of this rank's part if they are sharded."""
    return tensors_digest(local_part(p) for p in pl_module.backbone.parameters())


def _dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the average: half precision would round small updates away."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if target:
        torch._foreach_copy_(
            [local_part(each) for each in target.values()],
            [local_part(source[name]) for name in target],
        )
