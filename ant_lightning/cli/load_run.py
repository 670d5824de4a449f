"""Loads a trained module from a run's checkpoint and settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from ant_lightning.backbones.official_checkpoints import fill_backbone
from ant_lightning.callbacks.power_averages import PowerAverages, snapshot_folder
from ant_lightning.callbacks.power_function import check_length
from ant_lightning.cli.config_files import check_config_file, load_yaml
from ant_lightning.cli.parts import make_part
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.cli.run_folder import stored_settings
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.exports.single_files import EXPORTED_WEIGHTS
from ant_lightning.files.json_file import read_json
from ant_lightning.files.safetensors_file import read_safetensors, read_tensors
from ant_lightning.models.base import BaseModule
from ant_lightning.runtime.checkpoint_files import checkpoint_of_run, read_whole_checkpoint
from ant_lightning.runtime.run_files import RUN_OR_CHECKPOINT, no_run

if TYPE_CHECKING:
    from collections.abc import Sequence


def load_run(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    ema_length: float | None = None,
    config: str | Path | None = None,
    trust: str | Sequence[str] = (),
) -> L.LightningModule:
    """The module of a run with its trained weights, in evaluation mode on the CPU.

    The settings come from the checkpoint, or else from `config.yaml` in the run's folder. Nothing
    in the checkpoint can run, and the settings may only name classes of ant_lightning, torch,
    lightning and diffusers.

    Args:
        path: A checkpoint; the folder of a run, whose checkpoint with the most steps is loaded; or
            what `export(..., to="safetensors")` wrote, with the weights it has.
        weights: `ema` for the averaged weights, `model` for the live ones.
        ema_length: Length of the average, as `length` of `EMA`; `None` for that of its `decay`.
        config: The settings of the run, if they are not stored with it.
        trust: Other packages, modules or classes that the settings may name, one or several.

    Raises:
        ConfigError: If there is no checkpoint or no settings, the settings name a class that is not
            trusted, or they do not fit the checkpoint; if the run's averages do not give
            `ema_length`.
        FileError: If the checkpoint is damaged, or would run code.

    Examples:
        `load_run("runs/digits/version_0").sample(16)` draws images with a trained model. Here a
        checkpoint and its settings are written and loaded again.

        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from lightning import Trainer
        >>> from ant_lightning import DiT, DiTModule, SNRClustering, Tasks, load_run
        >>> sizes = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
        >>> module = DiTModule(DiT(**sizes), tasks=Tasks(SNRClustering(num_tasks=3)))
        >>> backbone = {"class_path": "ant_lightning.DiT", "init_args": sizes}
        >>> snr = {"class_path": "ant_lightning.SNRClustering", "init_args": {"num_tasks": 3}}
        >>> settings = {"backbone": backbone, "tasks": {"clustering": snr}}
        >>> config = {"model": {"class_path": "ant_lightning.DiTModule", "init_args": settings}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        ...     trainer.strategy.connect(module)
        ...     trainer.save_checkpoint(f"{folder}/step_0.ckpt")
        ...     _ = Path(f"{folder}/config.yaml").write_text(json.dumps(config))
        ...     loaded = load_run(
        ...         f"{folder}/step_0.ckpt", weights="model", config=f"{folder}/config.yaml"
        ...     )
        >>> loaded.num_tasks, loaded.training
        (3, False)
    """
    if weights not in {"ema", "model"}:
        raise ConfigError(f"weights: must be 'ema' or 'model', found {weights!r}")
    if ema_length is not None:
        check_length("ema_length", ema_length)
        if weights == "model":
            raise ConfigError(f"ema_length: must be None with weights 'model', found {ema_length}")
    if (Path(path) / EXPORTED_WEIGHTS).is_file():
        return _exported(Path(path), trust)
    path, content = _checkpoint(Path(path))
    settings = _settings(path, content, config)
    module: BaseModule = make_part(_of_model(settings), L.LightningModule, trust)
    module.load_content(content)
    if weights == "ema":
        averages = {} if ema_length is None else _of_length(content, path, ema_length)
        whole = content | averages
        held = module.not_stored
        fill_backbone(module.backbone, whole, path=path, weights="ema", held=held)  # type: ignore[arg-type]
    data = settings.get("data") or {}
    is_cache = str(data.get("class_path")).endswith("LatentsData")
    if is_cache and "latent_space" not in content.get("ant_lightning", {}):
        # A checkpoint of 0.1 does not describe its latent space; the cache of its latents does.
        module.latent_space = make_part(
            data, L.LightningDataModule, trust, name="data"
        ).latent_space
    return module.eval()


def run_settings(path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """The settings of the run that `load_run` would load.

    Raises:
        ConfigError: If there is no checkpoint or no settings.
    """
    return _settings(*_checkpoint(Path(path)), config)


def _exported(folder: Path, trust: str | Sequence[str]) -> L.LightningModule:
    """The module of weights and settings that were exported."""
    settings = read_json(folder / "config.json", kind=dict)
    if not isinstance(settings.get("model"), dict):
        raise FileError(f"{folder}/config.json: must hold the settings of a model, found none")
    path = folder / EXPORTED_WEIGHTS
    weights, _ = read_safetensors(path)
    _, about = read_tensors(path, {}, {"state": dict, "trained_steps": int})
    module: BaseModule = make_part(_of_model(settings), L.LightningModule, trust)
    fill_backbone(module.backbone, weights, path=folder, weights="ema")
    state = {"ant_lightning": about["state"], "global_step": about["trained_steps"]}
    module.load_content({**state, "state_dict": module.state_dict()})
    return module.eval()


def _checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at `path`, or the one with the most steps in a run folder; its content."""
    if not path.exists():
        raise no_run(path, "nothing", RUN_OR_CHECKPOINT)
    if not path.is_dir():
        return path, read_whole_checkpoint(path)
    return checkpoint_of_run(path)


def _of_length(content: dict[str, Any], path: Path, length: float) -> dict[str, Any]:
    """The entry `callbacks` of a checkpoint, with the average of this length for its only one."""
    state = (content.get("callbacks") or {}).get("EMA") or {}
    averages = PowerAverages.of_state(state, snapshot_folder(path.parent))
    try:
        found = averages.of_length(length, num_updates=int(state.get("num_updates", 0)))
    except ConfigError as error:
        raise ConfigError(f"ema_{error}") from error
    return {"callbacks": {"EMA": {"averages": found}}}


def _settings(path: Path, content: dict[str, Any], config: str | Path | None) -> dict[str, Any]:
    """The settings of the run: from `config`, its checkpoint or its folder, in this order."""
    if config is None:
        stored = stored_settings(content, path.resolve())
    else:
        check_config_file(config)
        stored = with_new_names(load_yaml(Path(config).read_text(encoding="utf8")))
        if not isinstance(stored.get("model"), dict):
            raise FileError(f"{config}: must hold the settings of a model, found none")
    if stored is None:
        raise ConfigError(
            f"config: needed, as {path} holds no settings and no config.yaml lies in its run's "
            "folder; give the run's config.yaml, or use the module's "
            "load_from_checkpoint(path, weights='ema', ...) with its own arguments"
        )
    return stored


def _of_model(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model; a seed of `None` becomes the run's, as on the command line."""
    init = {**(settings["model"].get("init_args") or {})}
    if init.get("adapter") is None:  # whose checkpoint lacks the weights below it
        init.pop("init_from", None)  # the checkpoint's weights replace it
    seed = settings.get("seed_everything")
    if init.get("seed", 0) is None and type(seed) is int:
        init["seed"] = seed
    return {**settings["model"], "init_args": init}
