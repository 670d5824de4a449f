r"""usage: ant-lightning {fit,validate,test,predict,score,encode} --config NAME [options]
       ant-lightning export RUN --to {diffusers,official,safetensors,torch}
       ant-lightning {validate,test,predict,report,diagnose,sweep,app} RUN [options]
       ant-lightning configs

Diffusion training as multi-task learning over clusters of timesteps.

  fit        train                         --ckpt_path last resumes
  validate   loss, FID and its companions  RUN (--scores false: the loss alone)
  test       the same, logged as test/...  RUN
  predict    write images                  RUN --num_images 1000
                                           (PNG files; --samples.npz FILE.npz for one file)
  score      FID ... of stored images      --config RUN/config.yaml --images FOLDER or FILE.npz
  diagnose   would balancing help? writes diagnosis.html into the folder of a run
  sweep      FID ... over guidance scales   --guidance 1 1.5 2, or EMA lengths, --ema 0.05 0.1
  app        a web page that draws from runs     RUN [RUN ..], needs ant-lightning[app]
  encode     write a cache of latents      --config imagenet/encode
             or of captions' embeddings    --config captions/encode
  export     write a trained model for diffusers, the official code, safetensors or torch.export
  report     write report.md and report.html into the folder of a run
  configs    list the configs by name; configs show NAME > my.yaml copies one

A config is a name without a suffix, or a path that ends in .yaml. Configs are merged from left to
right: a base, then one fragment for each choice, then options:

  ant-lightning fit --config digits/dit --config balancer/uw --config clustering/snr \
      --trainer.max_steps 2000

  ant-lightning fit --help                             all options of fit (takes some seconds)
  ant-lightning fit --model.help DiTModule             the options of a class
  ant-lightning fit --model.process.help EDM           and of one of its parts
  ant-lightning fit --config ... --print_config        the merged config, without running it
  ant-lightning --version
"""

# The text above is what `ant-lightning --help` prints, before anything else is imported.
from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import warnings
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, TextIO

from ant_lightning import __version__
from ant_lightning.cli.config_files import HELP
from ant_lightning.cli.configs import with_paths_of_configs
from ant_lightning.cli.first_look import first_look
from ant_lightning.cli.records import about_relative_path, need_run, with_run
from ant_lightning.cli.trainer_settings import with_classes_of_loggers
from ant_lightning.errors import (
    CheckpointWriteError,
    ConfigError,
    DataLoadingError,
    DivergedRanksError,
    NonFiniteError,
    message_of,
)
from ant_lightning.files.documentation import documentation
from ant_lightning.runtime.quiet import warn_in_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WITHOUT_LIGHTNING = ("configs", "report")  # they need not wait for its import
OTHERS = (
    "app",
    "diagnose",
    "encode",
    "export",
    "score",
    "sweep",
    *WITHOUT_LIGHTNING,
)  # a module each; the rest are the Trainer's
COMMANDS = ("fit", "validate", "test", "predict", *OTHERS)
# `--num_images` is the option of every command that draws or reads images; here it has a group.
NUM_IMAGES = {"predict": "--samples.num_images", "score": "--metrics.num_images"}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a run that failed; 2 for bad input; 143 (128 + SIGTERM) for a run
        that was told to stop and left a checkpoint to resume from (130 for Ctrl-C); 141 (128 +
        SIGPIPE) if the reader of the output, such as `head`, has closed it.
    """
    form = warnings.formatwarning
    try:
        try:
            return _main(list(sys.argv[1:] if args is None else args))
        finally:  # also where a parser prints its help and exits
            warnings.formatwarning = form
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        if not closed:  # it was another pipe
            raise
        for stream in closed:
            _give_up(stream)
        return 141
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _give_up(sys.stdout)
        where = error.filename or "standard output"
        return _fail(f"{where}: could not be written: {error.strerror}", 1)


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads what this stream writes any more."""
    poll = select.poll()
    poll.register(stream, 0)  # errors are always reported
    return bool(poll.poll(0))


