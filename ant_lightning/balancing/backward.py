"""The backward pass of a step: what every balancer and every engine has in common."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.gradients import assign_gradients
from ant_lightning.balancing.parameters import matching, trained_parameters
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.step_losses import StepLosses
from ant_lightning.balancing.task_batch import TaskBatch
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from jaxtyping import Int
    from torch import Tensor, nn

    from ant_lightning.balancing.accumulation import Accumulation
    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.engines import Engine
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients
    from ant_lightning.balancing.reduction import Reduction
    from ant_lightning.balancing.task_batch import Losses

# Largest gradient norm of a balancer's own parameters. In ordinary training on the digits the norm
# reaches 6 (UW) or 14 (continuous UW), so the clip is active only in a spike of the loss.
_MAX_OWN_NORM = 100.0


@dataclass(frozen=True)
class BackwardReport:
    """What one backward call did; all tensors are detached, and but for `aux` equal on every rank.

    Attributes:
        finite: `False` if a loss or a gradient had a NaN or an infinity. Every `.grad` is then
            `None` and the balancer is unchanged, so skip the optimizer step.
        objective: The value that was minimised, scalar.
        task_losses: Mean loss of each task, `[k]`; NaN for a task without samples. If the step has
            several parts, over all parts until now.
        task_weights: Derivative of the objective with respect to `task_losses`, `[k]`.
        num_samples: Number of samples of each task, `[k]`.
        grad_norm: L2 norm of the gradient that was written, before any clipping, scalar; NaN if
            none was written, because other parts of the step follow.
        gramian: Dot products of the task gradients, `[k, k]`; `None` between refreshes and for
            balancers that need none.
        aux: What `losses` returned beside the losses, `[b, ...]`, in the order of this rank's
            batch; `None` for nothing.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> tasks = torch.tensor([0, 1, 1])
        >>> report = multitask_backward(lambda rows: w * rows, tasks, [w], num_tasks=2)
        >>> report.num_samples.tolist(), report.task_losses.tolist(), float(report.objective)
        ([1.0, 2.0], [0.0, 1.5], 1.0)
    """

    finite: bool
    objective: Tensor
    task_losses: Tensor
    task_weights: Tensor
    num_samples: Tensor
    grad_norm: Tensor
    gramian: Tensor | None = None
    aux: Tensor | None = None


def step_losses(
    batch: TaskBatch,
    *,
    priors: Tensor | None,
    log_snr: Tensor | None,
    num_samples: Tensor | None = None,
) -> StepLosses:
    """The samples of `batch` as a balancer sees them before the forward pass.

    Args:
        batch: The samples of this rank.
        priors: `pi`, `[k]`; 1/k each by default.
        log_snr: That of each sample, `[b]`.
        num_samples: Samples of each task of this rank in all parts of the step, `[k]`; by default
            those of `batch`.

    Raises:
        ConfigError: If the priors or the counts are out of range.
    """
    of_step = batch.num_samples
    if num_samples is not None:
        own = batch.starts[1:], batch.starts[:-1]
        missing = num_samples.cpu() < torch.tensor(own[0]) - torch.tensor(own[1])
        if num_samples.shape != of_step.shape or bool(missing.any()):
            raise ConfigError(
                f"num_samples: must be the {batch.num_tasks} counts of the whole step, at least "
                f"those of each part, found {num_samples.tolist()}"
            )
        of_step = batch.reduction.all_reduce_(num_samples.to(of_step, copy=True))
    return StepLosses(
        tasks=batch.tasks,
        num_samples=of_step,
        scaled_priors=_scaled_priors(priors, batch),
        reduction=batch.reduction,
        log_snr=log_snr,
    )


@contextmanager
def _naming_losses() -> Iterator[None]:
    """Say of torch's error about a graph that was used up what is wrong with the losses."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ConfigError(
            "losses: must call the model in each call, for the rows that are asked for, found a "
            "graph that an earlier call has used up (losses that were computed before?)"
        ) from error


