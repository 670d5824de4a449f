"""`multitask_backward`: one call in place of `loss.backward()`, for every balancer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.batch import TaskBatch
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.gradients import assign_gradients
from ant_lightning.balancing.linear import SampleMean
from ant_lightning.balancing.parameters import trained_parameters
from ant_lightning.balancing.reduction import Reduction, default_reduction
from ant_lightning.balancing.step_losses import StepLosses
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.engines import Engine
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients

__all__ = ["BackwardReport", "multitask_backward", "task_gradients"]

# Largest gradient norm of a balancer's own parameters. In ordinary training on the digits the norm
# reaches 6 (UW) or 14 (continuous UW), so the clip is active only in a spike of the loss.
_MAX_OWN_NORM = 100.0


@dataclass(frozen=True)
class BackwardReport:
    """What `multitask_backward` did; all tensors are detached and equal on every rank.

    Attributes:
        finite: `False` if a loss or a gradient had a NaN or an infinity. Every `.grad` is then
            `None` and the balancer is unchanged, so skip the optimizer step.
        objective: The value that was minimised, scalar.
        task_losses: Mean loss of each task, `[k]`; NaN for a task without samples.
        task_weights: Derivative of the objective with respect to `task_losses`, `[k]`.
        num_samples: Number of samples of each task, `[k]`.
        grad_norm: L2 norm of the gradient that was written, before any clipping, scalar.
        gramian: Dot products of the task gradients, `[k, k]`; `None` between refreshes and for
            balancers that need none.

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


def multitask_backward(
    losses: Callable[[Tensor], Tensor],
    tasks: Int[Tensor, " b"],
    parameters: Iterable[nn.Parameter],
    balancer: Balancer | None = None,
    *,
    num_tasks: int | None = None,
    priors: Float[Tensor, " k"] | None = None,
    micro_batch_size: int | None = None,
    engine: Engine | None = None,
    gradients: DenseTaskGradients | None = None,
    reduction: Reduction | None = None,
    loss_scale: Tensor | float = 1.0,
    log_snr: Float[Tensor, " b"] | None = None,
) -> BackwardReport:
    """Fill `.grad` of `parameters` with the balanced gradient of several tasks.

    Let `L_i` be the mean loss of task i over the samples of all ranks, and `pi_i` its prior. The
    balancer sees `k pi_i L_i`, which is `L_i` for the default prior 1/k:

    - A balancer of losses makes one objective of these, for one backward pass. If its weights
      depend on them, they are summed over ranks between the forward and the backward pass.
    - A balancer of gradients needs the gradient of each task when its weights are refreshed. The
      samples of the tasks are disjoint, so this is the arithmetic of one pass over the batch.
      Between refreshes it costs one ordinary pass.
    - A balancer of samples weights each sample by its noise level.
    - Without a balancer the objective is the mean over all samples.

    An existing `.grad` is replaced, or removed if its parameter needs no gradient now, so
    parameters may be frozen and thawed between calls. This function sums over ranks itself, and
    the hooks of `DistributedDataParallel` never run. Let `losses` call the bare network and not
    that wrapper: ranks may call the network a different number of times.

    The network is called several times in a step, once for each task or part of the batch. Batch
    norm then normalises each call alone and updates its running statistics in each (k times with
    `Loop`; once with a loss balancer or none and without `micro_batch_size`). Use group or layer
    norm, or put these layers into evaluation mode.

    Args:
        losses: Called with the positions `rows` of some samples of the batch; returns one loss for
            each, `[len(rows)]`. Each sample is asked for exactly once, except that `Auto`,
            `OnePass` and `LowMemory` also ask for two samples beforehand in their first calls.
        tasks: Task of each sample of this rank's batch, `[b]` in `0 .. k-1`. Pass a tensor on the
            CPU: one on an accelerator is copied to the host, which waits for the device.
        parameters: Parameters to differentiate. Those that need no gradient are ignored, and
            duplicates count once. Slices, transposed tensors and mixed dtypes are fine.
        balancer: How to weight the tasks; `None` for the plain mean.
        num_tasks: `k` if `balancer` is `None`; by default the largest task of this rank + 1. Pass
            it on several ranks, which must agree on `k`.
        priors: `pi`, `[k]`, positive with sum 1. 1/k each by default; `|I_i| / T` weights tasks by
            their size.
        micro_batch_size: Largest number of samples in one forward pass; `None` for no limit.
        engine: How task gradients are computed, `Loop()` by default. Keep the object for the whole
            run. It changes time and memory but not the result.
        gradients: Buffers that are reused; by default each call allocates new ones.
        reduction: Sums over ranks. By default over all ranks of `torch.distributed` if it is
            initialised; all ranks must then call this function together.
        loss_scale: `.grad` is left multiplied by this (for a gradient scaler in float16).
        log_snr: Log signal-to-noise ratio of each sample, `[b]`; needed by a `SampleBalancer`.

    Returns:
        Losses, weights and norms, see `BackwardReport`.

    Raises:
        ConfigError: If a task number, a prior or a size is out of its range, or a parameter is
            complex, sparse, or has several elements sharing one memory location.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", arXiv 2306.00354.

    Examples:
        Two tasks pull a parameter to 1 and to -1; the losses of each are averaged first.

        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> targets, tasks = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 0, 1])
        >>> def losses(rows):
        ...     return (w - targets[rows]) ** 2
        >>> report = multitask_backward(losses, tasks, [w], LinearScalarization(num_tasks=2))
        >>> report.task_losses.tolist(), w.grad.tolist()
        ([1.0, 1.0], [0.0])
    """
    every = list(parameters)
    shared = trained_parameters(every)
    reduction = reduction or default_reduction()
    batch = TaskBatch(
        losses,
        tasks,
        balancer,
        num_tasks,
        shared,
        reduction=reduction,
        micro_batch_size=micro_batch_size,
        loss_scale=loss_scale,
    )
    step = StepLosses(
        tasks=batch.tasks,
        num_samples=batch.num_samples,
        scaled_priors=_scaled_priors(priors, batch),
        reduction=reduction,
        log_snr=log_snr,
    )
    # Of frozen parameters too: otherwise the optimizer would reuse the last step's gradient. This
    # also frees the last step's task gradients, of which `.grad` may be a view.
    for p in every:
        p.grad = None
    if gradients is not None:
        gradients.bind(shared)
    balancer = balancer or SampleMean(batch.num_tasks)
    report, step = balanced_backward(batch, balancer, step, engine or Loop(), gradients)
    if report.finite:
        balancer.update(step)
    return report


