"""TorchJD's weightings as balancers: UPGrad, MGDA, CAGrad, IMTL-G, Aligned-MTL and others."""

from __future__ import annotations

import copy
import typing
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.errors import ConfigError, extra_for

if TYPE_CHECKING:
    from jaxtyping import Float


class TorchJDBalancer(GradientBalancer):
    """A weighting of the TorchJD library: UPGrad, MGDA, CAGrad, IMTL-G, Aligned-MTL and others.

    TorchJD's weights are used as they are. Those with a preference vector default to the mean, 1/k
    each without conflict, which is the scale used here. Those of `GradVacWeighting` and
    `PCGradWeighting` are of a sum, k times as large. The weighting runs on the host in float64.
    Its random numbers depend on `seed` and the number of the refresh only, so all ranks draw the
    same. What a weighting with a memory (`GradVacWeighting`, `CRMOGMWeighting`, `PCDWeighting`)
    remembers is part of the `state_dict`: a resumed run equals one that was never stopped.

    If the weighting fails or gives a NaN or an infinity, the last weights are kept (1/k before the
    first refresh), and so is what it remembers; `num_failures` is increased, and the first failure
    gives a `UserWarning`.

    Args:
        num_tasks: Number of tasks `k`.
        weighting: A weighting of `torchjd.aggregation` that takes a Gramian, for instance
            `UPGradWeighting()`. It must not remember past steps outside its buffers. Those that
            take the whole matrix of task gradients (ExcessMTL, MoDo, SDMGrad) are refused: a step
            gives the Gramian alone, and no rank holds the matrix.
        update_every: Steps from one refresh to the next.
        seed: Seed of weightings that draw random numbers.

    Raises:
        ConfigError: If the extra `torchjd` is not installed, or if `weighting` is not one of
            TorchJD's, takes no Gramian, remembers what a checkpoint would lose, or does not give k
            finite weights for k orthonormal gradients.

    Reference:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232.

    Examples:
        >>> from torchjd.aggregation import UPGradWeighting
        >>> balancer = TorchJDBalancer(num_tasks=2, weighting=UPGradWeighting())
        >>> balancer(torch.eye(2)).round(decimals=3)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        weighting: nn.Module,
        update_every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks, update_every=update_every)
        self.weighting = weighting
        self.seed = seed
        self.num_failures = 0
        self._num_refreshes = 0
        _check(weighting)
        name = type(weighting).__name__
        # On a copy: the weighting may have buffers, which this made-up Gramian must not change.
        probe = copy.deepcopy(weighting)
        before = [dict(vars(each)) for each in probe.modules()]
        try:
            weights = self._call(probe, torch.eye(num_tasks, dtype=torch.float64))
        except Exception as error:
            raise ConfigError(f"weighting: {name} fails on {num_tasks} tasks: {error}") from error
        if weights.shape != (num_tasks,) or not bool(weights.isfinite().all()):
            raise ConfigError(
                f"weighting: must give {num_tasks} finite weights, found {weights} from {name}"
            )
        changed = {
            attribute
            for then, each in zip(before, probe.modules(), strict=True)
            for attribute, value in vars(each).items()
            if value is not then.get(attribute)
        }
        if changed - {_KEY}:
            raise ConfigError(
                f"weighting: must remember past steps in buffers only, which a checkpoint saves, "
                f"found {name}, which changes {sorted(changed - {_KEY})}"
            )
        # What its buffers are made for: the same in each call, so a resumed run sets it.
        self._keys = [getattr(each, _KEY, None) for each in probe.modules()]

    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights of the weighting; the last weights if it fails."""
        self._num_refreshes += 1
        self.weighting.cpu()  # its buffers have come with the module's
        remembered = copy.deepcopy([each._buffers for each in self.weighting.modules()])
        try:
            weights = self._call(self.weighting, gramian.cpu())
            reason = f"its weights are {weights.tolist()}"
        except Exception as error:  # the solvers behind TorchJD each have errors of their own
            weights, reason = torch.full((self.num_tasks,), torch.nan), str(error)
        if bool(weights.isfinite().all()):
            return weights.to(gramian, non_blocking=True)
        for each, buffers in zip(self.weighting.modules(), remembered, strict=True):
            each._buffers.update(buffers)
        return self._failed(gramian, reason)

    def _call(self, weighting: nn.Module, gramian: Tensor) -> Tensor:
        """The weights, `[k]` float64 on the host, whatever the state of the global generator."""
        # TorchJD draws from the global generator, which differs between ranks. A key made of the
        # number of the refresh needs no state; a large factor keeps neighbouring seeds apart.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1_000_003 * self._num_refreshes)
            weights: Tensor = weighting(gramian)
        return weights.detach().double()

    def _failed(self, gramian: Tensor, reason: str) -> Tensor:
        """Count a failure, warn at the first, and return the last weights."""
        self.num_failures += 1
        if self.num_failures == 1:
            warnings.warn(
                f"{type(self.weighting).__name__} found no weights and the last ones are kept: "
                f"{reason}. This is said once; num_failures counts on.",
                stacklevel=2,
            )
        return self.kept_weights.to(gramian)

    def get_extra_state(self) -> Tensor:
        """Numbers of steps made with the kept weights, of failures and of refreshes."""
        counts = torch.tensor([self.num_failures, self._num_refreshes])
        return torch.cat([super().get_extra_state(), counts])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        super().set_extra_state(state)
        self.num_failures, self._num_refreshes = int(state[1]), int(state[2])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Make the buffers of the weighting, which begin as `None`, for those of a checkpoint."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        named = self.weighting.named_modules(prefix=f"{prefix}weighting")
        for key, (name, each) in zip(self._keys, named, strict=True):
            if hasattr(each, "reset"):  # TorchJD gives it to weightings that remember
                for buffer in each._buffers:
                    stored = state_dict.get(f"{name}.{buffer}")
                    each._buffers[buffer] = None if stored is None else torch.empty_like(stored)
                if key is not None:
                    setattr(each, _KEY, key)


# Attribute of TorchJD's weightings that says what their buffers are made for.
_KEY = "_state_key"


def _check(weighting: nn.Module) -> None:
    """Refuse anything but a weighting of Gramians."""
    with extra_for("weighting", "torchjd"):
        from torchjd.aggregation import Weighting  # noqa: PLC0415 - an extra
        from torchjd.linalg import Matrix  # noqa: PLC0415
    name = type(weighting).__name__
    if not isinstance(weighting, Weighting):
        raise ConfigError(
            f"weighting: must be a weighting of torchjd.aggregation, such as UPGradWeighting, "
            f"found {name}"
        )
    # The annotation of the only argument says what a weighting takes: `Matrix` for the task
    # gradients, another type for the Gramian. Mean and Sum take any tensor.
    hints = typing.get_type_hints(type(weighting).forward)
    if any(hint is Matrix for argument, hint in hints.items() if argument != "return"):
        raise ConfigError(
            f"weighting: must be made from the Gramian alone, found {name}, which needs the whole "
            "matrix of task gradients, and no rank holds it; use a weighting of Gramians, such as "
            "UPGradWeighting or CAGradWeighting"
        )
    if hasattr(weighting, "reset") and hasattr(weighting, "weighting"):  # CR-MOGM wraps another
        _check(weighting.weighting)
