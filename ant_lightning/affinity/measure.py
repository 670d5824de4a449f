"""Measures task affinity: how well the gradients of a loss at different timesteps agree."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ant_lightning.affinity.gradient import FlatGradient, NonFiniteGradientError
from ant_lightning.affinity.gradient_store import GradientStore
from ant_lightning.affinity.result import AffinityResult, check_grid
from ant_lightning.affinity.sketch import HadamardSketch
from ant_lightning.errors import check_at_least
from ant_lightning.files.identity import tensors_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.affinity.gradient import HalfLoss


class AffinityReliabilityWarning(UserWarning):
    """Some gradients are mostly noise, so their plain affinity is too near 0."""


def timestep_grid(num_timesteps: int, *, num_points: int = 100) -> tuple[int, ...]:
    """At most `num_points` timesteps, evenly spread over `0 .. num_timesteps - 1`, with both ends.

    Raises:
        ConfigError: If either number is below 1.

    Examples:
        >>> from ant_lightning import timestep_grid
        >>> timestep_grid(1000, num_points=4)
        (0, 333, 666, 999)
    """
    check_at_least(1, num_timesteps=num_timesteps, num_points=num_points)
    count = min(num_points, num_timesteps)
    spread = torch.linspace(0, num_timesteps - 1, count, dtype=torch.float64)
    return tuple(spread.round().long().tolist())


def task_affinity(
    loss: HalfLoss,
    *,
    parameters: Iterable[Tensor],
    num_timesteps: int,
    timesteps: Sequence[int] | None = None,
    log_snr: Float[Tensor, " T"] | None = None,
    sketch_dim: int | None = None,
    memory_budget_mb: float | None = None,
    resume_dir: str | Path | None = None,
    seed: int = 0,
    model: str = "",
    sharded: bool = True,
    warn_below: float = 0.8,
    on_progress: Callable[[int, int], None] | None = None,
) -> AffinityResult:
    """Cosines between the gradients of a loss at all pairs of timesteps of a grid.

    Each timestep has two gradients, of two disjoint halves of the images. The mean of the two gives
    the plain cosine; their difference shows how much of it is noise. Gradients are kept in one of
    three ways:

    - whole, in memory: `8 n p` bytes for `n` timesteps and `p` parameters;
    - whole, on disk, if that exceeds `memory_budget_mb`; each number is written and read once;
    - as sketches of length `m` (`HadamardSketch`): `4 n m` bytes, with a standard error of the
      cosine `c` of `(1 - c²) / sqrt(m)`.

    The noise in `loss` must be independent between timesteps and between halves: shared noise
    looks like affinity. Two calls of `loss` with the same arguments must give the same value,
    because a resumed or sharded run relies on it. So key the noise by (seed, timestep, half).

    Args:
        loss: `loss(timestep, half)` with half 0 or 1: the mean loss over the images of that half,
            a scalar, or an iterable of scalars that sum to it (micro-batches).
        parameters: The shared parameters; those that need no gradient are left out.
        num_timesteps: `T` of the schedule.
        timesteps: The grid, increasing; by default 100 timesteps, evenly spread.
        log_snr: Log-SNR of the schedule, kept with the result for its figures.
        sketch_dim: Length `m` of the sketches, a power of two; `None` to keep gradients whole.
        memory_budget_mb: MiB of each rank for gradients and their products, without the
            model, its activations and autograd's gradients. What does not fit goes to
            `resume_dir`, or to a temporary folder (`TMPDIR` chooses where).
        resume_dir: Folder for finished gradients (`8 p` or `4 m` bytes a timestep), from which a
            killed measurement resumes. Delete it afterwards.
        seed: Seed of the sketch; kept with the result.
        model: Description of the measured model; kept with the result.
        sharded: Whether the ranks of `torch.distributed`, if it is initialised, share the grid.
            Every rank must then call this function, and gets the same result as one process.
        warn_below: Warn (on rank 0) if a reliability is below this; -1, its minimum, for never.
        on_progress: Called with the number of finished timesteps and of all timesteps of this rank.

    Raises:
        NonFiniteGradientError: If a gradient has a NaN or an infinity; raised on every rank.
        ConfigError: If an argument breaks its rule, or `resume_dir` has another measurement.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import task_affinity
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> directions = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # at timesteps 0, 1, 2
        >>> result = task_affinity(
        ...     lambda timestep, half: directions[timestep] @ weight,
        ...     parameters=[weight],
        ...     num_timesteps=3,
        ... )
        >>> [round(cosine, 3) for cosine in result.plain[0].tolist()]
        [1.0, 0.707, 0.0]
    """
    grid = timestep_grid(num_timesteps) if timesteps is None else tuple(map(int, timesteps))
    if log_snr is not None:
        log_snr = torch.as_tensor(log_snr).detach().cpu().double()
    check_grid(grid, num_timesteps, log_snr)
    gradient = FlatGradient(loss, parameters=parameters)
    num_parameters, device = gradient.num_parameters, gradient.parameters[0].device
    sketch = None
    if sketch_dim is not None:
        sketch = HadamardSketch(num_parameters, sketch_dim=sketch_dim, seed=seed, device=device)
    # Kept with the result; also part of what a resumed measurement must have in common.
    about = {
        "num_timesteps": num_timesteps,
        "model": model,
        "seed": seed,
        "sketch_dim": sketch_dim,
        "num_parameters": num_parameters,
    }
    identity: dict[str, object] = {}
    if resume_dir is not None:  # gradients are valid only for these weights
        weights = tensors_digest(gradient.parameters)
        identity = {**about, "timesteps": grid, "weights": weights}

    def result_of(store: GradientStore, points: tuple[int, ...]) -> AffinityResult:
        return AffinityResult(
            timesteps=points,
            half_dots=store.dot_products(points).unsqueeze(0),
            log_snr=log_snr,
            **about,  # type: ignore[arg-type]
        )

    with GradientStore(
        grid,
        num_parameters=num_parameters,
        sketch=sketch,
        device=device,
        folder=None if resume_dir is None else Path(resume_dir),
        identity=identity,
        memory_budget_mb=memory_budget_mb,
        sharded=sharded,
    ) as store:
        failure = _fill(store, gradient, on_progress or (lambda done, total: None))
        # All ranks learn of a failure before one of them waits for the gradients of another. One
        # maximum carries timestep and half: 0 for no failure, otherwise 1 + 2 timestep + half.
        code = store.largest(0 if failure is None else 1 + 2 * failure.timestep + failure.half)
        if code:
            # `finished` and `dot_products` are collective: here every rank calls them.
            finished = store.finished()
            partial = result_of(store, finished) if finished else None
            raise NonFiniteGradientError(*divmod(code - 1, 2), partial=partial) from failure
        result = result_of(store, grid)
        message = result.reliability_warning(below=warn_below)
        if message is not None and store.rank == 0:
            warnings.warn(message, AffinityReliabilityWarning, stacklevel=2)
    return result


def _fill(
    store: GradientStore, gradient: FlatGradient, on_progress: Callable[[int, int], None]
) -> NonFiniteGradientError | None:
    """Compute the missing gradients; return the error of the first that is not finite.

    The error is returned, not raised: the other ranks must hear of it first.
    """
    for done, timestep in enumerate(store.own):
        on_progress(done, len(store.own))
        for half in (0, 1):
            if (timestep, half) not in store.gradients:
                try:
                    store.put(timestep, half, gradient(timestep, half))
                except NonFiniteGradientError as error:
                    return error
    on_progress(len(store.own), len(store.own))
    return None
