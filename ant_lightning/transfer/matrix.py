"""How a step on one task changes the loss of every other: the transfer matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.parameters import trained_parameters
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["transfer_matrix"]


def transfer_matrix(
    losses: Callable[[int], Tensor],
    *,
    parameters: Iterable[Tensor],
    lr: float,
    num_tasks: int,
) -> Float[Tensor, "k k"]:
    """Lookahead affinity: the share of task j's loss that a gradient step on task i takes away.

        Z[i, j] = 1 - L_j(theta - lr g_i) / L_j(theta),    g_i = grad L_i(theta)

    Positive: the step on i helps j; negative: it harms j. To first order in lr it is
    `lr g_i · g_j / L_j`, so unlike a cosine it knows how large gradients are, and is not symmetric.
    The diagonal is what a task's own step does to its own loss: entries are to be read against
    it, and a negative one says that `lr` is too large.

    The parameters are put back bit for bit whatever happens, an interrupt too. Buffers that a
    forward pass changes (running statistics) are not: use a network in evaluation mode.

    Args:
        losses: `losses(task)`, a positive scalar that is the same at every call: fixed images,
            timesteps and noise. It is called `k (k + 2)` times.
        parameters: The shared parameters; those that need no gradient are left out.
        lr: Step size, in units of the parameters over the gradient.
        num_tasks: `k`.

    Returns:
        Float64 `[k, k]` on the CPU; row i is the step on task i. NaN or infinite where the
        stepped loss is.

    Raises:
        ConfigError: If a setting is not positive, or a loss at the given parameters is not
            positive and finite, or a gradient is not finite.

    Reference:
        Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning", section 3,
        arXiv 2109.04617.
    """
    if not lr > 0 or num_tasks < 1:
        raise ConfigError(f"lr and num_tasks: must be above 0, found {lr} and {num_tasks}")
    shared = trained_parameters(parameters)
    with torch.inference_mode(False):
        before = [_positive_loss(losses, j) for j in range(num_tasks)]
        after = torch.stack(
            [_stepped_losses(losses, shared, i, lr, num_tasks) for i in range(num_tasks)]
        )
    return 1 - after / torch.tensor(before, dtype=torch.float64)


def _positive_loss(losses: Callable[[int], Tensor], task: int) -> float:
    with torch.no_grad():
        value = float(losses(task))
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"losses: must be positive and finite, found {value} for task {task}")
    return value


def _stepped_losses(
    losses: Callable[[int], Tensor], shared: list[Tensor], task: int, lr: float, num_tasks: int
) -> Tensor:
    """Every task's loss after a step on one, `[k]` float64."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            losses(task), shared, allow_unused=True, materialize_grads=True
        )
    if not all(bool(each.isfinite().all()) for each in gradients):
        raise ConfigError(
            f"losses: gradients must be finite, found NaN or infinity for task {task}"
        )
    with torch.no_grad():
        kept = [each.clone() for each in shared]
        try:
            for each, gradient in zip(shared, gradients, strict=True):
                each.sub_(gradient, alpha=lr)
            values = [float(losses(j)) for j in range(num_tasks)]
        finally:
            # Adding the step back would round; a copy is exact.
            for each, old in zip(shared, kept, strict=True):
                each.copy_(old)
    return torch.tensor(values, dtype=torch.float64)
