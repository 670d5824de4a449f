"""One way to every logger for what is not a number: pictures, settings and files of a run.

TensorBoard, W&B, MLflow and loggers with Comet's interface each get what they can show; every other
logger, such as CSV, gets the settings. All of it is for rank 0.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from lightning.pytorch.loggers import Logger
    from numpy.typing import NDArray

# Results and records of a run; its checkpoints, images and the files of loggers are not.
_SENT = {".yaml", ".json", ".jsonl", ".md", ".safetensors"}
_NOT_SENT = {"hparams.yaml"}
_LARGEST = 2**28  # bytes
# Columns of TensorBoard's tab "HParams".
_RESULTS = ("val/loss", "val/fid")


def prepare_loggers(loggers: Iterable[Logger]) -> None:
    """Take from W&B a setting that it warns of, and that Lightning gives it without being asked."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
            logger._wandb_init.pop("anonymous", None)


def send_picture(
    loggers: Iterable[Logger], tag: str, pixels: NDArray[np.uint8], *, step: int
) -> None:
    """Send a picture `[h, w, 3]` to every logger that shows pictures."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if isinstance(logger, TensorBoardLogger):
            experiment.add_image(tag, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [pixels], step=step)
        elif isinstance(logger, MLFlowLogger):
            # At once: a run that ends must not leave pictures in a thread's queue.
            experiment.log_image(logger.run_id, pixels, key=tag, step=step, synchronous=True)
        elif hasattr(experiment, "log_image"):  # Comet
            experiment.log_image(pixels, name=tag, step=step)


def send_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Send settings, flat and plain, as the hyperparameters of the run."""
    plain = {name: _plain(value) for name, value in settings.items()}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger, plain)
        elif isinstance(logger, MLFlowLogger):
            # There a value can never change; a resumed run has some of them.
            run: Any = logger.experiment.get_run(logger.run_id)
            logger.log_hyperparams({n: v for n, v in plain.items() if n not in run.data.params})
        else:
            logger.log_hyperparams(plain)


def send_files(loggers: Iterable[Logger], folder: Path) -> None:
    """Send the records and results in a run's folder to loggers that keep files elsewhere."""
    paths = [
        path
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        if path.suffix in _SENT and path.name not in _NOT_SENT and path.stat().st_size <= _LARGEST
    ]
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        for path in paths:
            if isinstance(logger, WandbLogger):
                with redirect_stderr(StringIO()):  # it says of each file that it is linked
                    experiment.save(str(path.absolute()), str(folder.absolute()), policy="now")
            elif isinstance(logger, MLFlowLogger):
                experiment.log_artifact(logger.run_id, str(path))
            elif hasattr(experiment, "log_asset"):  # Comet
                experiment.log_asset(str(path), file_name=path.name, overwrite=True)


def _to_tensorboard(logger: TensorBoardLogger, settings: Mapping[str, Any]) -> None:
    """Fill the tab "HParams" and `hparams.yaml`.

    `TensorBoardLogger.log_hyperparams` would also log a number for each result, at step 0.
    """
    logger.hparams.update(settings)
    folder = Path(logger.log_dir)
    if not folder.is_dir():  # a trial run
        return
    from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415 - imports tensorboard

    writer: Any = logger.experiment._get_file_writer()
    for summary in hparams(dict(settings), dict.fromkeys(_RESULTS, 0.0)):
        writer.add_summary(summary)
    # Lightning has written an empty one before the first step.
    save_hparams_to_yaml(str(folder / logger.NAME_HPARAMS_FILE), logger.hparams)


def _plain(value: Any) -> bool | int | float | str:  # noqa: ANN401 - whatever a setting may be
    return value if isinstance(value, bool | int | float | str) else str(value)
