"""What a checkpoint holds besides weights, and whether it fits the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from ant_lightning.diffusion.process import NoiseProcess

FORMAT_VERSION = 1

# Attributes that must agree with a checkpoint, each with the path of its setting for messages.
_SETTINGS = {
    "process": "process",
    "prediction_type": "process.prediction_type",
    "backbone": "backbone",
    "first_boundaries": "tasks.clustering (its boundaries; to keep the checkpoint's, use "
    "FixedClustering)",
    "schedule": "process.schedule (T, log-SNR at start, middle, end)",
    "balancer": "tasks.balancer",
    "first_stage": "first_stage (its fingerprint)",
    "optimizer": "optimization.optimizer",
    "adapter": "adapter",
    "base_weights": "backbone (a fingerprint of the weights below the adapter; see init_from)",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The state of a module that is not in its `state_dict`, and the settings it depends on.

    Attributes:
        cluster_history: `(step, boundaries)` of the first clusters and of every later change.
        num_skipped_steps: Steps skipped because of a NaN or an infinity.
        num_skipped_in_a_row: Steps skipped since the last step that was made.
        world_size: Number of ranks; 0 if not known.
        backbone: Class of the network.
        process: See `process_summary`.
        prediction_type: As in the process.
        variance_type: As in `DiscreteDiffusion`.
        schedule: See `schedule_summary`.
        balancer: Class of the balancer; `None` for vanilla, empty if not known.
        optimizer: Class of the optimizer; `None` outside `fit`.
        first_stage: Fingerprint of the first stage; `None` for pixels.
        train_interval: Interval of a specialist.
        latent_space: Fields of the `LatentSpace`; `None` for pixels.
        optimization: Settings of optimizer and scheduler; `None` outside `fit`.
        trained: State of `TrainedParameters`.
        adapter: Settings of the adapter; `None` without one.
        base_weights: Fingerprint of the weights that it was put into.
        arrival_orders: See `MultiTaskStep.arrival_orders`.
    """

    cluster_history: list[tuple[int, tuple[int, ...]]]
    num_skipped_steps: int
    num_skipped_in_a_row: int = 0
    world_size: int = 0
    backbone: str
    process: str = "DiscreteDiffusion"  # the only one in 0.1
    prediction_type: str
    variance_type: str | None = None
    schedule: list[float] | None = None
    balancer: str | None = ""
    optimizer: str | None = None
    first_stage: str | None = None
    train_interval: list[int] | None = None
    latent_space: dict[str, Any] | None = None
    optimization: dict[str, Any] | None = None
    trained: dict[str, list[str]] | None = None
    adapter: str | None = None
    base_weights: str | None = None
    arrival_orders: dict[str, list[int]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        state = {"format_version": FORMAT_VERSION, **vars(self)}
        # The last clusters, for readers that need no history, such as `cli.report`.
        state["boundaries"] = list(self.clusters.boundaries)
        state["cluster_history"] = [(step, list(each)) for step, each in self.cluster_history]
        if self.optimization is None:
            del state["optimization"]
        return state

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> CheckpointState:
        """Read what `state_dict` wrote, in this version or an earlier one.

        Raises:
            ConfigError: If another program or a later version wrote it, or it is incomplete.
        """
        saved = checkpoint.get("ant_lightning")
        if saved is None:
            raise ConfigError(
                "ckpt_path: must be a checkpoint of ant_lightning, found another's; for official "
                "weights use init_from"
            )
        version = saved.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ConfigError(
                f"ckpt_path: must have a format version up to {FORMAT_VERSION}, found {version}, "
                "written by a newer ant_lightning"
            )
        state = {name: saved[name] for name in cls.__annotations__ if name in saved}
        try:
            if not isinstance(version, int):
                raise TypeError(f"format_version {version!r}")
            # 0.1 had no history before clusters could change.
            history = saved.get("cluster_history") or [(0, saved["boundaries"])]
            state["cluster_history"] = [(int(step), tuple(each)) for step, each in history]
            state["num_skipped_steps"] = int(saved["num_skipped_steps"])
            for name in ("num_skipped_in_a_row", "world_size"):
                state[name] = int(saved.get(name, 0))
            if state.get("trained") is not None:
                names = {each: state["trained"][each] for each in ("start", "now", "optimized")}
                state["trained"] = {each: [str(name) for name in names[each]] for each in names}
            if state.get("latent_space") is not None:
                LatentSpace(**state["latent_space"])
            found = cls(**state)
            # Evaluated here, where a damaged value still becomes the error below.
            _ = found.clusters, int(checkpoint["global_step"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                "ckpt_path: must hold the record of a run of ant_lightning, found "
                f"{error if isinstance(error, ConfigError) else repr(error)}"
            ) from error
        return found

    @property
    def clusters(self) -> TimestepClusters:
        """The last clusters."""
        return TimestepClusters(self.cluster_history[-1][1])

    @property
    def first_boundaries(self) -> list[int]:
        """Boundaries of the first clusters, those of the settings."""
        return list(self.cluster_history[0][1])

    def check_fits(self, run: CheckpointState) -> None:
        """Compare the settings of this checkpoint that a resume cannot change with those of `run`.

        Values that one side does not know are skipped: an older version did not store them, or
        they exist in `fit` only.

        Raises:
            ConfigError: Naming the first setting that differs, with both values.
        """
        for name, path in _SETTINGS.items():
            then, now = getattr(self, name), getattr(run, name)
            # For the balancer `None` is a value (vanilla), so unknown is the empty string.
            unknown = then == "" if name == "balancer" else then is None or now is None
            if then != now and not unknown:
                raise ConfigError(f"{path}: must be that of the checkpoint, {then}, found {now}")
        tasks, last = run.clusters, self.clusters
        if (last.num_tasks, last.num_timesteps) != (tasks.num_tasks, tasks.num_timesteps):
            raise ConfigError(
                f"ckpt_path: its last clusters must be {tasks.num_tasks} of {tasks.num_timesteps} "
                f"timesteps, found {last.num_tasks} of {last.num_timesteps}"
            )


def process_summary(process: NoiseProcess) -> str:
    """Class of a process, and the settings that change what the network's output means."""
    separate = {"prediction_type", "variance_type"}
    settings = [f"{k}={v}" for k, v in process.identity().items() if k not in separate]
    return type(process).__name__ + (f"({', '.join(settings)})" if settings else "")


def schedule_summary(process: NoiseProcess) -> list[float]:
    """T and the log-SNR of the first, the middle and the last timestep, to six digits.

    Identifies a schedule by its values, so that another class or spelling of the same one passes.
    """
    log_snr = process.log_snr
    ends = [float(log_snr[t]) for t in (0, len(log_snr) // 2, -1)]
    return [len(log_snr), *(float(f"{value:.6g}") for value in ends)]
