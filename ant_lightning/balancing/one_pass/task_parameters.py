"""Parameters that have a gradient of their own for each task.

While the network runs, each parameter has the class `TaskParameter` and an attribute `leaf`: the
parameter expanded to `[m, *shape]` for `m` tasks, without a copy. A call of torch with such a
parameter goes to a rule that computes with the one copy and sends the gradients of the tasks to
the leaf. The parameter stays the same object with the same shape, so this works for any closure
over any module, and `torch.compile` traces the rules like the code of the network itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ant_lightning.balancing.one_pass.grouped import expand_to_samples
from ant_lightning.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.utils._pytree import TreeSpec

    from ant_lightning.balancing.one_pass.leaves import Factors


class State:
    """What the rules know of the current pass.

    Attributes:
        sizes: Number of samples of each task, descending; the batch is sorted by task.
        uses: How often each parameter was used, by its id; `None` if not recorded.
        positions: Positions for each sample of layers that have factors, by the weight's id.
        views: Views that were made of parameters, so that they can be given back.
    """

    def __init__(self) -> None:
        self.sizes: tuple[int, ...] = ()
        self.uses: dict[int, int] | None = None
        self.positions: dict[int, int] = {}
        self.views: list[Tensor] = []

    @property
    def num_samples(self) -> int:
        """Size of the first dimension of whatever depends on samples."""
        return sum(self.sizes)


state = State()
# What a layer's function does with the leaves of its parameters; filled by `layers`.
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}

# Properties that are views; all others are constants or say something about the tensor.
_VIEWS = tuple(each.__get__ for each in (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH))  # type: ignore[attr-defined]
_CONSTANTS = {Tensor.detach, torch.detach}
# Functions that may make the first dimension that of the batch.
_EXPANDING = {
    Tensor.expand,
    Tensor.expand_as,
    Tensor.broadcast_to,
    torch.broadcast_to,
    Tensor.repeat,
    Tensor.tile,
    torch.tile,
}


def _dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled() or _is_constant(func):
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    rule = RULES.get(func)
    if rule is not None:
        found = rule(*args, **kwargs)
        if found is not NotImplemented:
            return found
    leaves, spec = tree_flatten((args, kwargs))
    if any(_depends_on_samples(each) for each in leaves):
        return _for_samples(func, leaves, spec)
    return _for_tasks(func, leaves, spec)


def _is_constant(func: Callable[..., Any]) -> bool:
    if getattr(func, "__name__", "") == "__get__":
        return func not in _VIEWS
    return func in _CONSTANTS


class TaskParameter(nn.Parameter):
    """A parameter with an attribute `leaf`, `[m, *shape]`, for the gradients of `m` tasks."""

    leaf: Tensor
    # Of a layer that meets few positions.
    factors: Factors | None
    spare: Tensor | None  # memory that a layer's rule may use for the gradients of the tasks

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        """Make an ordinary parameter: copies have no leaf."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return _dispatch(func, args, kwargs or {})


class TaskView(Tensor):
    """A function of parameters alone, with the attribute `leaf`: its values for each task."""

    leaf: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return _dispatch(func, args, kwargs or {})


def has_leaf(value: object) -> bool:
    """Whether a value is a parameter with a leaf, or a function of such parameters."""
    return isinstance(value, (TaskParameter, TaskView))


def leaf_of(value: Tensor) -> Tensor:
    """`[m, *shape]`: where the gradients of the tasks go. Counts as a use of the parameter."""
    if not torch.compiler.is_compiling() and state.uses is not None:
        state.uses[id(value)] = state.uses.get(id(value), 0) + 1
    return value.leaf  # type: ignore[attr-defined, no-any-return]


def value_of(value: Tensor | None) -> Tensor | None:
    """The value of a parameter as a constant; other tensors as they are."""
    if not has_leaf(value):
        return value
    with DisableTorchFunctionSubclass():
        return value.detach()  # type: ignore[union-attr]


def _depends_on_samples(value: object) -> bool:
    plain = isinstance(value, Tensor) and not has_leaf(value)
    return plain and value.ndim > 0 and value.shape[0] == state.num_samples  # type: ignore[attr-defined]


