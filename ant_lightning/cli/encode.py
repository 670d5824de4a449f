"""`ant-lightning encode`: write latents or embeddings of captions once, for training to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser, set_loader
from yaml import YAMLError

from ant_lightning.cli.config_files import (
    check_config_file,
    config_paths,
    import_named_classes,
    load_yaml,
)
from ant_lightning.cli.setting_paths import SettingPaths
from ant_lightning.data.latents.writer import LatentWriter
from ant_lightning.data.module import ImageDataModule
from ant_lightning.data.text.cache import TextWriter
from ant_lightning.errors import ConfigError
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.runtime.progress_display import ProgressDisplay
from ant_lightning.runtime.quiet import keep_quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

# The parser then reads every YAML value through our checks.
set_loader("yaml", load_yaml, exceptions=(YAMLError,))


def run_encode(args: Sequence[str]) -> int:
    """Encode the data of `args` (without the command's name); return the number of shards written.

    Several processes share the work if a launcher such as `torchrun` sets `RANK`, `WORLD_SIZE` and
    `LOCAL_RANK`; they do not communicate.

    Raises:
        ConfigError: If an argument, or a file that one names, is wrong.
    """
    keep_quiet("encode")
    parser = ArgumentParser(prog="ant-lightning encode", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="file of the settings below")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    # A command writes either latents or embeddings of captions.
    writes_text = _writes_text(args)
    if writes_text:
        parser.add_class_arguments(TextWriter, "text")
    else:
        parser.add_class_arguments(FirstStage, "first_stage")
        parser.add_class_arguments(LatentWriter, "cache")
    parser.add_argument(
        "--device", type=str, default="auto", help="cpu, cuda, cuda:1, ..; auto takes a GPU"
    )
    for path in config_paths(args):
        check_config_file(path)
    import_named_classes(args)
    with SettingPaths() as paths:
        settings = paths.make(parser, lambda: parser.parse_args(list(args)))
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = _device(settings.device)
        settings.data.setup("predict")
        ranks: Any = {"rank": rank, "world_size": world_size, "device": device}
        writer: LatentWriter | TextWriter = settings.text if writes_text else settings.cache
        with ProgressDisplay("encode", "shards", hidden=rank > 0) as shown:
            ranks["on_progress"] = shown.show
            if isinstance(writer, TextWriter):
                count = writer.write(_captions(settings.data), **ranks)
            else:
                count = writer.write(settings.data, settings.first_stage.to(device), **ranks)
    print(f"rank {rank} of {world_size}: wrote {count} shards to {writer.output}")
    return count


def _writes_text(args: Sequence[str]) -> bool:
    """Whether the command line or a file of it has settings of `text`."""
    texts = [load_yaml(Path(path).read_text(encoding="utf8")) for path in config_paths(args)]
    return any(arg.startswith("--text") for arg in args) or any("text" in each for each in texts)


def _captions(data: ImageDataModule) -> list[str]:
    captions = getattr(data, "captions", None)
    if captions is None:
        raise ConfigError(
            "data: must have captions to encode text, as CaptionFolderData has, found "
            f"{type(data).__name__}"
        )
    return list(captions())


def _device(name: str) -> torch.device:
    """The device of this name; `auto` is this process's GPU, if there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device  # fails if there is no such device here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device: must be auto, cpu, cuda or cuda:1, .. of this machine, found {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
