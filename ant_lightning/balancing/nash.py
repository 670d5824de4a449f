"""NashMTL: the weights of the Nash bargaining solution between the tasks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class NashSolverError(ArithmeticError):
    """No weights with `G alpha = 1 / alpha` were found."""


def nash_weights(
    gramian: Float[Tensor, "k k"],
    *,
    ridge: float = 1e-6,
    solver: Literal["newton", "cvxpy"] = "newton",
) -> Float[Tensor, " k"]:
    """The positive `alpha` with `(G + ridge D) alpha = 1 / alpha`, where `D` is the diagonal of G.

    With `C = D^-1/2 G D^-1/2` and `alpha = D^-1/2 b`, `b` is the minimum of the strictly convex
    `1/2 b^T (C + ridge) b - sum_i log b_i`. Newton's method finds it, with damped steps of length
    `1 / (1 + lambda)` while the Newton decrement `lambda` is above 1/4, and steps of length 1
    below. The ridge ensures a solution for gradients that oppose each other exactly.

    A task without a gradient (`G[i, i] = 0`) is left out and gets the smallest alpha of the
    others, or 1 if there are none. The update does not depend on this alpha now. It is small so
    that the task does not dominate if its gradient comes back before the next refresh.

    Args:
        gramian: `G[i, j] = g_i . g_j`, `[k, k]`.
        ridge: Added to the diagonal of C.
        solver: `newton`, or `cvxpy`: the CLARABEL solver, for comparison. Its solution is off by
            up to 5e-5 and is then refined by Newton steps.

    Returns:
        `alpha`, `[k]` float64, on the Gramian's device. The solver runs on the host.

    Raises:
        NashSolverError: If the Gramian is not finite, or not close enough to positive
            semi-definite for a solution.

    Reference:
        Navon et al., "Multi-Task Learning as a Bargaining Game", claim 3.1, arXiv 2202.01017.

    Examples:
        For orthogonal gradients, alpha is 1 over their norms: here 1/2 and 1.

        >>> nash_weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).round(decimals=3)
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double().numpy()
    squared_norms = np.diagonal(G)
    if not np.isfinite(G).all() or (squared_norms < 0).any():
        raise NashSolverError("the Gramian has a NaN, an infinity or a negative squared norm")
    alpha = np.ones(len(G))
    active = squared_norms > 0
    if active.any():
        inverse_norms = 1 / np.sqrt(squared_norms[active])
        # Cosines between the gradients: norms that span decades would make G ill-conditioned.
        C = G[np.ix_(active, active)] * inverse_norms[:, None] * inverse_norms
        C = (C + C.T) / 2 + ridge * np.eye(len(C))
        b = _newton(C) if solver == "newton" else _cvxpy(C)
        alpha[active] = b * inverse_norms
        alpha[~active] = alpha[active].min()
    return torch.from_numpy(alpha).to(gramian.device, non_blocking=True)


def _newton(C: Array, *, start: Array | None = None, max_steps: int = 200) -> Array:
    """The minimum of `1/2 b^T C b - sum log b`, by steps that stay in `b > 0`."""
    k = len(C)
    total = C.sum()
    if not total > 0:
        raise NashSolverError("the Gramian is not positive semi-definite")
    # By default, start from the best vector of equal weights: b = c minimises
    # c^2 total / 2 - k log c at c = sqrt(k / total).
    b = np.full(k, np.sqrt(k / total)) if start is None else start
    for _ in range(max_steps):
        # Relative to b: gradient b * (C b) - 1, Hessian diag(b) C diag(b) + I.
        hessian = C * b[:, None] * b
        gradient = hessian.sum(1) - 1
        hessian[np.diag_indices(k)] += 1
        step = np.linalg.solve(hessian, gradient)
        squared = gradient @ step
        if not squared >= 0 or np.isinf(squared):
            break
        decrement = float(np.sqrt(squared))
        # For a semi-definite C the Hessian is at least I, so no entry of `step`
        # exceeds the decrement: b changes by less than b itself and stays positive.
        b = b * (1 - step / (1 + decrement if decrement > 0.25 else 1))
        # The error of the step just made is of the order of decrement^2.
        if decrement < 1e-7:
            return b
    raise NashSolverError("Newton's iteration did not converge")


def _cvxpy(C: Array) -> Array:
    """The minimum of `1/2 b^T C b - sum log b`, by an interior-point solver, then refined."""
    import cvxpy as cp  # noqa: PLC0415 - 0.5 s of imports that only this solver needs

    b = cp.Variable(len(C))
    objective = cp.quad_form(b, cp.psd_wrap(C)) / 2 - cp.sum(cp.log(b))
    problem = cp.Problem(cp.Minimize(objective))
    tight = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
    try:
        with warnings.catch_warnings():
            # The warning says that tolerances were not quite reached. Newton's steps refine the
            # solution anyway, and raise if they do not converge.
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            problem.solve(solver=cp.CLARABEL, **tight)
    except cp.error.SolverError as error:
        raise NashSolverError(f"CLARABEL: {error}") from error
    value = b.value
    if value is None or not (np.isfinite(value).all() and (value > 0).all()):
        raise NashSolverError(f"CLARABEL: no solution, status {problem.status}")
    return _newton(C, start=np.asarray(value, dtype=np.float64))


class NashMTL(GradientBalancer):
    """Nash-MTL: the weights `alpha / k` of the bargaining solution, refreshed every 25 steps.

    `alpha` comes from `nash_weights`. On a refresh the update has the norm `sqrt(k) / k` whatever
    the scale of the gradients, since `alpha^T G alpha = k`. If no solution is found, the last
    weights are kept (1/k before the first refresh), `num_failures` is increased, and the first
    failure gives a `UserWarning`.

    Args:
        num_tasks: Number of tasks `k`.
        update_every: Steps from one refresh to the next (25 in the official code).
        solver: `newton` or `cvxpy`, see `nash_weights`.

    Raises:
        ConfigError: If `solver` is unknown or a number is below 1.

    Reference:
        Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017. The official
        code solves a sequence of linearised problems, which mostly fails when the gradients'
        norms span four decades.

    Examples:
        >>> balancer = NashMTL(num_tasks=2, update_every=3)
        >>> balancer(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).round(decimals=3)
        tensor([0.2500, 0.5000], dtype=torch.float64)
        >>> balancer.refresh_due
        False
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        update_every: int = 25,
        solver: Literal["newton", "cvxpy"] = "newton",
    ) -> None:
        super().__init__(num_tasks, update_every=update_every)
        if solver not in {"newton", "cvxpy"}:
            raise ConfigError(f"solver: must be 'newton' or 'cvxpy', found {solver!r}")
        self.solver: Literal["newton", "cvxpy"] = solver
        self.num_failures = 0

    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """`alpha / k`; the last weights if there is no solution."""
        try:
            return nash_weights(gramian, solver=self.solver) / self.num_tasks
        except NashSolverError as error:
            self.num_failures += 1
            if self.num_failures == 1:
                warnings.warn(
                    f"NashMTL found no weights and keeps the last ones: {error}. This is said "
                    "once; num_failures counts on.",
                    stacklevel=2,
                )
            return self.kept_weights.to(gramian)

    def get_extra_state(self) -> Tensor:
        """Numbers of steps made with the kept weights and of failures."""
        return torch.cat([super().get_extra_state(), torch.tensor([self.num_failures])])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        super().set_extra_state(state)
        self.num_failures = int(state[1])
