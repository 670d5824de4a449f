"""`load_from_checkpoint` for every module, without running code from the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from ant_lightning.errors import ConfigError
from ant_lightning.runtime.checkpoint_files import read_whole_checkpoint

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["LoadableModule", "fill_module"]


class LoadableModule(L.LightningModule):
    """A module that can be constructed from a checkpoint and its own arguments."""

    @_restricted_classmethod  # called on an instance, it would leave the instance unchanged
    def load_from_checkpoint(  # type: ignore[override]
        cls,  # noqa: N805
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **arguments: Any,
    ) -> Self:
        """Construct the module from its arguments and load the live weights of a checkpoint.

        `ant_lightning.load_run` needs no arguments and loads the averaged weights.

        Args:
            checkpoint_path: The checkpoint.
            map_location: The module's device; by default the CPU.
            hparams_file: Must be None: the settings are `arguments`.
            strict: Passed to `load_state_dict`; the weights' names are checked in any case.
            weights_only: Must not be False: nothing in the file may run.
            arguments: All constructor arguments, as for training.

        Raises:
            ConfigError: If an argument is missing, or the checkpoint belongs to another model.
            FileError: If the file is damaged, or would run code.
        """
        if hparams_file is not None or weights_only is False:
            raise ConfigError(
                "load_from_checkpoint: must be given arguments in place of hparams_file, and "
                f"weights_only true, found {hparams_file} and {weights_only}"
            )
        content = read_whole_checkpoint(Path(checkpoint_path))
        try:
            module = cls(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"load_from_checkpoint: {cls.__name__} needs the arguments that it was trained "
                f"with, found others ({error}); ant_lightning.load_run(path) takes them from the "
                "settings of the run"
            ) from error
        fill_module(module, content, strict=strict is not False)
        return module.to(map_location or "cpu")


def fill_module(module: L.LightningModule, content: dict[str, Any], *, strict: bool = True) -> None:
    """Load the state and the live weights of a checkpoint into a module.

    Raises:
        ConfigError: If the checkpoint belongs to another model.
    """
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=strict)
