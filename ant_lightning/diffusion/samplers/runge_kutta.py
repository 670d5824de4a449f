"""Explicit Runge-Kutta steps: Euler, midpoint, Heun, Ralston, and two of higher order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from ant_lightning.errors import check_one_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ODEMethod: TypeAlias = Literal["euler", "midpoint", "heun", "ralston", "heun3", "rk4"]


class Tableau(NamedTuple):
    """A Butcher tableau: stage i is at `t + nodes[i] h`, the step is `h Σ weights[i] k_i`.

    Attributes:
        nodes: Place of each stage in the step, from 0 to 1.
        stages: Row i weighs the derivatives of the stages before i.
        weights: Weights of all stages, with sum 1.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", chapter II.1.
_TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "ralston": Tableau((0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # The 3/8 rule, not the classical method: as `rk4` of torchdiffeq.
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def tableau(method: str) -> Tableau:
    """The tableau of a method.

    Raises:
        ConfigError: If the method is unknown.
    """
    check_one_of(get_args(ODEMethod), method=method)
    return _TABLEAUS[method]


def runge_kutta_step(
    field: Callable[[Tensor, float], Tensor], x: Tensor, t: float, t_next: float, method: Tableau
) -> Tensor:
    """One step of `dx/dt = field(x, t)` from `t` to `t_next`, in either direction.

    `k_i = field(x + h Σ_j a_ij k_j, t + c_i h)` and `x + h Σ_i b_i k_i`, with `h = t_next - t`.

    Args:
        field: The right-hand side, called once for each stage.
        x: The state at `t`.
        t: Time at the start of the step.
        t_next: Time at its end, which may lie before `t`.
        method: Tableau of the method.

    Examples:
        >>> import torch
        >>> from ant_lightning.diffusion.samplers.runge_kutta import runge_kutta_step, tableau
        >>> x = torch.ones(1, dtype=torch.float64)  # dx/dt = x: exactly e = 2.71828 at t = 1
        >>> [round(runge_kutta_step(lambda x, t: x, x, 0.0, 1.0, tableau(name)).item(), 4)
        ...  for name in ("euler", "heun", "rk4")]
        [2.0, 2.5, 2.7083]
    """
    h = t_next - t
    slopes: list[Tensor] = []
    for node, row in zip(method.nodes, method.stages, strict=True):
        # The end of the step is the given number: t + 1.0 h may differ from it in the last bit,
        # and there the field may be evaluated at the very end of its interval.
        at = t_next if node == 1 else t + node * h
        slopes.append(field(_moved(x, h, row, slopes), at))
    return _moved(x, h, method.weights, slopes)


def _moved(x: Tensor, h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            x = x + (h * weight) * slope
    return x
