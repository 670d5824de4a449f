"""What a network is given beside image and time: labels, or named tensors, one entry an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

# Labels `[b]`, named tensors `[b, ...]`, or nothing.
Condition: TypeAlias = Tensor | Mapping[str, Tensor] | None
# What stands for "no condition": a label, or a tensor of each name for one image. A name without a
# null value has `None`.
NullCondition: TypeAlias = int | Mapping[str, Tensor | None] | None


def map_condition(
    function: Callable[..., Tensor], condition: Condition, *others: Condition | NullCondition
) -> Condition:
    """Apply a function to every entry, and to the entries of the same name in `others`.

    Examples:
        >>> import torch
        >>> from ant_lightning.diffusion.condition import map_condition
        >>> text = {"text": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3)}
        >>> doubled = map_condition(lambda a, b: torch.cat([a, b]), text, text)
        >>> {name: list(each.shape) for name, each in doubled.items()}
        {'text': [4, 3, 4], 'mask': [4, 3]}
    """
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return function(condition, *others)
    return {
        name: function(each, *(other[name] for other in others))  # type: ignore[index]
        for name, each in condition.items()
    }


def rows_of(condition: Condition, rows: Tensor | slice) -> Condition:
    """The condition of some of the images."""
    return map_condition(lambda each: each[rows], condition)


def null_like(condition: Condition, null: NullCondition) -> Condition:
    """The null condition for as many images as `condition` is for.

    A null tensor has the shape of one image's entry, or one that broadcasts to it.
    """

    def one(each: Tensor, value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(each).expand_as(each)
        return torch.full_like(each, value)

    return map_condition(one, condition, null)
