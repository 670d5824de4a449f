"""What a network predicts, and the conversions between the four quantities.

At a time with signal `a` and noise level `s`, `x_t = a x_start + s eps`. The velocity is
`v = a' x_start + s' eps`, with the rates `a'`, `s'` at which the levels change, and the score is
`-eps / s`. Each of the four follows from another and `x_t`; `det = a s' - s a'` is the determinant
of the map from (x_start, eps) to (x_t, v).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from ant_lightning.errors import check_one_of

if TYPE_CHECKING:
    from collections.abc import Callable

PredictionType: TypeAlias = Literal["eps", "x0", "v"]
Quantity: TypeAlias = Literal["x0", "eps", "v", "score"]


class Levels(NamedTuple):
    """Signal `a` and noise level `s` of each image, `[b, 1, ...]`, their rates and `det`.

    The rates are derivatives by the process' own time. `det = a s_rate - s a_rate` is above 0.
    """

    a: Tensor
    s: Tensor
    a_rate: Tensor | float
    s_rate: Tensor | float
    det: Tensor | float


# (from, to), inserted from x_t = a x_start + s eps and v = a' x_start + s' eps. Salimans and Ho,
# "Progressive Distillation", arXiv 2202.00512, appendix D, is the case a' = -s, s' = a, det = 1.
_CONVERSIONS: dict[tuple[str, str], Callable[[Tensor, Tensor, Levels], Tensor]] = {
    ("eps", "x0"): lambda eps, x_t, at: (x_t - at.s * eps) / at.a,
    ("v", "x0"): lambda v, x_t, at: (at.s_rate * x_t - at.s * v) / at.det,
    ("x0", "eps"): lambda x0, x_t, at: (x_t - at.a * x0) / at.s,
    ("v", "eps"): lambda v, x_t, at: (at.a * v - at.a_rate * x_t) / at.det,
    ("eps", "v"): lambda eps, x_t, at: (at.det * eps + at.a_rate * x_t) / at.a,
    ("x0", "v"): lambda x0, x_t, at: (at.s_rate * x_t - at.det * x0) / at.s,
    ("score", "eps"): lambda score, x_t, at: -at.s * score,
    ("eps", "score"): lambda eps, x_t, at: -eps / at.s,
}


def check_prediction_type(prediction_type: str) -> None:
    """Check the name of a prediction type of a discrete process.

    Raises:
        ConfigError: If it is none of `eps`, `x0`, `v`.
    """
    check_one_of(get_args(PredictionType), prediction_type=prediction_type)


def convert(prediction: Tensor, kind: str, to: str, *, x_t: Tensor, at: Levels) -> Tensor:
    """Convert a prediction `[b, c, ...]` from type `kind` into type `to`, at the levels `at`.

    Raises:
        ConfigError: If one of them is not a `Quantity`.
    """
    for each in (kind, to):
        check_one_of(get_args(Quantity), prediction_type=each)
    if kind == to:
        return prediction
    if "score" in (kind, to) and "eps" not in (kind, to):  # the score is eps in other units
        eps = convert(prediction, kind, "eps", x_t=x_t, at=at)
        return convert(eps, "eps", to, x_t=x_t, at=at)
    return _CONVERSIONS[kind, to](prediction, x_t, at)
