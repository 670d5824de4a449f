"""The gradient of a loss at one timestep, as a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.parameters import same_tensors, trained_parameters
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float

    from ant_lightning.affinity.result import AffinityResult

    HalfLoss = Callable[[int, int], Tensor | Iterable[Tensor]]


class NonFiniteGradientError(ConfigError):
    """The gradient at a timestep has a NaN or an infinity.

    Attributes:
        timestep: The timestep.
        half: The half of the images, 0 or 1.
        partial: Affinity of the timesteps finished before; `None` if there is none. With several
            ranks it covers the start of the grid, as far as all ranks finished it.
    """

    def __init__(self, timestep: int, half: int, *, partial: AffinityResult | None = None) -> None:
        super().__init__(
            f"loss: its gradient must be finite, found NaN or infinity at timestep {timestep} "
            f"(half {half}); check the weights, or scale the loss if its precision is 16 bits"
        )
        self.timestep = timestep
        self.half = half
        self.partial = partial


class FlatGradient:
    """The gradient of a loss at a timestep, as one vector `[p]`.

    Args:
        loss: As for `task_affinity`.
        parameters: As for `task_affinity`.

    Raises:
        ConfigError: If no parameter needs a gradient.
    """

    def __init__(self, loss: HalfLoss, *, parameters: Iterable[Tensor]) -> None:
        self._loss = loss
        self._given = list(parameters)
        self.parameters = trained_parameters(self._given)
        self.num_parameters = sum(each.numel() for each in self.parameters)

    def __call__(self, timestep: int, half: int) -> Float[Tensor, " p"]:
        """The gradient at a timestep for one half of the images, float32.

        Raises:
            NonFiniteGradientError: If it has a NaN or an infinity.
            ConfigError: If the loss is not a scalar that depends on a parameter, or parameters were
                frozen or thawed since the first gradient.
        """
        # Gradients over different parameters cannot be compared by their dot product.
        if not same_tensors(self.parameters, trained_parameters(self._given)):
            raise ConfigError(
                "parameters: must be the same for every gradient, found some that were frozen or "
                "thawed since the first"
            )
        total: Tensor | None = None
        # Validation may run under inference_mode, where no graph would be recorded.
        with torch.inference_mode(False), torch.enable_grad():
            value = self._loss(timestep, half)
            for term in (value,) if isinstance(value, Tensor) else value:
                # One term at a time: a generator of micro-batches then keeps one graph alive.
                part = self._of_term(term)
                total = part if total is None else total.add_(part)
        if total is None:
            raise ConfigError("loss: must be a scalar or have at least one term, found no term")
        if not bool(total.isfinite().all()):
            raise NonFiniteGradientError(timestep, half)
        return total

    def _of_term(self, term: Tensor) -> Tensor:
        if term.numel() != 1 or not term.requires_grad:
            raise ConfigError(
                "loss: must be a scalar that depends on the parameters, found shape "
                f"{tuple(term.shape)} and requires_grad={term.requires_grad}"
            )
        gradients = torch.autograd.grad(
            term.squeeze(), self.parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([each.detach().reshape(-1).float() for each in gradients])
