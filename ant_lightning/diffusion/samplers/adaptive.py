"""Adaptive ODE solvers of torchdiffeq, with the error control of each image its own."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable

AdaptiveMethod: TypeAlias = Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"]
ADAPTIVE_METHODS: tuple[str, ...] = get_args(AdaptiveMethod)


def solve_each(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    start: float,
    stop: float,
    *,
    method: AdaptiveMethod,
    rtol: float,
    atol: float,
) -> Tensor:
    """Solve `dx/dt = field(x, t)` from `start` to `stop`, with steps chosen for each image alone.

    torchdiffeq takes one error over all that it is given, so a batch would share its steps, and an
    image would depend on its batch. Here every image has a solver of its own. The solvers advance
    together: each call of the field answers one call of every solver, at a time of its own for each
    image. An image whose solver has finished keeps its last place in the batch until all have.

    Args:
        field: Called as `field(x [b, c, ...], t [b])` for the whole batch.
        x: The states at `start`, `[b, c, ...]`.
        start: First time.
        stop: Last time, which may lie before `start`.
        method: A solver of torchdiffeq.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.

    Raises:
        ConfigError: If torchdiffeq is not installed.
        NonFiniteError: If no step is small enough, as with an output that is not finite.

    Examples:
        >>> import torch
        >>> from ant_lightning.diffusion.samplers.adaptive import solve_each
        >>> x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        >>> field = lambda x, t: -2 * t[:, None] * x
        >>> x = solve_each(field, x, 0.0, 1.0, method="dopri5", rtol=1e-8, atol=1e-8)
        >>> [round(value, 6) for value in x.flatten().tolist()]  # exp(-1) and 3 exp(-1)
        [0.367879, 1.103638]
    """
    try:
        from torchdiffeq import odeint  # noqa: PLC0415 - an extra, which only this method needs
    except ImportError as error:
        raise ConfigError(
            f"method: must be one that needs no extra package, or install torchdiffeq "
            f"(ant-lightning[ode]), found {method}"
        ) from error
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    times = torch.full((len(x),), start, dtype=dtype, device=x.device)
    span = torch.tensor([start, stop], dtype=dtype, device=x.device)
    states = x.clone()
    calls: queue.SimpleQueue[tuple[int, Tensor, Tensor]] = queue.SimpleQueue()
    answers: list[queue.SimpleQueue[Tensor | None]] = [queue.SimpleQueue() for _ in x]
    inference = torch.is_inference_mode_enabled()  # both modes belong to a thread

    def solve(i: int, first: Tensor) -> Tensor:
        def call(t: Tensor, state: Tensor) -> Tensor:
            calls.put((i, t, state))
            answer = answers[i].get()
            if answer is None:
                raise _CancelledError
            return answer

        try:
            with torch.no_grad(), torch.inference_mode(inference):
                # Without `step_t` the last step leads beyond `stop`, where the field may be NaN.
                options = {"step_t": span[1:]}
                path = odeint(
                    call, first, span, method=method, rtol=rtol, atol=atol, options=options
                )
            assert isinstance(path, Tensor)
            return path[-1]
        except AssertionError as error:  # torchdiffeq: "underflow in dt"
            raise NonFiniteError(
                f"sampler: {method} found no step that is small enough for rtol {rtol:g} and atol "
                f"{atol:g} in image {i} of the batch; the network's output may not be finite"
            ) from error
        finally:
            calls.put((i, times[i], first[:0]))  # empty: this solver will not call again

    with ThreadPoolExecutor(len(x), thread_name_prefix="ode") as threads:
        solvers = [threads.submit(solve, i, x[i : i + 1]) for i in range(len(x))]
        solving = set(range(len(x)))
        try:
            while solving:
                asked = [calls.get() for _ in range(len(solving))]
                solving -= {i for i, _, state in asked if not len(state)}
                for i, t, state in asked:
                    if len(state):
                        times[i], states[i] = t, state[0]
                if solving:
                    slopes = field(states, times)
                    for i in solving:
                        answers[i].put(slopes[i : i + 1])
        finally:
            for i in solving:  # the field has raised: no solver may wait for its answer
                answers[i].put(None)
    return torch.cat([each.result() for each in solvers])


class _CancelledError(Exception):
    """The field has raised in another thread."""
