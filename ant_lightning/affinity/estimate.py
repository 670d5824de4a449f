"""Task affinity: how well the gradients of a diffusion loss at different timesteps agree."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from ant_lightning.affinity.budget import plan_memory
from ant_lightning.affinity.gram import Shard, half_dot_products
from ant_lightning.affinity.grid import check_log_snr, check_timesteps, timestep_grid
from ant_lightning.affinity.halves import HalfGradients, NonFiniteGradientError
from ant_lightning.affinity.measurement import Measurement
from ant_lightning.affinity.result import AffinityResult
from ant_lightning.affinity.state import claim_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.affinity.halves import HalfLoss
    from ant_lightning.affinity.rows import RowStore

__all__ = ["AffinityReliabilityWarning", "task_affinity"]


class AffinityReliabilityWarning(UserWarning):
    """Some gradients are mostly noise, so that their plain affinity is too near 0."""


def task_affinity(
    loss: HalfLoss,
    *,
    parameters: Iterable[Tensor],
    num_timesteps: int,
    timesteps: Sequence[int] | None = None,
    log_snr: Float[Tensor, " T"] | None = None,
    sketch_dim: int | None = None,
    memory_budget_bytes: int | None = None,
    state_path: str | Path | None = None,
    seed: int = 0,
    model: str = "",
    sharded: bool = True,
    warn_below: float = 0.8,
    on_progress: Callable[[int, int], None] | None = None,
) -> AffinityResult:
    """Cosines of the gradients of the loss at every two timesteps of a grid.

    Two gradients are made for each timestep, of two halves of the images: their mean gives the
    plain cosine, their differences show how much of it is noise. Gradients are kept

    - whole, in memory: `8 n p` bytes;
    - whole, on disk, if that is above `memory_budget_bytes`: each number is written once and read
      once, as products are summed over slices of columns of all rows (blocks of rows would be
      read, or their gradients made again, once for every other block);
    - as a sketch (`HadamardSketch`): `4 n m` bytes, standard error `(1 - c²) / sqrt(m)`.

    The noise of `loss` must be independent between timesteps and between halves, and the images
    of the two halves disjoint: noise that is shared makes gradients agree that have nothing in
    common. For a call with the same arguments `loss` must give the same value, or a resumed or
    sharded run differs from one that is neither: key its noise by (seed, timestep, half).

    Args:
        loss: `loss(timestep, half)`, half 0 or 1: the mean loss over the images of that half, a
            scalar; or an iterable of scalars that sum to it (micro-batches).
        parameters: The shared parameters; those that need no gradient are left out.
        num_timesteps: `T` of the schedule.
        timesteps: The grid, increasing; 100 evenly spread ones by default.
        log_snr: Of the schedule, kept with the result for its figures.
        sketch_dim: `m`, a power of two, to sketch.
        memory_budget_bytes: For kept gradients and what works on them, on each rank; the model,
            its activations and the gradients that autograd holds are not in it. What does not
            fit goes to `state_path`, or to a temporary folder (`TMPDIR` chooses where).
        state_path: A folder where each finished timestep is kept (`8 p` bytes, or `4 m`), so
            that a killed run goes on. Delete it afterwards.
        seed: Kept with the result, and keys the sketch.
        model: What is measured, in free words; kept with the result.
        sharded: Share the timesteps among the ranks of `torch.distributed` if it is initialised;
            every rank must then call this, and gets the same result as one process.
        warn_below: Warn (on rank 0) of timesteps with a lower reliability; -1 never does.
        on_progress: Called with the timesteps done and all timesteps of this rank.

    Raises:
        NonFiniteGradientError: On every rank, if a gradient has a NaN or an infinity; it has the
            affinity of timesteps finished before, and `state_path` keeps their gradients.
        ConfigError: If an argument breaks its rule, or `state_path` holds another measurement.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.
    """
    grid = timestep_grid(num_timesteps) if timesteps is None else tuple(map(int, timesteps))
    check_timesteps(grid, num_timesteps=num_timesteps)
    if log_snr is not None:
        log_snr = torch.as_tensor(log_snr).detach().cpu().double()
        check_log_snr(log_snr, num_timesteps=num_timesteps)
    gradients = HalfGradients(loss, parameters=parameters)
    shard = Shard(sharded=sharded)
    own = shard.own(grid)
    plan = plan_memory(
        memory_budget_bytes,
        num_points=len(grid),
        num_own=len(own),
        num_parameters=gradients.num_parameters,
        sketch_dim=sketch_dim,
    )
    folder = None if state_path is None else Path(state_path)
    if folder is not None:
        identity: dict[str, str | int | tuple[int, ...]] = {
            "num_timesteps": num_timesteps,
            "timesteps": grid,
            "model": model,
            "seed": seed,
            "sketch_dim": sketch_dim or 0,
            "num_parameters": gradients.num_parameters,
            "weights": gradients.weights_fingerprint(),
        }
        claim_folder(folder, identity)

    def result_of(rows: RowStore, points: tuple[int, ...]) -> AffinityResult:
        half_dots = half_dot_products(
            rows, points, shard=shard, device=gradients.device, work_bytes=plan.work_bytes
        )
        return AffinityResult(
            timesteps=points,
            num_timesteps=num_timesteps,
            half_dots=half_dots.unsqueeze(0),
            seed=seed,
            model=model,
            num_parameters=gradients.num_parameters,
            sketch_dim=sketch_dim,
            log_snr=log_snr,
        )

    with ExitStack() as stack:
        if folder is None and not plan.in_memory:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="affinity-")))
        measure = Measurement(gradients, sketch_dim=sketch_dim, seed=seed)
        rows = measure.rows(folder, own)
        failed = measure.fill(rows, own, on_progress)
        # All ranks learn of a failure before any of them waits for rows.
        code = shard.largest(0 if failed is None else 1 + 2 * failed.timestep + failed.half)
        if code:
            timestep, half = divmod(code - 1, 2)
            done = _finished_everywhere(rows, grid, shard=shard)
            partial = result_of(rows, done) if done else None
            raise NonFiniteGradientError(timestep, half, partial=partial) from failed
        result = result_of(rows, grid)
    message = result.reliability_warning(below=warn_below)
    if message is not None and shard.rank == 0:
        warnings.warn(message, AffinityReliabilityWarning, stacklevel=2)
    return result


def _finished_everywhere(rows: RowStore, grid: tuple[int, ...], *, shard: Shard) -> tuple[int, ...]:
    """Timesteps whose rows are kept: on several ranks the beginning of the grid that all have."""
    own = shard.own(grid)
    finished = rows.finished(own)
    if shard.world_size == 1:
        return tuple(finished)
    kept = set(finished)
    num_first = next((i for i, each in enumerate(own) if each not in kept), len(grid))
    least = -shard.largest(-num_first)
    return grid[: least * shard.world_size]
