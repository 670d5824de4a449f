"""The gradient of one half of the images at one timestep, as a flat row of numbers."""

from __future__ import annotations

import hashlib
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

__all__ = ["HalfGradients", "NonFiniteGradientError"]

_SAMPLED = 64  # numbers of each parameter that enter the fingerprint of the weights


class NonFiniteGradientError(ConfigError):
    """The gradient at a timestep has a NaN or an infinity.

    Attributes:
        timestep: Where.
        half: Of which half of the images, 0 or 1.
        partial: Affinity of timesteps finished before; None if there is none. Of several ranks it
            has the beginning of the grid that all of them finished.
    """

    def __init__(self, timestep: int, half: int, *, partial: AffinityResult | None = None) -> None:
        super().__init__(
            f"loss: its gradient must be finite, found NaN or infinity at timestep {timestep} "
            f"(half {half}); check the weights, or scale the loss if its precision is 16 bits"
        )
        self.timestep = timestep
        self.half = half
        self.partial = partial


class HalfGradients:
    """Gradient rows `[p]` of a loss, one for each timestep and half of the images.

    Args:
        loss: Called with a timestep and a half (0 or 1); gives the scalar loss, or an iterable of
            scalars that sum to it (a generator keeps one micro-batch's graph alive at a time).
        parameters: The shared parameters; those that need no gradient are left out.

    Raises:
        ConfigError: If no parameter needs a gradient.
    """

    def __init__(self, loss: HalfLoss, *, parameters: Iterable[Tensor]) -> None:
        self._loss = loss
        self._given = list(parameters)
        self._parameters = trained_parameters(self._given)
        self.num_parameters = sum(each.numel() for each in self._parameters)
        self.device = self._parameters[0].device

    def __call__(self, timestep: int, half: int) -> Float[Tensor, " p"]:
        """The gradient at a timestep for a half of the images, float32 `[p]`.

        Raises:
            NonFiniteGradientError: If it has a NaN or an infinity.
            ConfigError: If the loss is not a scalar that depends on a parameter, or parameters were
                frozen or thawed since the first row.
        """
        if not same_tensors(self._parameters, trained_parameters(self._given)):
            raise ConfigError(
                "parameters: those that need a gradient must be the same for every row, found some "
                "that were frozen or thawed since"
            )
        row: Tensor | None = None
        # Validation may run under inference_mode, where no graph would be recorded.
        with torch.inference_mode(False), torch.enable_grad():
            value = self._loss(timestep, half)
            for term in (value,) if isinstance(value, Tensor) else value:
                part = self._flat_gradient(term)
                row = part if row is None else row.add_(part)
        if row is None:
            raise ConfigError("loss: a scalar or at least one term is needed, found no term")
        if not bool(row.isfinite().all()):
            raise NonFiniteGradientError(timestep, half)
        return row

    def _flat_gradient(self, term: Tensor) -> Tensor:
        if term.numel() != 1 or not term.requires_grad:
            raise ConfigError(
                "loss: must be a scalar that depends on the parameters, found shape "
                f"{tuple(term.shape)} and requires_grad={term.requires_grad}"
            )
        gradients = torch.autograd.grad(
            term.squeeze(), self._parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([each.detach().reshape(-1).float() for each in gradients])

    def weights_fingerprint(self) -> str:
        """A digest of some numbers of every parameter: the same on every device, new after a step.

        A finished timestep is only worth keeping for the weights that it was computed with.
        """
        digest = hashlib.blake2b(digest_size=8)
        for each in self._parameters:
            flat = each.detach().reshape(-1)
            digest.update(
                flat[:: max(1, flat.numel() // _SAMPLED)].double().cpu().numpy().tobytes()
            )
        return digest.hexdigest()
