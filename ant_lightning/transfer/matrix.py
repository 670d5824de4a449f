"""The transfer matrix: how a gradient step on one task changes the loss of every other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.parameters import trained_parameters
from ant_lightning.errors import ConfigError, check_above, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float
    from torch import Tensor


def transfer_matrix(
    losses: Callable[[int], Tensor],
    *,
    parameters: Iterable[Tensor],
    lr: float,
    num_tasks: int,
) -> Float[Tensor, "k k"]:
    """Lookahead affinity: the share of task j's loss that a gradient step on task i removes.

        Z[i, j] = 1 - L_j(theta - lr g_i) / L_j(theta),    g_i = grad L_i(theta)

    Positive entries: the step on i helps j. Negative entries: it harms j. To first order in lr,
    `Z[i, j] = lr g_i · g_j / L_j`, so unlike a cosine it depends on the gradients' lengths, and is
    not symmetric. Compare entries with the diagonal, which is the effect of a task's step on its
    own loss; a negative diagonal means that `lr` is too large.

    The parameters are restored bit for bit, also after an exception. Buffers that a forward pass
    changes (running statistics) are not: put the network into evaluation mode.

    Args:
        losses: `losses(task)`, a positive scalar that is the same at every call: fixed images,
            timesteps and noise. It is called `k (k + 2)` times.
        parameters: The shared parameters; those that need no gradient are left out.
        lr: Step size.
        num_tasks: Number of tasks `k`.

    Returns:
        Float64 `[k, k]` on the CPU; row i is the step on task i. An entry is NaN or infinite if
        the loss after the step is.

    Raises:
        ConfigError: If a setting is not positive, a loss before the step is not positive and
            finite, or a gradient is not finite.

    Reference:
        Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning", section 3,
        arXiv 2109.04617.

    Examples:
        >>> import torch
        >>> from ant_lightning import transfer_matrix
        >>> x = torch.zeros(1, requires_grad=True)
        >>> goals = [1.0, 1.0, -1.0]  # tasks 0 and 1 agree, task 2 disagrees
        >>> Z = transfer_matrix(
        ...     lambda task: (x - goals[task]).square().sum(), parameters=[x], lr=0.1, num_tasks=3
        ... )
        >>> [round(entry, 2) for entry in Z[0].tolist()]
        [0.36, 0.36, -0.44]
    """
    check_above(0, lr=lr)
    check_whole(1, num_tasks=num_tasks)
    shared = trained_parameters(parameters)
    # Validation may run under inference_mode, where parameters could not be stepped.
    with torch.inference_mode(False):
        before = _losses(losses, num_tasks)
        for task, loss in enumerate(before.tolist()):
            if not (math.isfinite(loss) and loss > 0):
                raise ConfigError(
                    f"losses: must be positive and finite, found {loss} for task {task}"
                )
        after = [_stepped_losses(losses, shared, i, lr, num_tasks) for i in range(num_tasks)]
    return 1 - torch.stack(after) / before


def _losses(losses: Callable[[int], Tensor], num_tasks: int) -> Tensor:
    """The loss of every task, `[k]` float64."""
    with torch.no_grad():
        return torch.tensor([float(losses(j)) for j in range(num_tasks)], dtype=torch.float64)


def _stepped_losses(
    losses: Callable[[int], Tensor], shared: list[Tensor], task: int, lr: float, num_tasks: int
) -> Tensor:
    """The loss of every task after a step on one, `[k]` float64."""
    with torch.enable_grad():
        # Not `backward`: the `.grad` of a training step must stay as it is.
        gradients = torch.autograd.grad(
            losses(task), shared, allow_unused=True, materialize_grads=True
        )
    if not all(bool(each.isfinite().all()) for each in gradients):
        raise ConfigError(
            f"losses: must have finite gradients, found NaN or infinity for task {task}"
        )
    with torch.no_grad():
        kept = [each.clone() for each in shared]
        try:
            for each, gradient in zip(shared, gradients, strict=True):
                each.sub_(gradient, alpha=lr)
            return _losses(losses, num_tasks)
        finally:
            # Adding the step back would round; a copy is exact.
            for each, old in zip(shared, kept, strict=True):
                each.copy_(old)
