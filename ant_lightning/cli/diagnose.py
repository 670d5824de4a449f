"""`ant-lightning diagnose RUN`: would balancing help this model? A page with the answer.

It is `validate` with the callback `Diagnosis` alone: of a run's newest checkpoint, or of a config
whose `model.init_from` names the weights of others.
"""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING

from ant_lightning.cli.config_files import HELP
from ant_lightning.cli.records import with_run
from ant_lightning.cli.source_names import arguments_of, class_of
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_diagnose(args: Sequence[str]) -> None:
    """Diagnose a run (`RUN [options]`), or a config (`--config NAME [options]`).

    Options `--num_images 256` and the like are those of `Diagnosis`; all others are those of
    `validate`.

    Raises:
        ConfigError: If the folder is not that of a run with a checkpoint, or an option is wrong.
    """
    if HELP.intersection(args):
        print(_help())
        return
    own, rest = validation(args)
    # Imported here: `validation` is needed before the imports of a run.
    from ant_lightning.cli.parser import run  # noqa: PLC0415

    callback = {"class_path": "ant_lightning.Diagnosis", "init_args": own}
    # Without the table of losses, so that the advice is what stands at the end.
    args = ["validate", "--verbose=false", *rest, f"--trainer.callbacks={json.dumps([callback])}"]
    try:
        run(args, called="diagnose")
    except ConfigError as error:  # of an option that is one of the callback's
        raise ConfigError(re.sub(r"^trainer\.callbacks(\[0\])?\.", "", str(error))) from error


def validation(args: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """The settings of `Diagnosis` among the options, and the arguments of `validate`.

    Raises:
        ConfigError: If the folder is not that of a run, or neither it nor a config is given.
    """
    _, *rest = with_run(["validate", *args])
    if not any(each.partition("=")[0] in {"-c", "--config"} for each in rest):
        raise ConfigError("diagnose: needs the folder of a run, or --config, found none")
    own, rest = _split(rest)
    if not any(each.startswith("--trainer.limit_val_batches") for each in rest):
        rest.append("--trainer.limit_val_batches=1.0")  # a run may have trained without validation
    return own, rest


def _help() -> str:
    source = class_of("Diagnosis")  # read without its imports, which take seconds
    text = source and ast.get_docstring(source)
    found = re.search(r"Args:\n(.*?)\n\n", text or "", re.DOTALL)
    own = re.sub(r"^    (\w+):", r"  --\1:", found[1] if found else "", flags=re.MULTILINE)
    return "\n".join(
        [
            "usage: ant-lightning diagnose RUN [options]",
            "       ant-lightning diagnose --config NAME [options]",
            "",
            "options of the diagnosis (ant-lightning validate --help lists the others):",
            own,
        ]
    )


def _split(args: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """The settings of `Diagnosis` among the options, and the other options."""
    names = arguments_of("Diagnosis") or frozenset()
    own: dict[str, object] = {}
    others, rest = [], list(args)
    while rest:
        option, sign, value = rest.pop(0).partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--") or name not in names:
            others.append(option + sign + value)
            continue
        if not sign and not rest:
            raise ConfigError(f"{name}: needs a value, found none")
        text = value if sign else rest.pop(0)
        try:
            own[name] = json.loads(text)
        except ValueError:
            own[name] = text
    return own, others
