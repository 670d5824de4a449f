"""`--model.process.help EDM`: the options of a class, also without the settings around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ant_lightning
from ant_lightning.cli.messages import unknown_class
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# The setting that takes a class, by the name of its base.
_SETTINGS = {
    "LightningModule": "model",
    "LightningDataModule": "data",
    "Callback": "trainer.callbacks",
    "NoiseProcess": "model.process",
    "NoiseSchedule": "model.process.schedule",
    "Sampler": "model.sampling.sampler",
    "Balancer": "model.tasks.balancer",
    "Clustering": "model.tasks.clustering",
    "DiT": "model.backbone",
    "UNet": "model.backbone",
    "DiffusersBackbone": "model.backbone",
}
# Their parts can be asked for only if they have a class.
_AROUND = {"model": "MultiTaskDiffusion", "model.process": "DiscreteDiffusion"}


def with_classes_around(args: Sequence[str]) -> list[str]:
    """The arguments of a command, with a class for each setting around the one whose help is asked.

    Raises:
        ConfigError: If a class does not exist, or is for another setting.

    Examples:
        >>> from ant_lightning.cli.class_help import with_classes_around
        >>> with_classes_around(["fit", "--model.process.help", "EDM"])
        ['fit', '--model=MultiTaskDiffusion', '--model.process.help', 'EDM']
    """
    args = list(args)
    given = [each.partition("=")[0] for each in args]
    at = next((i for i, name in enumerate(given) if name.endswith(".help")), None)
    if at is None:
        return args
    setting = given[at].removeprefix("--").removesuffix(".help")
    named = args[at].partition("=")[2] or "".join(args[at + 1 : at + 2])
    name = named.removeprefix("ant_lightning.")
    if name in ant_lightning.__all__ and setting in _SETTINGS.values():
        bases = getattr(getattr(ant_lightning, name), "__mro__", ())  # a function has none
        places = [_SETTINGS[base.__name__] for base in bases if base.__name__ in _SETTINGS]
        if setting not in places:
            other = f"; --{places[0]}.help {name} shows its options" if places else ""
            raise ConfigError(f"{setting}.help: must be a class for {setting}, found {name}{other}")
    if {"--config", "-c"}.intersection(given):
        return args
    known = {each.removesuffix(".class_path") for each in given}
    # A model of the user's may have imported other classes, which then have short names too.
    of_ours = setting in _SETTINGS.values() and setting != "trainer.callbacks"
    is_short = name.isidentifier() and name not in ant_lightning.__all__
    if of_ours and is_short and "--model" not in known:
        raise ConfigError(unknown_class(f"{setting}.help", named))
    around = [
        f"--{outer}={kind}"
        for outer, kind in _AROUND.items()
        if setting.startswith(f"{outer}.") and f"--{outer}" not in known
    ]
    return [args[0], *around, *args[1:]]
