"""Task gradients by `torch.vmap`: each task gets its own view of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ant_lightning.balancing.engines import Engine, UnsupportedError, check_whole, new_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.batch import TaskBatch
    from ant_lightning.balancing.gradients import DenseTaskGradients

__all__ = ["Vmap", "write_rows"]

# PyTorch's messages for layers that vmap cannot run or differentiate.
_NO_RULE = (
    "Batch norm got a batched",
    "Batching rule not implemented",
    "vmap: ",
    "is not implemented for sparse tensors",
)


class Vmap(Engine):
    """One pass over all tasks with `torch.vmap`, on parameters that are expanded but not copied.

    It works for any network that `vmap` can run, including layers that mix the samples of a task.
    Smaller tasks are padded with repeated samples of weight 0, which cost as much as the others.
    While the gradients are copied into the rows they exist twice: `2 k p` numbers. Gradient
    checkpointing and `torch.compile` are not supported.
    """

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> DenseTaskGradients:
        """Gradients of all tasks, from one pass.

        Raises:
            UnsupportedError: If vmap cannot reach a use of a parameter, or cannot run a layer.
            ConfigError: If the batch is to be computed in parts.
        """
        check_whole(batch, "Vmap")
        present = batch.present
        picks, weights = _padded(batch, present)
        # `[m, *shape]` without a copy: all tasks read the same memory, but as a leaf each has a
        # gradient of its own.
        leaves = [p.detach().expand(len(present), *p.shape).requires_grad_() for p in batch.shared]

        def losses_of_task(values: list[Tensor], of_task: Tensor) -> Tensor:
            with _Replaced(batch.shared, values):
                return batch.evaluate(of_task)

        # Fused attention has no batching rule on CPUs, and refuses vmap's tensors on GPUs.
        try:
            with sdpa_kernel(SDPBackend.MATH):
                values = torch.vmap(losses_of_task, randomness="different")(leaves, picks)
            loss = (values * weights.to(values.dtype)).sum() * batch.loss_scale
            # A gradient of a parameter itself means a use that `_Replaced` did not see.
            inputs = [*leaves, *batch.shared]
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            if not any(words in reason for words in _NO_RULE):
                raise
            raise UnsupportedError(
                f"engine: vmap has no rule for a layer, so it must be Loop or Auto: {reason}"
            ) from error
        if any(g is not None for g in grads[len(leaves) :]):
            raise UnsupportedError(
                "engine: vmap needs every parameter to be an argument of a torch function, found "
                "one that is used in another way"
            )
        gradients = rows or new_rows(batch)

        def fill(blocks: list[Tensor]) -> None:
            # Not strict: the gradients of `batch.shared` follow, which are all `None`.
            for block, grad in zip(blocks, grads, strict=False):
                block.zero_() if grad is None else block.copy_(grad)
            if batch.is_scaled:
                torch._foreach_div_(blocks, batch.loss_scale)

        gradients.write_together(present, fill, samples=batch.samples)
        real = weights > 0
        batch.record(picks[real.to(picks.device)], values[real])
        return gradients


class _Replaced(TorchFunctionMode):
    """Replaces `parameters` by `values` in all calls of torch functions."""

    def __init__(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._values = {id(p): value for p, value in zip(parameters, values, strict=True)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        get = self._values.get
        args = tuple(get(id(a), a) for a in args)
        kwargs = {name: get(id(a), a) for name, a in (kwargs or {}).items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(*args: Any, **settings: Any) -> Tensor:
    """Attention with inputs in autocast's dtype, and autocast off inside.

    Autocast would otherwise cast the softmax in the middle of `SDPBackend.MATH` again.
    """
    query: Tensor = args[0] if args else settings["query"]
    device = query.device.type
    cast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def in_dtype(value: Any) -> Any:  # noqa: ANN401
        single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(dtype) if cast and single else value

    with torch.autocast(device, enabled=False):
        return F.scaled_dot_product_attention(
            *map(in_dtype, args), **{name: in_dtype(value) for name, value in settings.items()}
        )


def write_rows(sink: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `sink[rows] = values`, detached; this also works in `losses` that `Vmap` calls."""
    _WriteRows.apply(values.detach(), rows, sink)


class _WriteRows(torch.autograd.Function):
    """A write into a tensor that all tasks share, which `torch.vmap` refuses to do itself."""

    @staticmethod
    def forward(values: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
        sink[rows] = values.to(sink)
        # A Function must return a tensor; nothing reads this one.
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        """Save nothing: there is no gradient."""

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[int | None, ...],
        values: Tensor,
        rows: Tensor,
        sink: Tensor,
    ) -> tuple[Tensor, None]:
        # Outside vmap's level: `values` and `rows` are of all tasks, and one write serves them all.
        return _WriteRows.apply(
            values.movedim(in_dims[0] or 0, 0), rows.movedim(in_dims[1] or 0, 0), sink
        ), None


def _padded(batch: TaskBatch, present: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of each task, padded to one length, and the weights of their losses, `[m, n]` each.

    The weight is 1 over the number of samples of the task on all ranks, and 0 for padding.
    """
    device = batch.order.device
    spans = [(batch.starts[task], batch.starts[task + 1]) for task in present]
    longest = max(stop - start for start, stop in spans)
    offsets = torch.arange(longest)
    starts = torch.tensor([start for start, _ in spans])
    sizes = torch.tensor([stop - start for start, stop in spans])
    # Padding repeats the last sample of the task.
    positions = starts[:, None] + offsets.minimum(sizes[:, None] - 1)
    picks = batch.order[positions.to(device)]
    real = (offsets < sizes[:, None]).to(batch.tasks.device)
    means = 1 / batch.num_samples[torch.tensor(present, device=real.device)]
    return picks, real * means[:, None]
