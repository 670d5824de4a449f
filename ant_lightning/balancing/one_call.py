"""`multitask_backward`: in place of `loss.backward()`, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.weak import WeakIdKeyDictionary

from ant_lightning.balancing.auto import make_engine
from ant_lightning.balancing.backward import balanced_backward, step_losses
from ant_lightning.balancing.buffers import Buffers
from ant_lightning.balancing.linear import SampleMean
from ant_lightning.balancing.parameters import clear_gradients, trained_parameters
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.task_batch import TaskBatch
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from ant_lightning.balancing.auto import EngineName
    from ant_lightning.balancing.backward import BackwardReport
    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.engines import Engine
    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.reduction import Reduction
    from ant_lightning.balancing.task_batch import Losses


def multitask_backward(
    losses: Losses,
    tasks: Int[Tensor, " b"],
    parameters: Iterable[nn.Parameter],
    balancer: Balancer | None = None,
    *,
    num_tasks: int | None = None,
    priors: Float[Tensor, " k"] | None = None,
    micro_batch_size: int | None = None,
    engine: Engine | EngineName = "auto",
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

    The network may be called several times in a step, once for each task or part of the batch.
    Batch norm then normalises each call alone and updates its running statistics in each (k times
    with the loop; once with a loss balancer or none and without `micro_batch_size`). Use group or
    layer norm, or put these layers into evaluation mode.

    This is the form of one call of `MultiTaskStep`, which also accumulates gradients over several
    calls, and serves balancers that look back at a step. Buffers, and what an engine has learnt
    about a network, are kept for the next call with the same parameters, which overwrites them: on
    several ranks `.grad` may be a part of such a buffer.

    Args:
        losses: Called with the positions `rows` of some samples of the batch; returns one loss for
            each, `[len(rows)]`, or a pair of these and something else for each, which is reported
            as `aux`. Each sample is asked for exactly once, except that engines other than the
            loop also ask for two samples beforehand in their first calls, and that a balancer
            whose weights depend on the losses asks twice with `micro_batch_size`.
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
        engine: How task gradients are computed: `auto`, `one_pass`, `loop` or `low_memory`, or an
            engine of your own, whose buffers are not kept. It changes time and memory but not the
            result.
        gradients: Buffers that are reused; by default those of the last call.
        reduction: Sums over ranks. By default over all ranks of `torch.distributed` if it is
            initialised; all ranks must then call this function together.
        loss_scale: `.grad` is left multiplied by this (for a gradient scaler in float16).
        log_snr: Log signal-to-noise ratio of each sample, `[b]`; needed by a `SampleBalancer`.

    Returns:
        Losses, weights and norms, see `BackwardReport`.

    Raises:
        ConfigError: If a task number, a prior or a size is out of its range, if a parameter is
            complex, sparse, or has several elements sharing one memory location, or if the
            balancer needs a `MultiTaskStep`.

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
    if balancer is not None and balancer.looks_back:
        name = type(balancer).__name__
        raise ConfigError(
            f"balancer: {name} looks back at a step after the optimizer, which one call cannot "
            f"do; use MultiTaskStep, found {name}"
        )
    shared = trained_parameters(every)
    kept = remembered(engine, shared[0]) if isinstance(engine, str) else Buffers(engine)
    given, reduction = reduction is not None, reduction or default_reduction()
    reduction = kept.wake(shared, reduction, given=given)
    try:
        batch = TaskBatch(
            losses,
            tasks,
            balancer,
            num_tasks,
            shared,
            reduction=reduction,
            micro_batch_size=micro_batch_size,
            loss_scale=loss_scale,
            differentiation=kept.differentiation,
        )
        step = step_losses(batch, priors=priors, log_snr=log_snr)
        clear_gradients(every)
        balancer = balancer or SampleMean(batch.num_tasks)
        if gradients is None:
            gradients = kept.rows(batch, balancer)
        else:
            gradients.bind(batch.shared)
        report, step = balanced_backward(batch, balancer, step, kept.engine, gradients)
    except BaseException:
        kept.drop()  # what is under way between ranks may still write to them
        raise
    kept.sleep(batch)
    if report.finite:
        balancer.update(step)
    return report


# For each first parameter, what the calls of `multitask_backward` share, by the engine's name.
_remembered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(name: EngineName, first: nn.Parameter) -> Buffers:
    """What earlier calls with this first parameter left; it goes when the parameter does."""
    found: dict[str, Buffers] = _remembered.setdefault(first, {})
    if name not in found:
        found[name] = Buffers(make_engine(name))
    return found[name]