def _for_tasks(func: Callable[..., Any], flat: Sequence[Any], spec: TreeSpec) -> Any:  # noqa: ANN401
    """Apply a function of parameters and constants to the values of each task."""
    with DisableTorchFunctionSubclass():
        args, kwargs = tree_unflatten(flat, spec)
        value = func(*args, **kwargs)
    outputs, form = tree_flatten(value)
    if not any(isinstance(each, Tensor) and each.is_floating_point() for each in outputs):
        return value  # a shape, a dtype, ...
    for each in flat:
        if isinstance(each, Tensor) and not has_leaf(each) and each.requires_grad:
            raise UnsupportedError(
                "engine: one pass needs the batch as the first dimension of what a parameter is "
                f"combined with, found a tensor of shape {list(each.shape)} in {_name(func)} for "
                f"{state.num_samples} samples"
            )
    found, _ = tree_flatten(_mapped(func, flat, spec, [has_leaf(each) for each in flat]))
    expands = func in _EXPANDING and value.shape[0] == state.num_samples
    if expands and flat[0].shape[: value.ndim - flat[0].ndim + 1] in {(), (1,)}:
        return _own_task(found[0])
    made = [_as_view(plain, leaf) for plain, leaf in zip(outputs, found, strict=True)]
    if not torch.compiler.is_compiling():
        state.views += made
    return tree_unflatten(made, form)


def _as_view(value: Tensor, leaf: Tensor) -> TaskView:
    view = value.as_subclass(TaskView)
    view.leaf = leaf
    return view


def _own_task(values: Tensor) -> Tensor:
    """Of `values [m, b, ...]`, those of each sample's own task, `[b, ...]`."""
    start, parts = 0, []
    for task, size in enumerate(state.sizes):
        parts.append(values[task, start : start + size])
        start += size
    return torch.cat(parts)


def _for_samples(func: Callable[..., Any], flat: Sequence[Any], spec: TreeSpec) -> Any:  # noqa: ANN401
    """Apply a function to each sample, a batch of one, with the parameters of its task."""
    values, mapped = [], []
    for each in flat:
        if has_leaf(each):
            values.append(expand_to_samples(leaf_of(each), value_of(each), state.sizes))  # type: ignore[arg-type]
        else:
            values.append(each[:, None] if _depends_on_samples(each) else each)
        mapped.append(values[-1] is not each)
    output = _mapped(func, values, spec, mapped)
    output = tree_map_only(Tensor, _without_batch_of_one, output)
    if not torch.compiler.is_compiling() and state.uses is not None:
        _check_values(func, flat, spec, output)
    return output


@torch.no_grad()
def _check_values(
    func: Callable[..., Any],
    flat: Sequence[Any],
    spec: TreeSpec,
    found: Any,  # noqa: ANN401
) -> None:
    """Refuse a function that gives a sample something else alone than in its batch."""
    plain = [value_of(each) if has_leaf(each) else each for each in flat]
    args, kwargs = tree_unflatten(plain, spec)
    pairs = zip(tree_flatten(found)[0], tree_flatten(func(*args, **kwargs))[0], strict=True)
    for a, b in pairs:
        # Only rounding may differ.
        same = torch.allclose(a, b, rtol=0, atol=1e-2 * float(b.abs().amax()), equal_nan=True)
        if a.shape != b.shape or not same:
            raise UnsupportedError(
                f"engine: one pass needs functions that do not mix samples, found {_name(func)}"
            )


def _without_batch_of_one(value: Tensor) -> Tensor:
    if value.ndim < 2 or value.shape[1] != 1:
        raise UnsupportedError(
            "engine: one pass needs the batch as the first dimension of what a parameter is "
            f"combined with, found a result of shape {list(value.shape[1:])} for one sample"
        )
    return value[:, 0]


def _mapped(
    func: Callable[..., Any], flat: Sequence[Any], spec: TreeSpec, mapped: Sequence[bool]
) -> Any:  # noqa: ANN401
    """`torch.vmap` of `func` over the tensors among its arguments that are `mapped`."""
    places = [i for i, each in enumerate(mapped) if each]

    def call(*tensors: Tensor) -> Any:  # noqa: ANN401
        filled = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    given = [leaf_of(flat[i]) if has_leaf(flat[i]) else flat[i] for i in places]
    try:
        with DisableTorchFunctionSubclass():
            return torch.vmap(call)(*given)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if torch.compiler.is_compiling():
            raise
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UnsupportedError(
            f"engine: one pass has no rule for a parameter in {_name(func)}: {reason}"
        ) from error


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))
