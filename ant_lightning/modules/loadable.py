"""`load_from_checkpoint` for every module: of a file that runs no code, into given arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from ant_lightning.errors import ConfigError
from ant_lightning.modules.checkpoint_content import read_whole_checkpoint

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["LoadableModule", "fill_module"]


class LoadableModule(L.LightningModule):
    """A module that can be made from a checkpoint and its own arguments."""

    @_restricted_classmethod  # a result that is not used would go unnoticed on an instance
    def load_from_checkpoint(  # type: ignore[override]
        cls,  # noqa: N805
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **arguments: Any,
    ) -> Self:
        """Make the module from its arguments, and give it the weights that were trained.

        These are the live ones; `ant_lightning.load_run` needs no arguments and gives the averages.

        Args:
            checkpoint_path: The file.
            map_location: The module's device; by default the CPU.
            hparams_file: Not used: no file of settings overrides the arguments.
            strict: Whether the names must agree, which is checked in any case.
            weights_only: Always true: nothing in the file can run.
            arguments: All that the class is made with, as for training.

        Raises:
            ConfigError: If an argument is missing, or the checkpoint is that of another model.
            FileError: If the file is damaged, or would run code.
        """
        if hparams_file is not None or weights_only is False:
            raise ConfigError(
                "load_from_checkpoint: must be given arguments in place of hparams_file, and "
                f"weights_only true, found {hparams_file} and {weights_only}"
            )
        content = read_whole_checkpoint(Path(checkpoint_path), setting="checkpoint_path")
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
    """Give a module the state and the live weights of a checkpoint.

    Raises:
        ConfigError: If it is that of another model.
    """
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=strict)