@_naming_losses()
def balanced_backward(
    batch: TaskBatch,
    balancer: Balancer,
    step: StepLosses,
    engine: Engine,
    gradients: DenseTaskGradients | None = None,
    *,
    accumulated: Accumulation | None = None,
    last: bool = True,
) -> tuple[BackwardReport, StepLosses]:
    """Fill `.grad` of the parameters of `batch` and of the balancer; no state is updated.

    Args:
        batch: The samples of this rank.
        balancer: How to weight the tasks.
        step: The same samples, as the balancer sees them, without losses.
        engine: How task gradients are computed.
        gradients: Buffers that are reused; by default new ones.
        accumulated: Sums over the parts of the step, if it has several.
        last: Whether this is the last part. Before it, no `.grad` is filled.

    Returns:
        The report, and `step` with everything that `Balancer.update` may look at.
    """
    objective: Tensor | None = None
    if balancer.refresh_due:
        found: TaskGradients = engine.task_gradients(batch, gradients)
        gramian = shared_gramian = found.gramian()
        if balancer.shared_parameters:
            shared_gramian = found.gramian(matching(balancer.shared_parameters, batch.names))
        step = replace(
            step,
            gramian=gramian,
            shared_gramian=shared_gramian,
            losses=batch.values,
            task_losses=batch.mean_losses(),
        )
        finite = batch.is_finite(gramian)
        if finite:
            # The balancer sees the gradients `k pi_i g_i`; its weights are then turned into
            # weights of the `g_i`.
            weights = balancer.gramian_weights(step).to(gramian) * step.scaled_priors
            found.combine_(weights, scale=batch.loss_scale)
            # ||sum_i w_i g_i||^2 = w^T G w, without reading the p numbers again. Rounding can make
            # it slightly negative where the gradients cancel.
            grad_norm = (weights @ gramian @ weights).clamp(min=0).sqrt()
        else:
            # The balancer is not asked: it may draw random numbers for its weights.
            weights, grad_norm = torch.full_like(step.scaled_priors, torch.nan), gramian.sum()
        found.release()
        objective = _fill_own(balancer, step, batch)
    else:
        if accumulated is None:
            weights, total, step = _weighted_backward(batch, balancer, step)
        else:
            factor = accumulated.begin(batch, last=last)
            weights, total, step = _weighted_backward(
                batch, balancer, step, before=accumulated.total, factor=factor, last=last
            )
            weights, step = accumulated.end(batch, total, weights, step)
        if last:
            grad_norm = batch.differentiation.finish(total) / batch.loss_scale
            # Launched before `is_finite` makes the host wait: launched after it, these kernels made
            # UW's step on an H200 1 to 2 ms longer than vanilla's. They are discarded if not
            # finite.
            objective = _fill_own(balancer, step, batch)
        else:
            grad_norm = torch.full_like(weights[0], torch.nan)
        finite = batch.is_finite(*([grad_norm] if last else []))
    assert step.task_losses is not None
    if not finite:
        objective = None
        for p in [*batch.shared, *balancer.parameters()]:
            p.grad = None
    weights = weights.detach().to(step.task_losses)
    if objective is None:
        objective = (weights * step.task_losses.nan_to_num()).sum()
    report = BackwardReport(
        finite=finite,
        objective=objective,
        task_losses=step.task_losses,
        task_weights=weights,
        num_samples=step.num_samples,
        grad_norm=grad_norm,
        gramian=step.gramian,
        aux=batch.aux,
    )
    return report, replace(step, task_weights=weights)


