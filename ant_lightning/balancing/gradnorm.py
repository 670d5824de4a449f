"""GradNorm: loss weights under which the gradients of all tasks have balanced norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import CountsSteps
from ant_lightning.errors import ConfigError, check_above, check_at_least, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses, Weights


class GradNorm(CountsSteps):
    """GradNorm: learned weights `w = softmax(s)` that balance the norms of the tasks' gradients.

    With `G_i = k w_i |g_i|` and `r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))`, the logits `s`
    descend on `sum_i |G_i - mean_j(G_j) r_i^alpha|`, where the second term is a constant: tasks
    that are learned slowly get larger gradients. `L_i(0)` is the mean loss over the first
    `initial_steps`, in which all weights are equal and no task gradients are computed.

    The norms are the square roots of the Gramian's diagonal over `shared_parameters`. `s` is in
    float32 and belongs in a parameter group of its own, without weight decay. A task without
    samples in a step, or without a loss above 0 in the first steps, keeps its weight.

    Args:
        num_tasks: Number of tasks `k`.
        alpha: Strength with which tasks are pulled to one rate of training; 0 for equal norms.
        shared_parameters: Names of parameters of the network, or patterns of them, such as
            `blocks.11.*`, over which the norms are taken; by default all. The paper takes the last
            layer that the tasks share. Names need a `MultiTaskStep`.
        initial_steps: Steps over which `L_i(0)` is averaged; 1 is the paper's. The loss of one step
            depends on the noise that was drawn for it.
        update_every: Steps from one update of `s` to the next.
        lr: Learning rate of `s`, read when the optimizer's groups are made.

    Raises:
        ConfigError: If an argument is out of range.

    Reference:
        Chen et al., "GradNorm", algorithm 1, arXiv 1711.02257. There the weights sum to k and the
        objective is a sum over tasks: k times ours. The softmax in place of a division after each
        update is LibMTL's.

    Examples:
        >>> balancer = GradNorm(num_tasks=2)
        >>> balancer.task_weights
        tensor([0.5000, 0.5000])
        >>> balancer.slopes(norms=torch.tensor([1.0, 3.0]), rates=torch.ones(2))
        tensor([-2.,  2.])
    """

    needs_gramian = True
    initial: Tensor

    def __init__(
        self,
        num_tasks: int,
        *,
        alpha: float = 1.5,
        shared_parameters: Sequence[str] = (),
        initial_steps: int = 100,
        update_every: int = 1,
        lr: float = 0.025,
    ) -> None:
        super().__init__(num_tasks)
        check_whole(1, initial_steps=initial_steps, update_every=update_every)
        check_at_least(0, alpha=alpha)
        check_above(0, lr=lr)
        if isinstance(shared_parameters, str):
            raise ConfigError(
                f"shared_parameters: must be a list of names, found {shared_parameters!r}"
            )
        self.alpha = alpha
        self.shared_parameters = tuple(shared_parameters)
        self.initial_steps = initial_steps
        self.update_every = update_every
        self.lr = lr
        self.logits = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float32))
        # Sums of the first losses, and the numbers of steps that had the task.
        self.register_buffer("initial", torch.zeros(2, num_tasks, dtype=torch.float64))

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """`softmax(s)`, `[k]` float32, detached."""
        return self.logits.detach().softmax(0)

    @property
    def refresh_due(self) -> bool:
        """Whether the next step moves `s`, for which it needs the norms."""
        later = self._num_steps - self.initial_steps
        return later >= 0 and later % self.update_every == 0

    def step_weights(self, step: StepLosses) -> Weights:
        """The weights, for one backward pass."""
        return step.by_task(self.task_weights)

    def gramian_weights(self, step: StepLosses) -> Float[Tensor, " k"]:
        """The weights: a step is made with those from before its own update."""
        return self.task_weights

    def slopes(self, norms: Float[Tensor, " k"], rates: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Gradient of the objective with respect to `s`, `[k]`.

        Args:
            norms: `|g_i|`; NaN for a task that has none in this step.
            rates: `L_i / L_i(0)`, NaN if unknown.
        """
        known = ~(norms.isnan() | rates.isnan())
        num_known = known.sum().clamp(min=1)
        norms, rates = torch.where(known, norms, 0), torch.where(known, rates, 0)
        weights = self.task_weights.to(norms)
        scaled = self.num_tasks * weights * norms
        inverse_rates = rates * num_known / rates.sum()
        wanted = scaled.sum() / num_known * inverse_rates.pow(self.alpha)
        signed = torch.where(known, (scaled - wanted).sign() * scaled, 0)
        return signed - weights * signed.sum()  # through the softmax

    def own_gradients(self, step: StepLosses) -> tuple[Tensor | None, list[Tensor]]:
        """The weighted sum of the losses, and the gradient of `s` if the norms are known."""
        if step.shared_gramian is None or not self.logits.requires_grad:
            return None, []
        squares = step.shared_gramian.diagonal().clamp(min=0)
        norms = torch.where(step.num_samples > 0, squares.sqrt() * step.scaled_priors, torch.nan)
        sums, counts = self.initial.to(norms.device, non_blocking=True)
        first = sums / counts
        rates = torch.where(first > 0, step.shown_losses / first, torch.nan)
        return None, [self.slopes(norms, rates)]

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Count the step; add its losses to the first ones."""
        if self._num_steps < self.initial_steps:
            losses = step.shown_losses
            new = torch.stack([losses.nan_to_num(), (~losses.isnan()).double()])
            self.initial = self.initial.to(new.device) + new
        self._num_steps += 1
