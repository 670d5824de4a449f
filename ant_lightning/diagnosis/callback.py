"""`Diagnosis`: measures a checkpoint in a validation and writes a page of advice."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from ant_lightning.affinity.figure import affinity_curves, affinity_heat_maps
from ant_lightning.affinity.measure import task_affinity
from ant_lightning.balancing.nash import NashMTL
from ant_lightning.balancing.pcgrad import PCGrad
from ant_lightning.balancing.step import MultiTaskStep
from ant_lightning.balancing.uncertainty import UncertaintyWeighting
from ant_lightning.callbacks.base import steps_of
from ant_lightning.callbacks.figures import log_folder
from ant_lightning.callbacks.measuring import MeasuringCallback
from ant_lightning.callbacks.progress import progress_of
from ant_lightning.diagnosis.advice import advice
from ant_lightning.diagnosis.figure import profile_figure
from ant_lightning.diagnosis.findings import ENOUGH_IMAGES, Findings
from ant_lightning.diagnosis.page import write_page
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.files.atomic import write_figure
from ant_lightning.files.json_file import write_json
from ant_lightning.tasks.clusterings import SNRClustering
from ant_lightning.transfer.matrix import transfer_matrix

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.callbacks.fixed_loss import FixedLoss
    from ant_lightning.models.module import MultiTaskDiffusion
    from ant_lightning.tasks.clusters import TimestepClusters


class _Sizes(NamedTuple):
    """How much is measured by default."""

    num_points: int
    num_images: int


_DEVICE, _CPU = _Sizes(40, ENOUGH_IMAGES), _Sizes(20, 64)
_MORE = (
    f"before you rely on the advice, repeat with --num_images {_DEVICE.num_images} --num_points "
    f"{_DEVICE.num_points}, which leaves less noise in the conflicts"
)


class Diagnosis(MeasuringCallback):
    """Measures gradients and losses of a checkpoint, and writes what to try first and why.

    `ant-lightning diagnose` is a validation with this callback. It writes `diagnosis.md`,
    `diagnosis.html`, `diagnosis.json` (the numbers), `task_affinity.safetensors` and pictures into
    the run's folder: conflicts between tasks with their errors, loss and gradient share by
    timestep, what each clustering and balancer would make of them, the transfer matrix, and the
    time of a step on this machine.

    The tasks are the module's; for a module without clusters, 5 SNR clusters.

    Args:
        num_points: Timesteps of the grid: the centres of so many equal parts. By default 40, on a
            CPU 20, or so many more that each task has one.
        num_images: Images for each timestep, in two disjoint halves. By default 256, on a CPU 64:
            there the diagnosis takes an eighth of the time, and more tasks are too noisy to judge,
            which the page then says.
        batch_size: Most images in one forward pass, and those of the steps that are timed.
        lr: Length of the gradient step of the transfer matrix.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        weights: Weights to measure: `ema` or `live`.
        timed_steps: Steps of each method that are timed, in turns; 0 leaves the cost out, and fewer
            than 6 are not compared.
        seed: Seed of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range, or a task has no timestep of the grid.

    Examples:
        >>> from ant_lightning import Diagnosis
        >>> Diagnosis(num_points=20, timed_steps=0).num_points
        20
    """

    findings: Findings | None
    run_state: ClassVar = {"findings": lambda: None}

    def __init__(
        self,
        *,
        num_points: int | None = None,
        num_images: int | None = None,
        batch_size: int = 64,
        lr: float = 1e-2,
        images: Literal["train", "held_out"] = "train",
        weights: Literal["ema", "live"] = "ema",
        timed_steps: int = 9,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_images=_DEVICE.num_images if num_images is None else num_images,
            batch_size=batch_size,
            images=images,
            weights=weights,
            seed=seed,
        )
        check_at_least(1, num_points=num_points)
        check_at_least(0, timed_steps=timed_steps)
        if not lr > 0:
            raise ConfigError(f"lr: must be above 0, found {lr}")
        self.num_points: int = _DEVICE.num_points if num_points is None else num_points
        self.lr = lr
        self.timed_steps = timed_steps
        self._given = (num_points, num_images)

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Choose the sizes that were not given, by the device."""
        super().setup(trainer, pl_module, stage)
        sizes = _CPU if trainer.strategy.root_device.type == "cpu" else _DEVICE
        points, images = self._given
        self.num_points = points or _enough(sizes.num_points, pl_module)
        self.num_images = images or sizes.num_images

    def on_validation_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Say what will be measured, unless in `fit`."""
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            timed = " and the time of a step" if self.timed_steps else ""
            print(
                f"diagnose: gradients at {self.num_points} timesteps, {self.num_images} images "
                f"each, then transfer between tasks{timed}"
                + (f"; {_MORE}" if self.num_images < ENOUGH_IMAGES else ""),
                flush=True,
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure, and write the page on rank 0."""
        if not self.is_due(trainer):
            return
        with self.fixed_loss(trainer, pl_module) as loss:
            self.findings = self._measured(trainer, pl_module, loss)
        self._write(trainer, pl_module)

    def _measured(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, loss: FixedLoss
    ) -> Findings:
        """Gradients on the grid, then losses, the transfer matrix and the time of a step."""
        process, clusters = pl_module.process, _tasks_of(pl_module)
        parameters, k = list(pl_module.backbone.parameters()), clusters.num_tasks
        grid = _centres(process.num_timesteps, self.num_points)
        shown = partial(progress_of, trainer, command="diagnose")
        with shown("timesteps", total=len(grid)) as done:
            affinity = task_affinity(
                loss.at_timestep,
                parameters=parameters,
                num_timesteps=process.num_timesteps,
                timesteps=grid,
                log_snr=process.log_snr,
                seed=self.seed_of(pl_module),
                model=f"{type(pl_module.backbone).__name__}, {self.weights} weights",
                warn_below=-1,  # the page says it
                on_progress=done.show,
            )
        scale = float(loss.scale)  # of the gradient scaler in float16
        with shown("losses", total=k + len(grid) + k * (k + 2)) as done:

            def of_task(task: int) -> Tensor:
                done.update()
                return loss.in_cells(*clusters.boundaries[task : task + 2], key=task)

            def at_point(timestep: int) -> float:
                done.update()
                return _mean_loss(loss, timestep) / scale

            with torch.no_grad():
                task_losses = [float(of_task(i)) / scale for i in range(k)]
            losses = torch.tensor([at_point(t) for t in grid], dtype=torch.float64)
            transfer = transfer_matrix(
                of_task, parameters=parameters, lr=self.lr / scale, num_tasks=k
            )
        return Findings(
            affinity,
            losses,
            torch.tensor(task_losses, dtype=torch.float64),
            clusters,
            transfer=transfer,
            prediction_type=process.prediction_type,
            is_latent=pl_module.latent_space is not None,
            times=self._times(trainer, loss, pl_module, clusters),
            num_images=self.num_images,
            # Weights of others may have been trained for long.
            steps=steps_of(trainer, pl_module) if pl_module.init_from is None else None,
        )

    def _times(
        self,
        trainer: L.Trainer,
        loss: FixedLoss,
        pl_module: MultiTaskDiffusion,
        clusters: TimestepClusters,
    ) -> dict[str, list[float]]:
        """Times of the backward passes by method, of the fixed loss on one batch."""
        if not self.timed_steps:
            return {}
        k = clusters.num_tasks
        balancers: dict[str, Balancer | None] = {
            "vanilla": None,
            "UW": UncertaintyWeighting(k).to(pl_module.device),
            "PCGrad": PCGrad(k).to(pl_module.device),
            "NashMTL (weights refreshed)": NashMTL(k, update_every=1).to(pl_module.device),
        }
        losses, tasks = loss.batch(self.batch_size, clusters)
        # A diagnosis inside `fit` must leave the gradients of the run as they are.
        kept = [p.grad for p in pl_module.backbone.parameters()]
        names, found = list(balancers), {name: list[float]() for name in balancers}
        # One for all, as each would hold the gradients of k tasks.
        step = MultiTaskStep(pl_module.backbone, num_tasks=k)
        count = len(balancers) * (self.timed_steps + 2)
        shown = progress_of(trainer, "timed steps", command="diagnose", total=count)
        try:
            # Lightning validates in inference mode, where no gradient can be computed.
            with torch.inference_mode(False), torch.enable_grad(), shown:
                for turn in range(self.timed_steps + 2):  # the first two warm up
                    # In turns, each first in some: what slows the machine for a while meets all.
                    first = turn % len(names)
                    for name in names[first:] + names[:first]:
                        step.balancer = balancers[name]
                        start = time.perf_counter()
                        step.backward(losses, tasks)
                        if pl_module.device.type == "cuda":
                            torch.cuda.synchronize()
                        if turn >= 2:
                            found[name].append(time.perf_counter() - start)
                        shown.update()
        finally:
            for parameter, grad in zip(pl_module.backbone.parameters(), kept, strict=True):
                parameter.grad = grad
        return found

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Pictures and page, in the run's folder."""
        assert self.findings is not None
        folder, affinity = log_folder(trainer), self.findings.affinity
        affinity.save(folder / "task_affinity.safetensors")
        step = steps_of(trainer, pl_module)
        found = advice(self.findings)
        said = {"step": step, "advice": [each._asdict() for each in found]}
        write_json(folder / "diagnosis.json", {**said, **self.findings.numbers()})
        pictures = {
            "diagnosis_profile.png": (
                profile_figure(self.findings),
                "Loss and share of the squared gradient by log-SNR; dashed lines bound the tasks.",
            ),
            "diagnosis_affinity.png": (
                affinity_heat_maps(affinity, axis="log_snr"),
                "Red: the two timesteps want the same change of the weights. Blue: conflict. "
                "The map covers the measured timesteps, so it ends before the ends of the tasks.",
            ),
            "diagnosis_distance.png": (
                affinity_curves(affinity),
                "If affinity falls with distance, tasks should be neighbouring timesteps.",
            ),
        }
        for name, (figure, _) in pictures.items():
            write_figure(folder / name, figure)
        about = (
            f"{affinity.model} after {step} steps, "
            f"{type(pl_module.process).__name__} predicting {pl_module.process.prediction_type}; "
            f"{len(affinity.timesteps)} timesteps, {self.num_images} images for each. "
            "Early in training these numbers change fast: diagnose again later."
        )
        if self.num_images < ENOUGH_IMAGES:
            about += f" These are few images: {_MORE}."
        texts = {name: text for name, (_, text) in pictures.items()}
        page = write_page(self.findings, folder, texts, about=about)
        # Caveats and the first advice in full, of the others what they say.
        first = next(i for i, each in enumerate(found) if not each.is_caveat) + 1
        for each in found[:first]:
            print(f"{each.title}. {each.text}")
        print("Also: " + "; ".join(each.title for each in found[first:]) + ".")
        print(f"With reasons and evidence in {page} and {page.with_suffix('.md')}", flush=True)