def task_gradients(
    losses: Losses,
    tasks: Int[Tensor, " b"],
    parameters: Iterable[nn.Parameter],
    *,
    num_tasks: int,
    micro_batch_size: int | None = None,
    reduction: Reduction | None = None,
) -> DenseTaskGradients:
    """The gradients of the mean loss of each task, for analysis; `.grad` is not changed.

    A task without samples has a zero row. Arguments and errors are those of `multitask_backward`.

    Returns:
        The gradients as `rows`, `[k, p]` float32 (on several ranks, this rank's shard of each),
        and their Gramian `gramian()`, `[k, k]` float64.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> tasks, targets = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> def losses(rows):
        ...     return ((w - targets[rows]) ** 2).sum(1) / 2
        >>> task_gradients(losses, tasks, [w], num_tasks=2).gramian().tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    shared = trained_parameters(parameters)
    reduction = reduction or default_reduction()
    batch = TaskBatch(
        losses,
        tasks,
        None,
        num_tasks,
        shared,
        reduction=reduction,
        micro_batch_size=micro_batch_size,
    )
    return Loop().task_gradients(batch)


def _weighted_backward(
    batch: TaskBatch,
    balancer: Balancer,
    step: StepLosses,
    *,
    before: Sequence[Tensor] = (),
    factor: float = 1.0,
    last: bool = True,
) -> tuple[Tensor, list[Tensor], StepLosses]:
    """The gradient of `loss_scale * sum_s per_sample[s] losses[s]`, for this rank's samples.

    Args:
        batch: The samples.
        balancer: Gives the weights.
        step: What it sees of the samples.
        before: The gradient of earlier parts of the step, which is added.
        factor: Factor of the gradient of this part.
        last: Whether no part follows.

    Returns:
        The weights of the tasks, the gradient of each parameter (to be read by
        `differentiation.finish` alone if this is the last part), and `step` with its losses.
    """
    (passes,) = batch.passes([torch.arange(len(batch), device=batch.order.device)])
    known: list[Tensor] = []  # losses with their graph, if they come before the weights
    if not balancer.needs_losses:
        weights = balancer.step_weights(step)
    else:
        if len(passes) == 1:
            known = [batch.losses_of(passes[0])]
        else:
            # The second time, dropout draws the same masks.
            with torch.no_grad(), undisturbed(batch.tasks.device):
                for rows in passes:
                    batch.losses_of(rows)
        step = replace(step, losses=batch.values, task_losses=batch.mean_losses())
        weights = balancer.step_weights(step)
    per_sample = weights.samples if factor == 1 else weights.samples * factor
    total = list(before)
    for index, rows in enumerate(passes):
        again = balancer.needs_losses
        losses = known.pop() if known else batch.losses_of(rows, again=again)
        of_rows = per_sample[rows.to(per_sample.device, non_blocking=True)]
        loss = (losses * of_rows.to(losses.dtype)).sum()
        if last and index == len(passes) - 1:
            total = batch.last_gradients_of(loss, total)
        elif total:
            torch._foreach_add_(total, batch.gradients_of(loss))
        else:
            total = batch.gradients_of(loss)
    if not balancer.needs_losses:
        step = replace(step, losses=batch.values, task_losses=batch.mean_losses())
    return weights.tasks, total, step


def _fill_own(balancer: Balancer, step: StepLosses, batch: TaskBatch) -> Tensor | None:
    """Set the gradients of the balancer's own parameters; return the objective.

    They are clipped first. They are linear in the losses: without clipping, one batch of losses
    1e8 times too large stays in Adam's second moment for 30,000 steps, in which the balancer
    hardly learns; with clipping it stays for a few hundred.
    """
    for p in balancer.parameters():
        p.grad = None  # that of the last step, if there is none in this one
    objective, grads = balancer.own_gradients(step)
    if grads:
        assign_gradients([p for p in balancer.parameters() if p.requires_grad], grads)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        factor = (_MAX_OWN_NORM / norm).clamp(max=1.0) * batch.loss_scale
        torch._foreach_mul_([p.grad for p in balancer.parameters() if p.grad is not None], factor)
    return objective


def _scaled_priors(priors: Tensor | None, batch: TaskBatch) -> Tensor:
    """Check the priors; return `k pi`, which is 1 for each task by default."""
    device, k = batch.num_samples.device, batch.num_tasks
    if priors is None:
        return torch.ones(k, dtype=torch.float64, device=device)
    # Written so that NaN, for which every comparison is false, is refused as well.
    positive = priors.shape == (k,) and bool((priors > 0).all())
    if not (positive and abs(float(priors.sum()) - 1) <= 1e-4):
        raise ConfigError(f"priors: must be {k} positive numbers with sum 1, found {priors}")
    return (k * priors).to(device, torch.float64, non_blocking=True)
