"""The leaves of the graph that the gradients of the tasks go to."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch._C import DisableTorchFunctionSubclass

from ant_lightning.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn


class Receiver(Protocol):
    """Takes the gradients of the tasks as they arrive in the backward pass."""

    def receive(self, index: int, block: Tensor) -> None:
        """Take `[m, *shape]`: the gradients of parameter `index` for each task."""

    def receive_factors(self, index: int, left: Tensor, right: Tensor) -> None:
        """Take the two factors of the gradient of parameter `index`."""


class Factors:
    """Two leaves whose gradients are the factors of the gradient of one weight.

    Autograd would add the factors of two uses, and the product of sums is another number. So only
    the first use in a forward pass has them, in a compiled network too: it is compiled once more
    for a use that finds them used, and the gradient of that use is refused.

    Attributes:
        left: Its gradient is that of the layer's output, `[positions, outputs]`.
        right: Its gradient is the layer's input, `[positions, inputs]`.
        used: Whether a use in this forward pass has them.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right
        self.used = False


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
        self._factors: dict[int, Factors] = {}  # by the place of the weight
        self._first: dict[int, Tensor] = {}  # a factor that waits for the other
        self._given: set[int] = set()
        self._used: set[int] = set()  # places of weights whose factors are in the graph

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
        if {index: len(each.left) for index, each in self._factors.items()} == positions:
            return
        self._factors = {}
        for index, count in positions.items():
            p = self.dense[index][0]
            dtype = torch.promote_types(p.dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=p.device)
            left, right = (zero.expand(count, size).detach().requires_grad_() for size in p.shape)
            self._factors[index] = Factors(left, right)
            _send(left, partial(self._factor_arrived, index, True))
            _send(right, partial(self._factor_arrived, index, False))

    def of(self, index: int) -> tuple[Tensor, Factors | None]:
        """The leaf of a parameter, and those of its factors, unused."""
        factors = self._factors.get(index)
        if factors is not None:
            factors.used = False
        return self.dense[index], factors

    @property
    def every(self) -> list[Tensor]:
        """All leaves."""
        factors = self._factors.values()
        return [*self.dense, *(leaf for each in factors for leaf in (each.left, each.right))]

    def begin(self, receiver: Receiver, scale: Tensor | float) -> None:
        """Begin a backward pass."""
        self.receiver, self.scale = receiver, scale
        self._first.clear()
        self._given.clear()
        self._used = {index for index, each in self._factors.items() if each.used}
        for each in self._factors.values():
            each.used = False  # gradient checkpointing computes layers again, as in the first pass

    def end(self) -> None:
        """End a backward pass: weights that no loss depends on have factors of zero."""
        for index, each in self._factors.items():
            if index not in self._given and self.receiver is not None:
                self.receiver.receive_factors(index, each.left.detach(), each.right.detach())
        self.receiver = None

    def _arrived(self, index: int, grad: Tensor) -> None:
        assert self.receiver is not None
        if index in self._used:
            raise UnsupportedError(
                "engine: one pass needs a network that uses a weight equally often in each step, "
                f"found one of shape {list(grad.shape[1:])} that is used again"
            )
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
        with DisableTorchFunctionSubclass():  # the parameters that are asked for their shapes
            receive(grad)
        # In its place autograd keeps one number, so that `receive` may free the gradient.
        return grad.new_zeros(()).expand(grad.shape)

    leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    if leaf.is_cuda and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].mark_static_address(leaf)
