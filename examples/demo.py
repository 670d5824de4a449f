"""`make demo`: train a small model with ANT-UW on real digits, measure it and show it.

Training and measurement are two ordinary calls of the command line with the shipped configs; this
file chooses them and prints a table. Latent diffusion is trained by vanilla too, for as many steps.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ant_lightning import averaged_weights
from ant_lightning.callbacks.classes import images_by_class
from ant_lightning.callbacks.grid_figure import image_grid
from ant_lightning.cli.main import main as ant_lightning
from ant_lightning.cli.parser import AntCLI, run
from ant_lightning.data.batch import to_uint8
from ant_lightning.tasks.time_axis import TimeAxis

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHOD = ["balancer/uw.yaml", "clustering/snr.yaml"]
MODELS = ("adm", "dit", "edm", "ldm", "sit")
# While it trains, a model is measured every 300 steps (25 s on a quiet core), with fewer steps of
# the sampler than afterwards: about 20 passes through the network, so that training keeps most of
# the time.
VALIDATE_EVERY = 300
SAMPLER_STEPS = {"edm": 10, "sit": 10}  # two passes each
# LDM trains twice, to compare: with vanilla training and with ANT-UW, as many steps.
COMPARED = {"vanilla": ["balancer/vanilla.yaml", "clustering/snr.yaml"], "ANT-UW": METHOD}
COMPARED_STEPS = 1000


def demo(model: str, folder: Path, *, minutes: float, options: list[str]) -> AntCLI:
    """Train for at most `minutes`, then measure the checkpoint; returns the last run."""
    version = 0
    while any(folder.glob(f"{model}_{version}*")):
        version += 1
    name = f"{model}_{version}"
    if model != "ldm":
        cli, _ = train_and_measure(model, METHOD, folder / name, minutes=minutes, options=options)
        return cli
    first_stage = train_first_stage(folder / f"{name}_autoencoder", minutes=minutes / 3)
    options = [
        f"--model.init_args.first_stage.init_args.source={first_stage}",
        f"--trainer.max_steps={COMPARED_STEPS}",
        *options,
    ]
    runs = {}
    for method, configs in COMPARED.items():
        place = folder / f"{name}_{method.lower().replace('-', '_')}"
        print(f"\n{method}")
        runs[method] = train_and_measure(model, configs, place, minutes=minutes, options=options)
    picture = side_by_side({method: cli for method, (cli, _) in runs.items()}, folder / name)
    print(f"\nboth beside real digits: {picture}")
    return runs["ANT-UW"][0]


def train_and_measure(
    model: str, method: list[str], place: Path, *, minutes: float, options: list[str]
) -> tuple[AntCLI, Path]:
    """Train into a folder and measure; returns the run that measured, and the checkpoint."""
    logger = "--trainer.logger.init_args"
    recipe = [f"digits/{model}.yaml", *method]
    common = [arg for name in recipe for arg in ("--config", str(CONFIGS / name))]
    common += [f"{logger}.save_dir={place.parent.parent}", f"{logger}.name={place.parent.name}"]
    common += [f"{logger}.version={place.name}"]
    limit = [max_time(minutes)]
    quick = f"--model.init_args.sampling.sampler.init_args.num_steps={SAMPLER_STEPS.get(model, 20)}"
    every = f"--trainer.val_check_interval={VALIDATE_EVERY}"
    if ant_lightning(["fit", *common, every, quick, *options, *limit]):
        sys.exit(1)
    common += options
    checkpoint = place / "checkpoints" / "last.ckpt"
    cli = run(["validate", *common, *limit, f"--ckpt_path={checkpoint}"])
    print_table(cli, checkpoint, common)
    return cli, checkpoint


def side_by_side(runs: dict[str, AntCLI], place: Path) -> Path:
    """A picture of what each method draws, beside real digits, with its scores."""
    figure = Figure(figsize=(3.6 * (len(runs) + 1), 3.1), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(runs) + 1)
    for axis, (method, cli) in zip(panels, runs.items(), strict=False):
        with averaged_weights(cli.trainer, cli.model):
            show(axis, cli.model.sample(60))
        score = {name.removeprefix("val/"): v for name, v in cli.trainer.callback_metrics.items()}
        axis.set_title(f"{method}, {cli.model.trained_steps} steps")
        axis.set_xlabel(
            f"FID {score['fid']:.2f}, precision {score['precision']:.2f}, recall "
            f"{score['recall']:.2f},\nright class {score['class_agreement']:.1%}",
            fontsize=9,
        )
    data = cli.datamodule.held_out_images
    real = data.load([i or 0 for i in images_by_class(data, 60, num_classes=10)], epoch=None)
    show(panels[-1], cli.model.images_of(real))
    panels[-1].set_title("real")
    panels[-1].set_xlabel(f"FID {score['fid_real']:.2f} to other real digits", fontsize=9)
    path = place.with_suffix(".png")
    figure.savefig(path)
    return path


def show(axis: Axes, images: torch.Tensor) -> None:
    """Draw 60 images in ten columns, one for each digit."""
    grid = image_grid(to_uint8(images).cpu().numpy(), columns=10)
    axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def train_first_stage(folder: Path, *, minutes: float) -> Path:
    """Train the autoencoder whose latents the LDM denoises; returns the folder it wrote."""
    first_stage = folder / "first_stage"
    args = ["fit", "--config", str(CONFIGS / "digits/autoencoder.yaml"), max_time(minutes)]
    args += [f"--trainer.logger.init_args.save_dir={folder.parent}"]
    args += [f"--trainer.logger.init_args.name={folder.name}"]
    if ant_lightning([*args, f"--model.init_args.export={first_stage}"]):
        sys.exit(1)
    return first_stage


def max_time(minutes: float) -> str:
    """The Trainer's option that stops training."""
    seconds = int(60 * minutes)
    return f"--trainer.max_time=00:00:{seconds // 60:02d}:{seconds % 60:02d}"


