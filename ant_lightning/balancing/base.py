"""The contract of a balancer, and a base class for each kind of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses, Weights


class Balancer(nn.Module, ABC):
    """Base of all balancers. Equal weighting is 1/k for each task: the mean over tasks.

    A step asks a balancer, in this order:

    1. `refresh_due`: does it need the Gramian of the task gradients now?
    2. If so, `gramian_weights`, once Gramian and losses are known to be finite: weights of the
       task gradients. If not, `step_weights`: weights of the samples in one backward pass. They may
       depend on this step's task losses if `needs_losses` is set.
    3. `own_gradients`: the objective, and the gradients of the balancer's own parameters.
    4. `update`, only after a finite step: the only place where anything else changes.

    All state is in parameters, buffers and the extra state, so a run resumed from a `state_dict`
    equals one that was never stopped. Moving or casting the balancer, or a module that holds it
    (`.cuda()`, `.half()`, `.to(torch.bfloat16)`), changes its device but never its dtypes.

    Most balancers derive from `LossBalancer`, `SampleBalancer` or `GradientBalancer`, which ask
    for less.

    Args:
        num_tasks: Number of tasks `k`.

    Attributes:
        needs_losses: Whether `step_weights` depends on the task losses of the step. These are then
            summed over ranks between the forward and the backward pass; with `micro_batch_size`,
            all forward passes are made without gradients first.
        needs_gramian: Whether the balancer ever needs the Gramian of the task gradients.
        looks_back: Whether `update` must come after the optimizer's step, because it needs the
            losses of the batch at the new weights.
        accumulation: Whether the gradient of a step may be the sum of several backward calls:
            `any`, if a sample's weight depends on no other sample; `proportional`, if it depends
            on the number of samples of its task; `none`, if the whole batch is needed at once.
        update_every: Steps from one Gramian to the next, for a balancer that needs it.
        shared_parameters: Names or patterns of the parameters over which the balancer wants a
            Gramian beside that over all; none for all.

    Raises:
        ConfigError: If `num_tasks` is below 1.

    Examples:
        >>> [balancer.num_tasks for balancer in (PCGrad(5), UncertaintyWeighting(3))]
        [5, 3]
        >>> PCGrad(num_tasks=4).task_weights
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    needs_losses: bool = False
    needs_gramian: bool = False
    looks_back: bool = False
    accumulation: Literal["any", "proportional", "none"] = "none"
    update_every: int = 1
    shared_parameters: tuple[str, ...] = ()

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        check_whole(1, num_tasks=num_tasks)
        self.num_tasks = num_tasks

    @property
    @abstractmethod
    def task_weights(self) -> Float[Tensor, " k"]:
        """The weights in force, `[k]`, detached."""

    @property
    def refresh_due(self) -> bool:
        """Whether the next step needs the Gramian of the task gradients."""
        return False

    @abstractmethod
    def step_weights(self, step: StepLosses) -> Weights:
        """The weights of a step in one backward pass; changes no state."""

    def gramian_weights(self, step: StepLosses) -> Float[Tensor, " k"]:
        """The weights of the gradients `k pi_i g_i` when `refresh_due`, from finite values."""
        # Reached only by a subclass that says `refresh_due` and does not define this.
        raise NotImplementedError(f"{type(self).__name__} needs no Gramian")

    def own_gradients(self, step: StepLosses) -> tuple[Tensor | None, list[Tensor]]:
        """The objective, and its gradients with respect to the balancer's trained parameters.

        Both are equal on all ranks, and losses that are not finite are allowed. An objective of
        `None` stands for the weighted sum of the task losses. Changes no state.
        """
        return None, []

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Change the state after a finite step.

        Args:
            step: All that is known of the step.
            losses_now: Computes the shown task losses of the same batch at the weights of now,
                `[k]` float64, NaN for a task without samples. Only for a balancer that
                `looks_back`: others are updated before the optimizer's step.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:
        """Move to another device, but keep each dtype: a cast would lose digits."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _check_tasks(self, tensor: Tensor, name: str, ndim: int) -> None:
        """Refuse a tensor that is not `[k]` or `[k, k]`."""
        if tensor.shape != (self.num_tasks,) * ndim:
            raise ConfigError(
                f"{name}: must have shape {[self.num_tasks] * ndim}, found {list(tensor.shape)}"
            )


class LossBalancer(Balancer):
    """Base of the balancers that combine the task losses into one objective.

    `d objective / d task_losses` must be `loss_weights()`, which may depend on the balancer's
    state but not on the losses. The weighted losses of micro-batches can then be differentiated
    one after the other, and add up to the gradient of the whole batch.

    Examples:
        >>> class Largest(LossBalancer):
        ...     '''Only the last task counts.'''
        ...     def loss_weights(self):
        ...         return torch.eye(self.num_tasks)[-1]
        ...     def forward(self, task_losses):
        ...         return (self.loss_weights() * task_losses).sum()
        >>> Largest(num_tasks=2)(torch.tensor([1.0, 3.0]))
        tensor(3.)
    """

    accumulation: Literal["any", "proportional", "none"] = "proportional"
    _is_checked = False  # once, in the first step

    @abstractmethod
    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The objective, computed in float32 at least.

        It must not change the balancer's state: the losses may turn out not to be finite.

        Args:
            task_losses: Mean loss of each task, `[k]`.
        """

    def differentiate(
        self, task_losses: Float[Tensor, " k"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The objective, and its gradients with respect to the balancer's trained parameters.

        Differentiates `forward` by autograd; a subclass may have a closed form.

        Args:
            task_losses: Mean loss of each task, `[k]`.
        """
        own = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad():
            objective: Tensor = self(task_losses)
        gradients = torch.autograd.grad(objective, own) if own else ()
        return objective.detach(), list(gradients)

    @abstractmethod
    def loss_weights(self) -> Float[Tensor, " k"]:
        """Derivative of the objective with respect to the task losses, `[k]`, detached."""

    def _check_weights(self, task_losses: Tensor) -> None:
        """Refuse `loss_weights` that are not the derivative of `forward` at these losses."""
        losses = task_losses.detach().clone().requires_grad_()
        with torch.enable_grad():
            objective = self(losses)
        if not bool(objective.isfinite()):  # of losses that are not
            return
        slopes = torch.zeros_like(losses)
        if objective.requires_grad:
            (found,) = torch.autograd.grad(objective, losses, allow_unused=True)
            slopes = slopes if found is None else found
        weights = self.loss_weights().detach().to(slopes)
        if not torch.allclose(slopes, weights, rtol=1e-3, atol=1e-6):
            raise ConfigError(
                f"loss_weights: must be the derivative of forward, {_listed(slopes)} at losses "
                f"{_listed(losses)}, found {_listed(weights)}"
            )

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """The weights in force, `[k]`, detached: `loss_weights()`."""
        return self.loss_weights()

    def step_weights(self, step: StepLosses) -> Weights:
        """`loss_weights`, for one backward pass."""
        return step.by_task(self.loss_weights())

    def own_gradients(self, step: StepLosses) -> tuple[Tensor | None, list[Tensor]]:
        """The result of `differentiate`; equal on all ranks, as the mean losses are."""
        shown = step.shown_losses
        # The mean loss of a task without samples is NaN (0 / 0). It says nothing about its own
        # parameter; a parameter of shape [k] is taken to hold one entry for each task.
        known = shown.nan_to_num().float()
        if not self._is_checked:
            self._is_checked = True
            self._check_weights(known)
        objective, grads = self.differentiate(known)
        if grads:
            missing = shown.isnan()
            grads = [g.masked_fill(missing, 0) if g.shape == missing.shape else g for g in grads]
        return objective, grads


class SampleBalancer(Balancer):
    """Base of the balancers that weight each sample by its noise level; tasks only group reports.

    The objective is the mean of `forward` over the samples. Its derivative with respect to a
    sample's loss must be `sample_weights` divided by the number of samples. The weights may depend
    on the noise level and the balancer's state but not on the loss.

    Examples:
        >>> class HighNoise(SampleBalancer):
        ...     def sample_weights(self, log_snr):
        ...         return (log_snr < 0).float()
        ...     def forward(self, losses, log_snr):
        ...         return self.sample_weights(log_snr) * losses
        >>> HighNoise(num_tasks=2)(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -3.0]))
        tensor([0., 2.])
    """

    accumulation = "any"
    kept_weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        uniform = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        self.register_buffer("kept_weights", uniform)

    @abstractmethod
    def forward(
        self, losses: Float[Tensor, " b"], log_snr: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The objective's term of each sample, `[b]`, from its loss and its log-SNR.

        It must not change the balancer's state: the losses may turn out not to be finite.
        """

    @abstractmethod
    def sample_weights(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Derivative of each term with respect to its loss, `[b]`, detached."""

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """Sum of each task's sample weights in the last batch, divided by the batch size, `[k]`."""
        return self.kept_weights

    def step_weights(self, step: StepLosses) -> Weights:
        """`sample_weights`, for one backward pass."""
        return step.by_sample(self.sample_weights(step.levels))

    def own_gradients(self, step: StepLosses) -> tuple[Tensor | None, list[Tensor]]:
        """The mean of `forward` and its gradients, summed over the samples of all ranks."""
        assert step.losses is not None, "the losses of this step are not known yet"
        own = [p for p in self.parameters() if p.requires_grad]
        shown = (step.losses * step.scaled_priors[step.tasks]).float()
        with torch.enable_grad():
            objective = self(shown, step.levels).sum() / step.num_samples.sum().float()
        grads = list(torch.autograd.grad(objective, own)) if own else []
        if step.reduction.world_size == 1:
            return objective.detach(), grads
        # In one collective.
        parts = [objective.detach().view(1), *(g.flatten() for g in grads)]
        total, *sums = step.reduction.all_reduce_(torch.cat(parts)).split([len(p) for p in parts])
        return total[0], [part.view_as(g).to(g) for part, g in zip(sums, grads, strict=True)]

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Keep the weights of the tasks in this batch."""
        assert step.task_weights is not None, "this step has no weights yet"
        self.kept_weights = step.task_weights


class GradientBalancer(Balancer):
    """Base of the balancers that compute weights from the dot products of the task gradients.

    Calling the balancer with the Gramian refreshes the weights, which are used for `update_every`
    steps. A subclass writes `solve` alone. (In a loop that has the Gramian itself: in each step,
    call the balancer if `refresh_due`; otherwise use `task_weights` and call `count_step`.)

    Args:
        num_tasks: Number of tasks `k`.
        update_every: Steps from one refresh to the next; 1 for every step.

    Raises:
        ConfigError: If an argument is below 1.

    Examples:
        >>> class EqualNorms(GradientBalancer):
        ...     def solve(self, gramian):
        ...         return 1 / (self.num_tasks * gramian.diagonal().sqrt())
        >>> EqualNorms(num_tasks=2)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    needs_gramian = True
    kept_weights: Tensor

    def __init__(self, num_tasks: int, *, update_every: int = 1) -> None:
        super().__init__(num_tasks)
        check_whole(1, update_every=update_every)
        self.update_every = update_every
        # Steps that used the kept weights, the refresh included; 0 before the first refresh. A
        # plain int: reading a counter on an accelerator would make the host wait in every step.
        self._num_steps_used = 0
        uniform = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        self.register_buffer("kept_weights", uniform)

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """The weights of the last refresh, `[k]` float64; 1/k before the first."""
        return self.kept_weights

    @property
    def refresh_due(self) -> bool:
        """Whether the next step needs new weights."""
        return self._num_steps_used == 0 or self._num_steps_used >= self.update_every

    def count_step(self) -> None:
        """Count a step that used the kept weights."""
        self._num_steps_used += 1

    def step_weights(self, step: StepLosses) -> Weights:
        """The weights of the last refresh, for one backward pass."""
        return step.by_task(self.task_weights)

    def gramian_weights(self, step: StepLosses) -> Float[Tensor, " k"]:
        """New weights from the Gramian: a refresh."""
        weights: Tensor = self(step.shown_gramian)
        return weights

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Count the step, if it used weights of an earlier one."""
        if step.gramian is None:
            self.count_step()

    def forward(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """New task weights, which the following steps keep.

        Args:
            gramian: `G[i, j] = g_i . g_j`, best in float64.

        Returns:
            Weights `[k]`, float64, on the Gramian's device: the update is `sum_i w_i g_i`.

        Raises:
            ConfigError: If the Gramian is not `[k, k]`.
        """
        self._check_tasks(gramian, "gramian", 2)
        with torch.no_grad():
            weights = self.solve(gramian.detach().double())
        # Replaces the buffer: a copy into it would wait if the Gramian is on another device. A
        # clone, because the caller may change the weights it is given.
        self.kept_weights = weights.clone()
        self._num_steps_used = 1
        return weights

    @abstractmethod
    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights for a float64 Gramian; `forward` keeps them."""

    def get_extra_state(self) -> Tensor:
        """Number of steps made with the kept weights."""
        return torch.tensor([self._num_steps_used])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        self._num_steps_used = int(state[0])


class CountsSteps(Balancer):
    """Base of the balancers whose extra state is the number of finite steps."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        # A plain int: reading a counter on an accelerator would make the host wait in every step.
        self._num_steps = 0

    def get_extra_state(self) -> Tensor:
        """Number of finite steps."""
        return torch.tensor([self._num_steps])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        self._num_steps = int(state[0])


def _listed(values: Tensor) -> list[float]:
    """Four digits of each number, for messages."""
    return [float(f"{value:.4g}") for value in values.tolist()]