def balanced_backward(
    batch: TaskBatch,
    balancer: Balancer,
    step: StepLosses,
    engine: Engine,
    gradients: DenseTaskGradients | None = None,
) -> tuple[BackwardReport, StepLosses]:
    """Fill `.grad` of the parameters of `batch` and of the balancer; no state is updated.

    Args:
        batch: The samples of this rank.
        balancer: How to weight the tasks.
        step: The same samples, as the balancer sees them, without losses.
        engine: How task gradients are computed.
        gradients: Buffers that are reused; by default new ones.

    Returns:
        The report, and `step` with everything that `Balancer.update` may look at.
    """
    if balancer.refresh_due:
        found: TaskGradients = engine.task_gradients(batch, gradients)
        gramian = found.gramian()
        step = replace(step, gramian=gramian, losses=batch.values, task_losses=batch.mean_losses())
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
        weights, grad_norm, step = _weighted_backward(batch, balancer, step)
        # Launched before `is_finite` makes the host wait: launched after it, these kernels made
        # UW's step on an H200 1 to 2 ms longer than vanilla's. They are discarded if not finite.
        objective = _fill_own(balancer, step, batch)
        finite = batch.is_finite(grad_norm)
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
        num_samples=batch.num_samples,
        grad_norm=grad_norm,
        gramian=step.gramian,
    )
    return report, replace(step, task_weights=weights)


def task_gradients(
    losses: Callable[[Tensor], Tensor],
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
    batch: TaskBatch, balancer: Balancer, step: StepLosses
) -> tuple[Tensor, Tensor, StepLosses]:
    """Set `.grad` to the gradient of `sum_s per_sample[s] losses[s]`.

    Returns:
        The weights of the tasks, the unscaled norm of the gradient, and `step` with its losses.
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
    total: list[Tensor] = []
    for index, rows in enumerate(passes):
        again = balancer.needs_losses
        losses = known.pop() if known else batch.losses_of(rows, again=again)
        of_rows = weights.samples[rows.to(weights.samples.device, non_blocking=True)]
        loss = (losses * of_rows.to(losses.dtype)).sum()
        if index == len(passes) - 1:
            total = batch.last_gradients_of(loss, total)
        elif total:
            torch._foreach_add_(total, batch.gradients_of(loss))
        else:
            total = batch.gradients_of(loss)
    grad_norm = batch.differentiation.finish(total) / batch.loss_scale
    if not balancer.needs_losses:
        step = replace(step, losses=batch.values, task_losses=batch.mean_losses())
    return weights.tasks, grad_norm, step


def _fill_own(balancer: Balancer, step: StepLosses, batch: TaskBatch) -> Tensor | None:
    """Set the gradients of the balancer's own parameters; return the objective.

    They are clipped first. They are linear in the losses: without clipping, one batch of losses
    1e8 times too large stays in Adam's second moment for 30,000 steps, in which the balancer
    hardly learns; with clipping it stays for a few hundred.
    """
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
        raise ConfigError(f"priors: {k} positive numbers with sum 1 are needed, found {priors}")
    return (k * priors).to(device, torch.float64, non_blocking=True)