def _centres(num_timesteps: int, num_points: int) -> tuple[int, ...]:
    """The centres of equal parts of the noise axis: each stands for as many timesteps.

    The very ends would not: noise prediction may have a loss of hundreds at the last timestep.
    """
    count = min(num_points, num_timesteps)
    return tuple((2 * i + 1) * num_timesteps // (2 * count) for i in range(count))


def _enough(num_points: int, pl_module: MultiTaskDiffusion) -> int:
    """At least so many points that each task has one."""
    num_timesteps, clusters = pl_module.process.num_timesteps, _tasks_of(pl_module)
    for count in range(num_points, num_timesteps):
        tasks = clusters.task_of(torch.tensor(_centres(num_timesteps, count)))
        if len(tasks.unique()) == clusters.num_tasks:
            return count
    return num_timesteps


def _mean_loss(loss: FixedLoss, timestep: int) -> float:
    """The training loss at a timestep, over the images of both halves."""
    with torch.no_grad():
        return sum(float(term) for half in (0, 1) for term in loss.at_timestep(timestep, half)) / 2


def _tasks_of(pl_module: MultiTaskDiffusion) -> TimestepClusters:
    """The module's clusters, or 5 SNR clusters for a module with one task."""
    if pl_module.num_tasks > 1:
        return pl_module.clusters
    return SNRClustering(5)(pl_module.process.log_snr)
