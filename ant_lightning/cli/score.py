"""`ant-lightning score`: FID and other scores of images that are stored in files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from jsonargparse import ArgumentParser, set_loader
from yaml import YAMLError

from ant_lightning.cli.config_files import check_config_file, import_named_classes, load_yaml
from ant_lightning.cli.renamed import refuse_old_names
from ant_lightning.cli.setting_paths import SettingPaths
from ant_lightning.data.module import ImageDataModule
from ant_lightning.data.stored_images import StoredImages
from ant_lightning.errors import ConfigError
from ant_lightning.generation import (
    shipped_networks,  # noqa: F401 - so that --help lists every extractor
    transformers_features,  # noqa: F401
)
from ant_lightning.generation.callback import GenerationMetrics
from ant_lightning.runtime.progress_display import ProgressDisplay
from ant_lightning.runtime.quiet import keep_quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

# The parser then reads every YAML value through our checks.
set_loader("yaml", load_yaml, exceptions=(YAMLError,))


def run_score(args: Sequence[str]) -> dict[str, float]:
    """Score the images of `args` (without the command's name); print and return the scores.

    `--config` takes the config of a run. Only its `data` and the `GenerationMetrics` among its
    `trainer.callbacks` are used. Options such as `--metrics.k 5` change settings of the latter.

    Raises:
        ConfigError: If an argument, or a file that one names, is wrong.
    """
    keep_quiet("score")
    parser = ArgumentParser(prog="ant-lightning score", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="config of a run")
    parser.add_argument("--images", type=str, required=True, help="folder, or npz file as ADM's")
    parser.add_argument("--captions", type=str | None, help="file with a caption a line")
    parser.add_argument("--clip", type=str | None, help="folder of transformers' CLIP, for these")
    parser.add_argument("--output", type=str | None, help="append the scores as a line of JSON")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, ..")
    parser.add_argument("--devices", type=int, default=1, help="processes that share the images")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    parser.add_class_arguments(GenerationMetrics, "metrics")
    import_named_classes(args)
    with SettingPaths() as paths:
        settings = paths.make(parser, lambda: parser.parse_args(_without_the_run(args)))
        fabric = L.Fabric(accelerator=settings.accelerator, devices=settings.devices)
        fabric.launch()
        settings.metrics.need_extractor("--metrics.extractor")
        images = StoredImages(settings.images)
        captions = captions_of(settings.captions, settings.clip, images)
        scores = score_images(settings.metrics, settings.data, images, fabric)
        if captions:
            limit = settings.metrics.num_images
            scores["clip_score"] = caption_score(images, captions, settings.clip, fabric, limit)
    if fabric.is_global_zero:
        print(f"score: {settings.metrics.about(scores, 'stored')}")
        for name, value in scores.items():
            print(f"{name:28} {value:.6g}")
        if settings.output is not None:
            row = {
                "images": settings.images,
                "scores": scores,
                "extractor": settings.metrics.extractor.name,
                "reference": settings.metrics.reference or "held-out images",
                "k": settings.metrics.k,
            }
            with Path(settings.output).open("a") as file:
                file.write(json.dumps(row) + "\n")
    return scores


def score_images(
    metrics: GenerationMetrics, data: ImageDataModule, images: StoredImages, fabric: L.Fabric
) -> dict[str, float]:
    """The scores of stored images; the ranks of `fabric` share them.

    Raises:
        ConfigError: If there are fewer images than `metrics.num_images`, or than ranks, or they
            have another shape than the real ones.
    """
    num_images, ranks = metrics.num_images or images.num_images, fabric.world_size
    if not ranks <= num_images <= images.num_images:
        raise ConfigError(
            f"metrics.num_images: must be {ranks} (ranks) to {images.num_images} (images of "
            f"{images.path}), found {num_images}"
        )
    data.setup("test")
    # Seed 0 by default: there is no module whose seed could be used.
    progress = partial(ProgressDisplay, "score", hidden=not fabric.is_global_zero)
    scores = metrics.new_scores(
        data, seed=metrics.seed or 0, device=fabric.device, progress=progress
    )
    needed = scores.real.image_shape
    if needed and images.image_shape != needed:
        rule, found = (
            f"{height} x {width} with {channels} channel{'s' * (channels > 1)}"
            for channels, height, width in (needed, images.image_shape)
        )
        raise ConfigError(
            f"images: must be {rule}, as the real images are read, found {found} in {images.path}"
        )
    with progress("images", total=num_images) as shown:
        for batch in images.batches(
            batch_size=metrics.batch_size, limit=num_images, first=fabric.global_rank, every=ranks
        ):
            scores.update(batch)
            shown.show(min(num_images, shown.done + len(batch) * ranks), num_images)
    return scores.compute()


def captions_of(path: str | None, clip: str | None, images: StoredImages) -> list[str]:
    """The captions of stored images, from a file with one on each line, in the images' order.

    Raises:
        ConfigError: If only one of `captions` and `clip` is given, or the file has another number
            of lines than there are images.
    """
    if (path is None) != (clip is None):
        given, missing = ("captions", "clip") if clip is None else ("clip", "captions")
        raise ConfigError(f"{missing}: must be given with {given}, found none")
    if path is None:
        return []
    if not Path(path).is_file():
        raise ConfigError(f"captions: must be a file, found {path}")
    lines = Path(path).read_text(encoding="utf8").splitlines()
    if len(lines) != images.num_images:
        raise ConfigError(
            f"captions: must have {images.num_images} lines, one for each image, found "
            f"{len(lines)} in {path}"
        )
    return lines


def caption_score(
    images: StoredImages,
    captions: Sequence[str],
    clip: str,
    fabric: L.Fabric,
    limit: int | None = None,
) -> float:
    """CLIP score of stored images with their captions; the ranks of `fabric` share them."""
    # Imported here: it imports transformers.
    from ant_lightning.generation.clip_score import CaptionScore  # noqa: PLC0415

    metric = CaptionScore(clip).to(fabric.device)
    limit = limit or images.num_images
    first, every = fabric.global_rank, fabric.world_size
    mine = iter(range(first, limit, every))
    for batch in images.batches(limit=limit, first=first, every=every, batch_size=64):
        metric.update(batch.to(fabric.device), [captions[next(mine)] for _ in batch])
    return float(metric.compute())


def _without_the_run(args: Sequence[str]) -> list[str]:
    """The arguments with each config file replaced by the settings that are used here."""
    found, rest = [], list(args)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if name in {"--config", "-c"} and (sign or rest):
            path = value if sign else rest.pop(0)
            check_config_file(path)
            # The parser would refuse all other settings of a run.
            used = _used_settings(load_yaml(Path(path).read_text(encoding="utf8")))
            found.append(f"--config={json.dumps(used)}")
        else:
            found.append(name + sign + value)
    return found


def _used_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`data` and `metrics` of a config, the latter also from a callback of the trainer."""
    used: dict[str, Any] = {name: config[name] for name in ("data", "metrics") if name in config}
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        callback = each if isinstance(each, dict) else {"class_path": each}
        if str(callback.get("class_path")).rpartition(".")[2] == GenerationMetrics.__name__:
            used["metrics"] = callback.get("init_args", {})
    refuse_old_names(used)
    return used
