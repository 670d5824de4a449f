"""What a balancer is: something that weights `k` tasks, from their losses or their gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

__all__ = ["Balancer", "GradientBalancer", "LossBalancer", "SampleBalancer"]


class Balancer(nn.Module, ABC):
    """Weights `k` tasks; the weights are for the mean over tasks, 1/k each if all are alike.

    All state is in parameters, buffers and the extra state, so that a run resumed from a
    `state_dict` goes on as if it had never stopped. Its numbers keep their precision: casts of
    the module (`.half()`, `.to(torch.bfloat16)`, of it or of what it is part of) move it to
    another device but change no dtype.

    Args:
        num_tasks: `k`.

    Raises:
        ConfigError: If `num_tasks` is below 1.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ConfigError(f"num_tasks: must be at least 1, found {num_tasks}")
        self.num_tasks = num_tasks

    @property
    @abstractmethod
    def task_weights(self) -> Float[Tensor, " k"]:
        """The weights last used, `[k]`, detached."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:
        """As every module does it, but a change of dtype is undone before it loses digits."""

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
    """Makes one objective of the task losses.

    Contract: `d objective / d task_losses` is `loss_weights()`, which may depend on the
    balancer's state but not on the losses. So the weighted losses of micro-batches can be
    differentiated one after the other and add up to the gradient of the whole batch.
    """

    @abstractmethod
    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The objective, computed in float32 at least.

        It is called before it is known whether the losses are finite: it must not change the
        balancer's state.

        Args:
            task_losses: Mean loss of each task, `[k]`.
        """

    def differentiate(
        self, task_losses: Float[Tensor, " k"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The objective, and its gradients with respect to the balancer's trained parameters.

        By autograd from `forward`; a balancer may know a shorter way.

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

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """The weights now in force, `[k]`, detached: `loss_weights()`."""
        return self.loss_weights()


class SampleBalancer(Balancer):
    """Weights each sample by its noise level; tasks are for reporting alone.

    Contract: the objective is the mean of `forward` over the samples, and its derivative with
    respect to a sample's loss is `sample_weights` over their number, which depends on the noise
    level and the balancer's state but not on the loss.
    """

    kept_weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        uniform = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        self.register_buffer("kept_weights", uniform)

    @abstractmethod
    def forward(
        self, losses: Float[Tensor, " b"], log_snr: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The objective's term of each sample, of its loss and its log-SNR, `[b]`.

        Called before it is known whether the losses are finite: it must not change the state.
        """

    @abstractmethod
    def sample_weights(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Derivative of each term with respect to its loss, `[b]`, detached."""

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """Sum of the weights of each task's samples over all samples of the last batch, `[k]`."""
        return self.kept_weights


class GradientBalancer(Balancer):
    """Makes weights of the dot products of the task gradients.

    Calling it refreshes the weights. In a training loop they are refreshed every `update_every`
    steps and kept between: when `refresh_due`, call the balancer with the Gramian, else use
    `task_weights` and call `count_step`.

    Args:
        num_tasks: `k`.
        update_every: Steps from one refresh to the next; 1 for every step.

    Raises:
        ConfigError: If an argument is below 1.
    """

    kept_weights: Tensor

    def __init__(self, num_tasks: int, *, update_every: int = 1) -> None:
        super().__init__(num_tasks)
        if update_every < 1:
            raise ConfigError(f"update_every: must be at least 1, found {update_every}")
        self.update_every = update_every
        # A plain int: asking a counter on an accelerator would wait for it in every step.
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
        """Note that a step was made with the kept weights."""
        self._num_steps_used += 1

    def forward(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """New task weights, also kept for the steps that follow.

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
        # Set, not copied: the buffer follows the Gramian's device without waiting for it.
        self.kept_weights = weights.clone()
        self._num_steps_used = 1
        return weights

    @abstractmethod
    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights that belong to a float64 Gramian; `forward` keeps them."""

    def get_extra_state(self) -> Tensor:
        """Steps made with the kept weights."""
        return torch.tensor([self._num_steps_used])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        self._num_steps_used = int(state[0])


def check_min_loss(min_loss: float) -> float:
    """The least loss that a learned weight is fitted to, checked.

    Raises:
        ConfigError: If it is negative or not finite.
    """
    if not 0 <= min_loss < math.inf:
        raise ConfigError(f"min_loss: must be at least 0 and finite, found {min_loss}")
    return min_loss