def print_table(cli: AntCLI, checkpoint: Path, common: list[str]) -> None:
    """What the model reached and where to look."""
    scores = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    module = cli.model
    boundaries = module.clusters.boundaries
    rows = [
        (
            "FID to held-out digits",
            f"{scores['val/fid']:.2f}",
            f"n = {scores['val/num_images']:.0f}",
        ),
        ("  real against real", f"{scores['val/fid_real']:.2f}", "two sets of real digits, same n"),
        ("  FID to training digits", f"{scores['val/fid_train']:.2f}", "same n"),
        (
            "  nearest training digit",
            f"{scores['val/nearest_train_median']:.2f}",
            f"held-out digits: {scores['val/nearest_train_real_median']:.2f}; "
            "much less would be copying",
        ),
        ("precision", f"{scores['val/precision']:.3f}", ""),
        ("recall", f"{scores['val/recall']:.3f}", ""),
        ("class agreement", f"{scores['val/class_agreement']:.1%}", "digits network, guided"),
    ]
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    weights = module.balancer.loss_weights() if module.balancer is not None else None
    time = TimeAxis.of(module.process)
    for task, (start, stop) in enumerate(pairwise(boundaries)):
        weight = "" if weights is None else f"weight {float(weights[task]):.3f}"
        loss = f"{scores[f'val/task_{task}/loss']:.4f}"
        rows.append((f"loss, {time.unit} {time.words(start, stop)}", loss, weight))
    speed = state["callbacks"].get("TrainingProgress", {}).get("images_per_second")
    if speed:
        rows.append(("training speed", f"{speed:.0f}", f"images/s, {state['global_step']} steps"))
    print()
    for name, value, note in rows:
        print(f"{name:28s} {value:>9s}   {note}")
    folder = checkpoint.parent.parent
    print(f"\ngrid         {folder / '1_samples_grid.png'}")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {folder.parent}")
    print(f"again        ant-lightning validate {' '.join(common)} --ckpt_path {checkpoint}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="dit")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--minutes", type=float, default=3.0)
    arguments, rest = parser.parse_known_args()
    demo(arguments.model, arguments.folder, minutes=arguments.minutes, options=rest)
