"""One optimizer step of any method: task gradients, clipping, and steps that are skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ant_lightning.balancing.step import MultiTaskStep
from ant_lightning.errors import NonFiniteError
from ant_lightning.models.freezing import TrainedParameters
from ant_lightning.models.loss_scaling import (
    back_off,
    clip_gradients_,
    gradient_scaler,
    loss_scale,
)
from ant_lightning.models.optimizers import HEAD, OptimizerFactory
from ant_lightning.models.running_statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lightning as L
    from torch import Tensor, nn

    from ant_lightning.balancing.backward import BackwardReport
    from ant_lightning.balancing.task_batch import Losses
    from ant_lightning.models.auxiliary import FeatureAlignment
    from ant_lightning.models.settings import Optimization, Tasks


@dataclass
class SkippedSteps:
    """Steps that were not made because of a NaN or an infinity.

    Attributes:
        num_steps: All of the run.
        num_in_a_row: Those since the last step that was made.
        last: Whether the last step was skipped.
    """

    num_steps: int = 0
    num_in_a_row: int = 0
    last: bool = False


class OptimizerStep:
    """Fills the gradients of a step and makes the step, or skips it.

    Args:
        backbone: The network.
        tasks: What the tasks are and how they are balanced.
        optimization: How the weights are optimised.
        auxiliary: A term of the loss from inside the network, whose head it trains too.
        num_tasks: `k`.

    Attributes:
        factory: Makes optimizer and scheduler.
        trained: Which parameters of the backbone are trained.
        skipped: Steps that were not made.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Tasks,
        optimization: Optimization,
        *,
        auxiliary: FeatureAlignment | None,
        num_tasks: int,
    ) -> None:
        self.backbone = backbone
        self.tasks = tasks
        self.optimization = optimization
        self.auxiliary = auxiliary
        self.num_tasks = num_tasks
        self.factory = OptimizerFactory(
            optimization, path="optimization.", balancer=tasks.balancer, network=backbone
        )
        self.trained = TrainedParameters()
        self.skipped = SkippedSteps()
        self._step: MultiTaskStep | None = None
        self._arrival_orders: Mapping[str, Sequence[int]] = {}  # of a checkpoint, for `begin`

    def optimizer(self, backbone: nn.Module, trainer: L.Trainer | None) -> tuple[Any, Any]:
        """The optimizer and its scheduler or `None`; see `OptimizerFactory.make`.

        Its groups are those of the backbone, of the balancer and of the auxiliary term.
        """
        own = [] if self.tasks.balancer is None else list(self.tasks.balancer.parameters())
        # The backbone comes first.
        groups = self.trained.begin(backbone, self.factory.groups())
        if own:
            groups.append({"params": own})
        if self.auxiliary is not None:
            groups.append({"params": list(self.auxiliary.parameters()), "role": HEAD})
        return self.factory.make(groups, trainer=trainer)

    def begin(self, backbone: nn.Module) -> None:
        """Start a run, when the ranks and the device are known and the backbone is wrapped."""
        self.backbone = backbone
        self._step = MultiTaskStep(
            self.backbone,
            self.tasks.balancer,
            num_tasks=self.num_tasks,
            engine=self.tasks.engine,
            placement=self.tasks.placement,
        )
        self._step.load_arrival_orders(self._arrival_orders)
        self._arrival_orders = {}

    def arrival_orders(self) -> dict[str, list[int]] | None:
        """See `MultiTaskStep.arrival_orders`; `None` before `begin`."""
        return None if self._step is None else self._step.arrival_orders()

    def load_arrival_orders(self, orders: Mapping[str, Sequence[int]]) -> None:
        """Keep those of a checkpoint for `begin`."""
        self._arrival_orders = orders

    def make(
        self,
        losses: Losses,
        tasks: Tensor,
        *,
        trainer: L.Trainer,
        optimizer: Any,  # noqa: ANN401 - Lightning's own loose type
        scheduler: Any,  # noqa: ANN401
        priors: Tensor | None,
        log_snr: Tensor | None,
    ) -> BackwardReport:
        """Fill the gradients, clip, step optimizer and scheduler; or skip the step.

        Args:
            losses: The losses of the batch: see `MultiTaskStep.backward`.
            tasks: Tasks of the images, `[b]`.
            trainer: Of the run.
            optimizer: As Lightning wraps it.
            scheduler: Steps the learning rate; `None` for none.
            priors: Weights of the tasks, `[k]`.
            log_snr: Of the images, `[b]`, for a balancer of samples.

        Raises:
            NonFiniteError: After `max_skipped_steps` skipped steps in a row.
        """
        assert self._step is not None, "begin was not called"
        # The network may run once per task or part; batch norm must still update once per step.
        statistics = RunningStatistics(self.backbone)
        # Rounded up: at most `accumulate_grad_batches` parts.
        self._step.micro_batch_size = -(-len(tasks) // self.optimization.accumulate_grad_batches)
        self.trained.follow(self.backbone, trainer.optimizers[0])
        scaler, max_norm = gradient_scaler(trainer), self.optimization.clip_grad_norm
        scale = loss_scale(scaler, trainer.strategy.root_device)
        report = self._step.backward(
            statistics.once(losses), tasks, priors=priors, loss_scale=scale, log_snr=log_snr
        )
        self.skipped.last = not report.finite
        if report.finite:
            self.skipped.num_in_a_row = 0
            if self.auxiliary is not None:
                self.auxiliary.backward(loss_scale=scale, max_norm=max_norm)
            clip_gradients_(self.backbone.parameters(), report.grad_norm, max_norm)
            optimizer.step()
            if scheduler is not None:
                self.factory.step(scheduler)
        else:
            self._skip(report, scaler, trainer.optimizers[0])
        self._step.update()
        # Last: a balancer that looks back has run the network again.
        statistics.keep() if report.finite else statistics.restore()
        return report

    def _skip(self, report: BackwardReport, scaler: Any, optimizer: Any) -> None:  # noqa: ANN401
        """Count a step that is not made; give up after too many in a row."""
        self.skipped.num_steps += 1
        if scaler is not None:
            back_off(scaler, optimizer)
            if scaler.get_scale() >= 1:
                return  # probably a float16 overflow, which the smaller scale will avoid
        self.skipped.num_in_a_row += 1
        if self.skipped.num_in_a_row >= self.optimization.max_skipped_steps:
            raise NonFiniteError(
                f"optimization.max_skipped_steps: found {self.skipped.num_in_a_row} steps in a row "
                f"with a NaN or an infinity; losses per task {report.task_losses.tolist()}"
            )
