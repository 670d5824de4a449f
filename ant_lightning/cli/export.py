"""`ant-lightning export RUN --to FORMAT`: a trained model for others' programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ant_lightning import __version__
from ant_lightning.cli.load_run import load_run, run_settings
from ant_lightning.cli.run_arguments import Format, run_arguments
from ant_lightning.data.class_map import read_class_map
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.exports.card import model_card
from ant_lightning.exports.exported import Exported, new_folder
from ant_lightning.exports.pipeline_folder import write_pipeline
from ant_lightning.exports.pipeline_source import PipelineSource, pipeline_source
from ant_lightning.exports.single_files import write_official, write_program, write_safetensors
from ant_lightning.exports.text_pipeline import is_told_text, pipeline_class
from ant_lightning.files.json_file import write_json
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.module import MultiTaskDiffusion
from ant_lightning.runtime.quiet import keep_quiet
from ant_lightning.runtime.run_files import RUN_OR_CHECKPOINT, no_run
from ant_lightning.transfer.experts import with_experts

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRITERS = {
    "official": write_official,
    "safetensors": write_safetensors,
    "torch": write_program,
}


def export(
    run: str | Path,
    *,
    to: Format,
    output: str | Path | None = None,
    weights: Literal["ema", "live"] = "ema",
    first_stage: str | None = None,
    experts: Sequence[str] | None = None,
    merge_weights: Sequence[float] | None = None,
    source: str | None = None,
    config: str | Path | None = None,
    trust: str | Sequence[str] = (),
) -> Exported:
    """Write a trained model for other programs, into a folder with a model card.

    What has no exact equivalent is refused, with the reason. A scheduler of diffusers that samples
    otherwise than the run is said in `notes`, on the command line and in the card.

    Args:
        run: Folder of a run, or a checkpoint.
        to: `diffusers`: a pipeline folder with network, scheduler and first stage, for
            `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`. `official`: the
            file that the official repository of DiT, SiT, ADM, P2 or latent diffusion reads.
            `safetensors`: the weights with their settings, for `load_run`. `torch`: a program of
            `torch.export`.
        output: The folder; by default `exports/<to>` in the run's. One that an export wrote is
            replaced, any other is left as it is.
        weights: The moving average, or the live weights.
        first_stage: Folder of the first stage of a run on cached latents.
        experts: Checkpoints of specialists of intervals, see `with_experts`: the model switches
            between them and the run's own.
        merge_weights: A weight for each of them, to merge them into one network instead.
        source: Folder of the pipeline whose text encoders and tokenizers go into that of a network
            that is told text; by default the one that the run's settings name.
        config: The settings of the run, if they are not stored with it.
        trust: Other packages, modules or classes that the settings may name, one or several.

    Returns:
        The folder; `push_to_hub("owner/name")` uploads it.

    Raises:
        ConfigError: If the run cannot be loaded, a part has no equivalent, or the folder is not
            free.

    Examples:
        `export("runs/digits/version_0", to="diffusers").push_to_hub("me/digits")` uploads a
        pipeline. The command line does the same:
        `ant-lightning export runs/digits/version_0 --to diffusers --push_to_hub me/digits`.

        >>> from ant_lightning import export
        >>> export("runs/none", to="pickle")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ant_lightning.errors.ConfigError: to: must be one of ..., found 'pickle'
    """
    for name, value, known in (
        ("to", to, ("diffusers", *_WRITERS)),
        ("weights", weights, ("ema", "live")),
    ):
        if value not in known:
            raise ConfigError(f"{name}: must be one of {', '.join(known)}, found {value!r}")
    path = Path(run)
    if not path.exists():
        raise no_run(path, "nothing", RUN_OR_CHECKPOINT)
    module: Any = load_run(
        path, weights="ema" if weights == "ema" else "model", config=config, trust=trust
    )
    if not isinstance(module, MultiTaskDiffusion):
        raise ConfigError(f"run: must be of a diffusion model, found {type(module).__name__}")
    if first_stage is not None:
        _give_first_stage(module, first_stage)
    if experts or merge_weights:
        if merge_weights is None and to != "diffusers":
            raise ConfigError(
                "to: must be diffusers for a model that switches between experts (give "
                f"merge_weights to make it one network), found {to!r}"
            )
        averaged = weights == "ema"
        module = with_experts(module, experts or [], merge_weights=merge_weights, averaged=averaged)
    settings = run_settings(path, config)
    found = _source(module, to, settings, source)
    folder = _run_folder(path)
    about: dict[str, Any] = {
        "to": to,
        "weights": weights,
        "trained_steps": module.trained_steps,
        "experts": [str(each) for each in experts or ()],
        "merge_weights": merge_weights if merge_weights is None else list(merge_weights),
        "ant_lightning": __version__,
    }
    goal = folder / "exports" / to if output is None else Path(output)
    with new_folder(goal, about) as made:
        if to == "diffusers":
            names = _class_names(folder, module.num_classes)
            about["notes"] = write_pipeline(module, made, source=found, class_names=names)
        else:
            about["notes"] = _WRITERS[to](module, made)
        card = model_card(module, settings, folder, about=about, source=found)
        (made / "README.md").write_text(card, encoding="utf8")
        if to == "safetensors":
            keys = ("model", "data", "seed_everything")
            if module.adapter is None:  # folded into the weights
                (settings["model"].get("init_args") or {}).pop("adapter", None)
            write_json(made / "config.json", {k: settings[k] for k in keys if k in settings})
    return Exported(goal)


def run_export(args: Sequence[str]) -> None:
    """Export the run of `args` (without the command's name) and print where it is.

    Raises:
        ConfigError: If an argument is wrong, or a part has no equivalent.
    """
    keep_quiet("export")
    options = run_arguments("export", args)
    hub = options.pop("push_to_hub")
    exported = export(options.pop("run"), **options)
    for note in exported.notes:
        print(f"note: {note}")
    print(exported.path)
    if hub is not None:
        print(exported.push_to_hub(hub))


def _give_first_stage(module: MultiTaskDiffusion, source: str) -> None:
    """Use this first stage, if it made the latents of the run."""
    made = FirstStage(source)
    space = module.latent_space
    if space is None or made.fingerprint != space.fingerprint:
        wanted = "no first stage" if space is None else f"fingerprint {space.fingerprint}"
        raise ConfigError(
            f"first_stage: must be that of the run ({wanted}), found {made.fingerprint}"
        )
    module.first_stage = made


def _source(
    module: MultiTaskDiffusion, to: Format, settings: dict[str, Any], given: str | None
) -> PipelineSource | str:
    """The pipeline that the text encoders come from, or why there is none.

    Its first stage decodes the cached latents of the run, if it made them.
    """
    is_whole = to == "diffusers" and module.adapter is None and is_told_text(module.backbone)
    name = pipeline_class(module.backbone) if is_whole else None
    if name is None:
        if given is not None:
            raise ConfigError(
                "source: must be left out unless a whole network that is told text leaves for a "
                f"pipeline of diffusers, found {given}"
            )
        return ""
    found = pipeline_source(settings, name, given)
    space = module.latent_space
    if module.first_stage is None and space is not None and isinstance(found, PipelineSource):
        folder = found.folder / "vae"
        if (folder / "config.json").is_file():
            made = FirstStage(str(folder))
            if made.fingerprint == space.fingerprint:
                module.first_stage = made
    return found


def _class_names(run_folder: Path, num_classes: int) -> list[str]:
    """The names of the classes that a run recorded, if it did and they are still so many."""
    path = run_folder / "class_map.json"
    try:
        names = read_class_map(path) if path.is_file() else []
    except FileError:
        return []
    return names if len(names) == num_classes else []


def _run_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder
