"""Selects and checks the parameters with respect to which losses are differentiated."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.parameter import is_lazy

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

P = TypeVar("P", bound="Tensor")

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def trained_parameters(parameters: Iterable[P]) -> list[P]:
    """The parameters that need a gradient, each once, in order of first appearance.

    They may have different dtypes, be empty or transposed, or be slices of larger tensors. Call
    this again for every step: parameters may be frozen, thawed or cast in between.

    Raises:
        ConfigError: If there are none, or one is complex, sparse, not yet initialised, not a leaf
            of the graph, or has several elements sharing one memory location.
    """
    found: dict[int, P] = {}
    for index, p in enumerate(parameters):
        if p.requires_grad and id(p) not in found:
            _check(p, index)
            found[id(p)] = p
    if not found:
        raise ConfigError("parameters: must have at least one that needs a gradient, found 0")
    return list(found.values())


def same_tensors(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether both have the same tensor objects in the same order."""
    return [id(each) for each in left] == [id(each) for each in right]


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """Remove every `.grad`."""
    # Of frozen parameters too: otherwise the optimizer would reuse the last step's gradient. This
    # also frees the last step's task gradients, of which `.grad` may be a view.
    for p in parameters:
        p.grad = None


def names_of(parameters: Iterable[Tensor], model: nn.Module) -> list[str]:
    """The name of each parameter in `model`, without those of wrappers; empty for others."""
    known = {}
    for name, p in model.named_parameters():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        known[id(p)] = ".".join(parts)
    return [known.get(id(p), "") for p in parameters]


@lru_cache(maxsize=8)
def matching(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the names that one of the patterns fits, `*` standing for any characters.

    Raises:
        ConfigError: If a pattern fits none.

    Examples:
        >>> from ant_lightning.balancing.parameters import matching
        >>> matching(("blocks.1.*", "out"), ("blocks.0.w", "blocks.1.w", "blocks.1.b", "out"))
        (1, 2, 3)
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = f"{names[0]} .. {names[-1]}" if names else "none; names need a MultiTaskStep"
            raise ConfigError(
                "shared_parameters: must be names of parameters that are trained, or patterns of "
                f"them, found {pattern!r} among {known}"
            )
    pairs = enumerate(names)
    return tuple(i for i, name in pairs if any(fnmatchcase(name, each) for each in patterns))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one contiguous block of memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1  # without gaps, each stride is the product of the sizes with smaller strides
    for stride, size in _steps(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _check(p: Tensor, index: int) -> None:
    """Refuse a parameter that cannot be trained; `index` is its place in the caller's list."""
    if is_lazy(p):
        raise ConfigError(
            f"parameters: each must have a shape, found parameter {index}, which has none yet; "
            "run the network once before"
        )
    if p.dtype not in _DTYPES:
        hint = ""
        if p.is_complex():
            hint = "; keep its torch.view_as_real, and apply torch.view_as_complex to it in forward"
        raise ConfigError(
            "parameters: each must be float16, bfloat16, float32 or float64, "
            f"found {_described(p, index)}{hint}"
        )
    if p.layout != torch.strided:
        raise ConfigError(
            f"parameters: each must be stored as torch.strided, found parameter {index} of shape "
            f"{list(p.shape)} and layout {p.layout}"
        )
    if not p.is_leaf:
        raise ConfigError(
            "parameters: each must be a leaf, not the result of an operation, "
            f"found {_described(p, index)} made by {type(p.grad_fn).__name__}"
        )
    # An optimizer's in-place step would update a shared element several times. PyTorch's optimizers
    # refuse only some of these parameters.
    if not p.is_contiguous() and _overlaps(p):
        raise ConfigError(
            "parameters: each element must have its own place in memory, "
            f"found {_described(p, index)}; make it of a clone()"
        )


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each dimension with more than one element, sorted by stride."""
    if not tensor.numel():
        return []
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in steps if size > 1)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory; also true for interleaved dimensions, where they might."""
    reach = 0  # largest offset in the dimensions with smaller strides
    for stride, size in _steps(tensor):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _described(p: Tensor, index: int) -> str:
    dtype = str(p.dtype).removeprefix("torch.")
    return f"parameter {index} of shape {list(p.shape)}, dtype {dtype}, strides {list(p.stride())}"