def _give_up(stream: TextIO) -> None:
    """Let output go nowhere: Python flushes it once more at its end, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _main(arguments: list[str]) -> int:
    """Run the command line; returns its exit code."""
    text = _text(arguments)
    if text is not None:
        print(text)
        return 0
    if arguments[0] not in COMMANDS:
        close = get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(COMMANDS)
        return _fail(f"command: must be one of {known}, found {arguments[0]!r}{meant}", 2)
    given = arguments
    try:
        need_run(arguments)
        arguments = with_paths_of_configs(with_run(arguments))
        arguments = _with_groups(with_classes_of_loggers(arguments))
        first_look(arguments)
        warn_in_lines()
        is_quick = arguments[0] in WITHOUT_LIGHTNING or (
            arguments[0] == "diagnose" and bool(HELP.intersection(arguments))
        )
        return (_run_other if is_quick else _run)(arguments)
    except ConfigError as error:
        message = message_of(error)
        return _fail(message + about_relative_path(given, message), 2)
    except KeyboardInterrupt:  # before training or outside of it: nothing is lost
        return _fail("stopped by Ctrl-C", 130, kind="")


def _text(arguments: list[str]) -> str | None:
    """What a call that asks for help or the version prints; commands with a parser print theirs."""
    if arguments[:1] in (["report"], ["configs"]) and HELP.intersection(arguments):
        return str(import_module(f"ant_lightning.cli.{arguments[0]}").__doc__).strip()
    if not arguments or arguments[0] in HELP:
        page = documentation("index.md")
        return f"{__doc__}\nDocumentation: {page}" if page.startswith("http") else __doc__
    return f"ant-lightning {__version__}" if arguments[0] == "--version" else None


def _with_groups(arguments: list[str]) -> list[str]:
    """The arguments with the whole name of `--num_images`."""
    whole = NUM_IMAGES.get(arguments[0], "--num_images")
    return [re.sub(r"^--num_images(?=$|=)", whole, each) for each in arguments]


def _run(arguments: Sequence[str]) -> int:
    """Run a command that imports Lightning."""
    # The user's classes in the working folder, by its whole path: the parser changes the folder
    # while it reads a config elsewhere.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # Imported here: it takes 6 s, which --help must not wait for.
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # noqa: PLC0415

    from ant_lightning.data.workers import dead_worker  # noqa: PLC0415
    from ant_lightning.runtime.rank_watch import first_failure  # noqa: PLC0415

    command = arguments[0]
    try:
        if command in OTHERS:
            _run_other(arguments)
        else:
            import_module("ant_lightning.cli.parser").run(arguments)
    except (CheckpointWriteError, DataLoadingError, DivergedRanksError, NonFiniteError) as error:
        return _fail(str(error), 1)
    except SIGTERMException as error:
        by_hand = error.args == (signal.SIGINT,)
        saved = getattr(error, "__notes__", [])[:1]
        go_on = "; to go on, give the same command with --ckpt_path last"
        what = f" {saved[0]}{go_on}" if saved and command == "fit" else ""
        line = f"stopped by {'Ctrl-C' if by_hand else 'a signal'}{what}"
        return _fail(line, 130 if by_hand else 143, kind="")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        # The errors of loggers name no file; the folder they write to is the full one.
        where = error.filename or "trainer.logger.save_dir"
        return _fail(f"{where}: could not be written: {error.strerror}", 1)
    except RuntimeError as error:
        # The cause may be a dead loading process, or another rank that failed first: say that.
        died = dead_worker(error)
        first = str(died) if died else first_failure(error)
        if first is None:
            raise
        return _fail(first, 1)
    return 0


def _run_other(arguments: Sequence[str]) -> int:
    """Run a command that has a module of its own."""
    module = import_module(f"ant_lightning.cli.{arguments[0]}")
    getattr(module, f"run_{arguments[0]}")(arguments[1:])
    return 0


def _fail(message: str, code: int, *, kind: str = "error: ") -> int:
    """Print one line on standard error, escaping characters that its encoding lacks."""
    line = f"ant-lightning: {kind}" + " ".join(message.split())
    encoding = sys.stderr.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
    return code
