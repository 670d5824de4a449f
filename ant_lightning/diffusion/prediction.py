"""What a network predicts (eps, x0 or v), and the conversions between the three.

With signal `a = sqrt(alphas_cumprod)` and noise level `s = sqrt(1 - alphas_cumprod)`,
`x_t = a x_start + s eps` and `v = a eps - s x_start`; (a, s) has unit length, so each of the
three follows from another and x_t. Every tensor broadcasts: a and s are [b, 1, ...].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREDICTION_TYPES", "PredictionType", "check_prediction_type", "eps_of", "v_of", "x0_of"]

PredictionType: TypeAlias = Literal["eps", "x0", "v"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("eps", "x0", "v")


def check_prediction_type(prediction_type: str) -> None:
    """Refuse a name that is none of eps, x0, v.

    Raises:
        ConfigError: as said.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, found {prediction_type}"
        )


def x0_of(kind: PredictionType, prediction: Tensor, *, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Turn a prediction into x_start: `(x_t - s eps) / a`, or `a x_t - s v`."""
    if kind == "eps":
        return (x_t - s * prediction) / a
    return prediction if kind == "x0" else a * x_t - s * prediction


def eps_of(
    kind: PredictionType, prediction: Tensor, *, x_t: Tensor, a: Tensor, s: Tensor
) -> Tensor:
    """Turn a prediction into eps: `(x_t - a x_start) / s`, or `s x_t + a v`."""
    if kind == "x0":
        return (x_t - a * prediction) / s
    return prediction if kind == "eps" else s * x_t + a * prediction


def v_of(kind: PredictionType, prediction: Tensor, *, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Turn a prediction into v: `(eps - s x_t) / a`, or `(a x_t - x_start) / s`.

    Reference: Salimans and Ho, Progressive Distillation, arXiv 2202.00512, appendix D.
    """
    if kind == "eps":
        return (prediction - s * x_t) / a
    return prediction if kind == "v" else (a * x_t - prediction) / s
