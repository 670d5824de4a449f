"""`MultiTaskStep`: in place of `loss.backward()`, for every balancer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ant_lightning.balancing.accumulation import Accumulation
from ant_lightning.balancing.auto import make_engine
from ant_lightning.balancing.backward import balanced_backward, step_losses
from ant_lightning.balancing.base import Balancer
from ant_lightning.balancing.buffers import Buffers
from ant_lightning.balancing.first_steps import FirstSteps
from ant_lightning.balancing.linear import SampleMean
from ant_lightning.balancing.parameters import clear_gradients, names_of, trained_parameters
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.task_batch import TaskBatch
from ant_lightning.errors import ConfigError, check_instance, check_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from ant_lightning.balancing.auto import EngineName
    from ant_lightning.balancing.backward import BackwardReport
    from ant_lightning.balancing.reduction import Reduction
    from ant_lightning.balancing.step_losses import StepLosses
    from ant_lightning.balancing.task_batch import Losses


class MultiTaskStep:
    """The backward pass of a training run on several tasks, in place of `loss.backward()`.

    It owns the engine that computes task gradients and its buffers. In each step, call `backward`,
    step the optimizer if the report is finite, and call `update`.

    Args:
        model: The network that the losses call: a module, also compiled, or in a
            `DistributedDataParallel` wrapper, whose own sums over ranks are switched off here.
        balancer: How to weight the tasks; `None` for the plain mean over samples.
        parameters: What to differentiate; by default the parameters of `model` that need a
            gradient, followed from step to step as they are frozen and thawed.
        num_tasks: Number of tasks `k` without a balancer; by default the largest task of this
            rank's batch + 1. Pass it on several ranks, which must agree on `k`.
        engine: How task gradients are computed: `auto`, `one_pass`, `loop` or `low_memory`. It
            changes time and memory but not the result.
        placement: `sorted` if each rank has samples of few tasks only, so that it sends only the
            gradients of these; else `spread`.
        micro_batch_size: Largest number of samples in one forward pass; `None` for no limit.
        reduction: Sums over ranks. By default over all ranks of `torch.distributed` if it is
            initialised; all ranks must then make the same steps.

    Raises:
        ConfigError: If an argument is out of range, or does not fit the balancer.

    Examples:
        Two tasks pull a weight to 1 and to -1.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> step = MultiTaskStep(model, UncertaintyWeighting(num_tasks=2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, targets = torch.ones(3, 1), torch.tensor([1.0, 1.0, -1.0])
        >>> def losses(rows):
        ...     errors = model(x[rows]).squeeze(1) - targets[rows]
        ...     return errors.square(), errors.abs()              # one loss per sample, or a pair
        >>> report = step.backward(losses, tasks=torch.tensor([0, 0, 1]))
        >>> report.num_samples.tolist(), report.task_weights.tolist(), report.aux.shape
        ([2.0, 1.0], [0.25, 0.25], torch.Size([3]))
        >>> if report.finite:
        ...     optimizer.step()
        >>> step.update()
    """

    def __init__(
        self,
        model: nn.Module,
        balancer: Balancer | None = None,
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        num_tasks: int | None = None,
        engine: EngineName = "auto",
        placement: Literal["spread", "sorted"] = "spread",
        micro_batch_size: int | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        check_instance(nn.Module, "the network that the losses call", model=model)
        if balancer is not None:
            check_instance(Balancer, "PCGrad(num_tasks=5)", balancer=balancer)
        check_whole(1, num_tasks=num_tasks)
        if balancer is not None and num_tasks not in (None, balancer.num_tasks):
            raise ConfigError(
                f"num_tasks: must be the {balancer.num_tasks} of the balancer, found {num_tasks}"
            )
        if placement not in {"spread", "sorted"}:
            raise ConfigError(f"placement: must be 'spread' or 'sorted', found {placement!r}")
        check_whole(1, micro_batch_size=micro_batch_size)
        self.model = model
        self.balancer = balancer
        self.num_tasks = num_tasks if balancer is None else balancer.num_tasks
        self.micro_batch_size = micro_batch_size
        self.reduction = reduction or default_reduction()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.engine = make_engine(
            engine, trained / max(1, sum(p.numel() for p in model.parameters()))
        )
        self._buffers = Buffers(self.engine, placed=placement == "sorted")
        self._chosen = None if parameters is None else list(parameters)
        self._wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._bare = model.module if isinstance(model, DistributedDataParallel) else model
        self._accumulated: Accumulation | None = None
        self._waiting: tuple[StepLosses, TaskBatch] | None = None  # for `update`
        self._first_steps = FirstSteps(balancer)
        trained_parameters(self.parameters)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """All parameters of the step, also those that need no gradient now."""
        return list(self.model.parameters()) if self._chosen is None else self._chosen

    def backward(
        self,
        losses: Losses,
        tasks: Int[Tensor, " b"],
        *,
        priors: Float[Tensor, " k"] | None = None,
        loss_scale: Tensor | float = 1.0,
        log_snr: Float[Tensor, " b"] | None = None,
        accumulate: bool = False,
        num_samples: Int[Tensor, " k"] | None = None,
    ) -> BackwardReport:
        """Fill every `.grad` with the balanced gradient; arguments as in `multitask_backward`.

        A step may have several parts, as in a loop that accumulates gradients. Each is a call with
        `accumulate=True`, but for the last. The last call fills `.grad` with the gradient of the
        joined batch, summed over ranks once, while its own backward pass goes on; its report has
        the losses of all parts. With
        weights of tasks, each part must have its tasks in the same proportion, or `num_samples`
        must be passed. Balancers that need the whole batch at once refuse this.

        Args:
            losses: Returns one loss for each of some samples, or a pair of these and something
                else for each, which is reported as `aux`.
            tasks: Task of each sample of this rank's batch, `[b]`, on the CPU.
            priors: Prior of each task, `[k]`, positive with sum 1.
            loss_scale: `.grad` is left multiplied by this.
            log_snr: Log signal-to-noise ratio of each sample, `[b]`; for a balancer of samples.
            accumulate: Whether other parts of this step follow. No `.grad` is filled before the
                last part, and the balancer does not change.
            num_samples: Samples of each task of this rank in all parts of the step.

        Raises:
            ConfigError: If an argument is out of range, or `update` was forgotten with a balancer
                that looks back.
        """
        if self._waiting is not None:
            raise ConfigError(
                f"update: must be called after the optimizer's step with "
                f"{type(self.balancer).__name__}, found another backward"
            )
        every = self.parameters
        shared = trained_parameters(every)
        if self._accumulated is None:
            self._first_steps.check_moved(
                shared, advice="pass accumulate=True with all calls of a step but the last"
            )
        named = self.balancer is not None and self.balancer.shared_parameters
        num_tasks = self.num_tasks
        if num_tasks is None and self._accumulated:  # parts may lack the last tasks
            num_tasks = max(self._accumulated.num_tasks, int(tasks.max()) + 1)
        batch = TaskBatch(
            losses,
            tasks,
            self.balancer,
            num_tasks,
            shared,
            reduction=self.reduction,
            micro_batch_size=self.micro_batch_size,
            loss_scale=loss_scale,
            differentiation=self._buffers.differentiation,
            names=names_of(shared, self._bare) if named else (),
        )
        self._buffers.adopt(batch.differentiation)
        balancer = self.balancer or SampleMean(batch.num_tasks)
        if balancer.accumulation == "any":
            num_samples = None  # a sample's weight does not depend on them
        accumulated, self._accumulated = self._accumulated, None  # given up after an error
        if accumulate or accumulated or num_samples is not None:
            accumulated = accumulated or Accumulation(balancer, num_samples)
            accumulated.check(num_samples)
        step = step_losses(batch, priors=priors, log_snr=log_snr, num_samples=num_samples)
        clear_gradients(every)
        with ExitStack() as stack:
            # Its hooks would wait for gradients that `autograd.grad` does not give to them.
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.no_sync())
            report, step = balanced_backward(
                batch,
                balancer,
                step,
                self.engine,
                self._buffers.rows(batch, balancer),
                accumulated=accumulated,
                last=not accumulate,
            )
        if accumulate:
            self._accumulated = accumulated
            return report
        if report.finite:
            self._first_steps.step(report, batch.values, shared)
            if balancer.looks_back:
                self._waiting = step, batch
            else:
                balancer.update(step)
        return report

    def update(self) -> None:
        """Let the balancer look back at the step; call it after the optimizer's step.

        Most balancers were updated in `backward` already, and then this does nothing.
        """
        if self._waiting is None or self.balancer is None:
            return
        step, batch = self._waiting
        self._waiting = None
        self._first_steps.check_moved(batch.shared, advice="update comes after optimizer.step()")
        self.balancer.update(step, lambda: batch.losses_now() * step.scaled_priors)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model and its optimizer; that of rank 0.

        The balancer's state, and the order in which gradients arrive on several ranks, on which
        the last bits of their sums depend.

        Raises:
            ConfigError: In the middle of a step, whose parts or losses are not stored.
        """
        if self._accumulated is not None or self._waiting is not None:
            missing = "parts" if self._accumulated is not None else "its update"
            raise ConfigError(
                f"state_dict: must be called between steps, found one that still lacks {missing}"
            )
        balancer = {} if self.balancer is None else self.balancer.state_dict()
        kind = type(self.balancer).__name__
        return {"balancer": balancer, "kind": kind, "arrival_orders": self.arrival_orders()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`; a step that had begun is given up.

        Raises:
            ConfigError: If it is another state.
        """
        if not isinstance(state, dict) or "balancer" not in state:
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ConfigError(f"state: must be the state_dict of a MultiTaskStep, found {found}")
        self._accumulated = self._waiting = None
        kind, known = type(self.balancer).__name__, state.get("kind")
        if known not in (None, kind):
            raise ConfigError(f"balancer: must be the {known} of the state, found {kind}")
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        self.load_arrival_orders(state.get("arrival_orders", {}))

    def arrival_orders(self) -> dict[str, list[int]]:
        """The part of `state_dict` that is not the balancer's; empty on one rank."""
        return self._buffers.orders()

    def load_arrival_orders(self, orders: Mapping[str, Sequence[int]]) -> None:
        """Take over `arrival_orders` of rank 0; the same on all ranks, before the first step."""
        self._buffers.load_orders(orders)
