"""What a network predicts (eps, x0 or v), and the conversions between the three.

With signal `a = sqrt(alphas_cumprod)` and noise level `s = sqrt(1 - alphas_cumprod)`,
`x_t = a x_start + s eps` and `v = a eps - s x_start`. Since `a² + s² = 1`, each of the three
follows from another and `x_t`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PredictionType", "check_prediction_type", "convert"]

PredictionType: TypeAlias = Literal["eps", "x0", "v"]

# (from, to). For v: Salimans and Ho, "Progressive Distillation", arXiv 2202.00512, appendix D.
# The last two insert x_start or eps from `x_t = a x_start + s eps` into v and use `a² + s² = 1`.
# The divisors are above 0, because every beta is inside (0, 1).
_CONVERSIONS = {
    ("eps", "x0"): lambda eps, x_t, a, s: (x_t - s * eps) / a,
    ("v", "x0"): lambda v, x_t, a, s: a * x_t - s * v,
    ("x0", "eps"): lambda x0, x_t, a, s: (x_t - a * x0) / s,
    ("v", "eps"): lambda v, x_t, a, s: s * x_t + a * v,
    ("eps", "v"): lambda eps, x_t, a, s: (eps - s * x_t) / a,
    ("x0", "v"): lambda x0, x_t, a, s: (a * x_t - x0) / s,
}


def check_prediction_type(prediction_type: str) -> None:
    """Check the name of a prediction type.

    Raises:
        ConfigError: If it is none of `eps`, `x0`, `v`.
    """
    if prediction_type not in get_args(PredictionType):
        names = ", ".join(get_args(PredictionType))
        raise ConfigError(f"prediction_type: must be one of {names}, found {prediction_type}")


def convert(
    prediction: Tensor,
    kind: PredictionType,
    to: PredictionType,
    *,
    x_t: Tensor,
    a: Tensor,
    s: Tensor,
) -> Tensor:
    """Convert a prediction `[b, c, ...]` from type `kind` into type `to`.

    `a` and `s` are the signal and the noise level of each image, `[b, 1, ...]`.
    """
    return prediction if kind == to else _CONVERSIONS[kind, to](prediction, x_t, a, s)
