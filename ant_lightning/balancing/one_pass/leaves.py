"""The leaves of the graph that the gradients of the tasks go to."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

__all__ = ["Leaves", "Receiver"]


class Receiver(Protocol):
    """Takes the gradients of the tasks as they arrive in the backward pass."""

    def receive(self, index: int, block: Tensor) -> None:
        """Take `[m, *shape]`: the gradients of parameter `index` for each task."""

    def receive_factors(self, index: int, left: Tensor, right: Tensor) -> None:
        """Take the two factors of the gradient of parameter `index`."""


class Leaves:
    """For each parameter a leaf `[m, *shape]` for the gradients of `m` tasks, or two for factors.

    Attributes:
        dense: The leaf of each parameter: the parameter itself, expanded without a copy.
        receiver: Is given the gradients as they arrive.
        scale: What they are divided by first.
    """

    def __init__(self) -> None:
        self.dense: list[Tensor] = []
        self.receiver: Receiver | None = None
        self.scale: Tensor | float = 1.0
        self._made_for: list[object] = []
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}  # by the place of the weight
        self._first: dict[int, Tensor] = {}  # a factor that waits for the other
        self._given: set[int] = set()

    def prepare(self, parameters: Sequence[nn.Parameter], num_tasks: int) -> None:
        """Make the leaves, unless they are those of the last step."""
        # Kept over the steps: a CUDA graph reads parameters from the same place in each.
        key = [num_tasks, *((id(p), p.data_ptr(), p.dtype, p.stride()) for p in parameters)]
        if key == self._made_for:
            return
        self._made_for, self._factors = key, {}
        self.dense = [p.detach().expand(num_tasks, *p.shape).requires_grad_() for p in parameters]
        for index, leaf in enumerate(self.dense):
            _send(leaf, partial(self._arrived, index))

    def factor(self, positions: Mapping[int, int]) -> None:
        """Make leaves for the factors of these weights, which meet so many positions in all."""
        if {index: len(left) for index, (left, _) in self._factors.items()} == positions:
            return
        self._factors = {}
        for index, count in positions.items():
            p = self.dense[index][0]
            dtype = torch.promote_types(p.dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=p.device)
            left, right = (zero.expand(count, size).detach().requires_grad_() for size in p.shape)
            self._factors[index] = left, right
            _send(left, partial(self._factor_arrived, index, True))
            _send(right, partial(self._factor_arrived, index, False))

    def of(self, index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The leaf of a parameter, and those of its factors."""
        left, right = self._factors.get(index, (None, None))
        return self.dense[index], left, right

    @property
    def every(self) -> list[Tensor]:
        """All leaves."""
        return [*self.dense, *(each for pair in self._factors.values() for each in pair)]

    def begin(self, receiver: Receiver, scale: Tensor | float) -> None:
        """Begin a backward pass."""
        self.receiver, self.scale = receiver, scale
        self._first.clear()
        self._given.clear()

    def end(self) -> None:
        """End a backward pass: weights that no loss depends on have factors of zero."""
        for index, (left, right) in self._factors.items():
            if index not in self._given and self.receiver is not None:
                self.receiver.receive_factors(index, left.detach(), right.detach())
        self.receiver = None

    def _arrived(self, index: int, grad: Tensor) -> None:
        assert self.receiver is not None
        self.receiver.receive(index, self._unscaled(grad))

    def _factor_arrived(self, index: int, is_left: bool, grad: Tensor) -> None:
        other = self._first.pop(index, None)
        if other is None:
            self._first[index] = grad
            return
        assert self.receiver is not None
        self._given.add(index)
        left, right = (grad, other) if is_left else (other, grad)
        self.receiver.receive_factors(index, self._unscaled(left), right)

    def _unscaled(self, grad: Tensor) -> Tensor:
        scaled = isinstance(self.scale, torch.Tensor) or self.scale != 1.0
        return grad / self.scale if scaled else grad  # not in place: layers may share a gradient


def _send(leaf: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Have `receive` take the gradient of a leaf as soon as it is known."""

    def hook(grad: Tensor | None) -> Tensor | None:
        if grad is None:  # a compiled network says so of a leaf that no loss depends on
            return None
        receive(grad)
        # In its place autograd keeps one number, so that `receive` may free the gradient.
        return grad.new_zeros(()).expand(grad.shape)

    leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    if leaf.is_cuda and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].mark_static_address(leaf)
