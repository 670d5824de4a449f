"""A network of ours as one of diffusers: its class and configuration, and each weight from ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Row = tuple[str, str | None, str]


@dataclass(frozen=True)
class DiffusersLayout:
    """A network of diffusers that computes the same as one of ours.

    Attributes:
        class_name: `DiTTransformer2DModel`, `UNet2DModel` or `UNet2DConditionModel`. The first is
            exact only with `downscale_freq_shift = 0` in its time embedding.
        config: Arguments of the class. `DiTTransformer2DModel` itself takes no `routing` and no
            rectangles; the class of an export does.
        rows: For each weight of the class: its name, our name (`None` for a constant), and how it
            is made from ours: `copy`; `rows j/3`, `new_order j`, `legacy j heads=h` (a third of
            `qkv`); `squeeze`; `pad_rows n`; `spread k` (frequencies of the time); `zeros RxC`,
            `const NAME C` (what we do not have).
    """

    class_name: str
    config: dict[str, Any]
    rows: tuple[Row, ...]

    def to_diffusers(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of diffusers' network from ours, by bare names."""
        found = {}
        for theirs, ours, operation in self.rows:
            found[theirs] = _made(operation, None if ours is None else weights[ours])
        return found

    def from_diffusers(
        self, weights: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Our weights from those of diffusers' network; the inverse of `to_diffusers`.

        Args:
            weights: By the names of diffusers.
            shapes: The shapes of our weights; what has no counterpart there is left out.

        Raises:
            ConfigError: If a constant of ours has another value there.
        """
        found: dict[str, Tensor] = {}
        thirds: dict[str, dict[int, Tensor]] = {}
        for theirs, ours, operation in self.rows:
            kind, *rest = operation.split()
            if theirs not in weights:
                continue
            value = weights[theirs]
            if ours is None:
                constant = _made(operation, None)
                if kind == "const" and not torch.allclose(value.float(), constant):
                    raise ConfigError(
                        f"weights: {theirs} must be the constant {rest[0]}, found another"
                    )
            elif kind in {"rows", "new_order", "legacy"}:
                thirds.setdefault(ours, {})[int(rest[0][0])] = value
                if len(thirds[ours]) == 3:
                    found[ours] = _joined(operation, thirds[ours]).reshape(*shapes[ours])
            elif kind == "spread":
                found[ours] = value.unflatten(1, (2, -1))[..., :: int(rest[0])].flatten(1)
            elif kind == "pad_rows" and len(value) == int(rest[0]):
                found[ours] = value[: shapes[ours][0]]
            else:
                found[ours] = value.unsqueeze(-1) if kind == "squeeze" else value
        return found


def _made(operation: str, value: Tensor | None) -> Tensor:
    """One weight of diffusers, from ours or from nothing."""
    kind, *rest = operation.split()
    if value is None:
        return _constant(kind, rest)
    if kind == "squeeze":
        value = value.squeeze(-1)
    elif kind in {"rows", "new_order", "legacy"}:
        third = int(rest[0][0])
        if kind == "legacy":
            heads = int(rest[1].removeprefix("heads="))
            value = value.unflatten(0, (heads, 3, -1))[:, third].flatten(0, 1)
        else:
            value = value.unflatten(0, (3, -1))[third]
        value = value.squeeze(-1) if value.ndim == 3 else value  # of a convolution
    elif kind == "pad_rows":
        missing = int(rest[0]) - len(value)
        value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    elif kind == "spread":
        halves = value.unflatten(1, (2, -1))
        spread = value.new_zeros(len(value), 2, halves.shape[2] * int(rest[0]))
        spread[..., :: int(rest[0])] = halves
        value = spread.flatten(1)
    return value


def _constant(kind: str, rest: Sequence[str]) -> Tensor:
    """A weight of diffusers that we do not have."""
    if kind == "zeros":
        return torch.zeros(*map(int, rest[0].split("x")))
    channels = int(rest[1])
    if rest[0] == "zero_bias":
        return torch.zeros(channels)
    # On each channel alone: the 2x2 mean as a part of a 3x3 kernel, or the identity.
    kernel, each = torch.zeros(channels, channels, 3, 3), torch.arange(channels)
    if rest[0] == "avg_kernel":
        kernel[each, each, 1:, 1:] = 0.25
    else:
        kernel[each, each, 1, 1] = 1.0
    return kernel


def _joined(operation: str, thirds: Mapping[int, Tensor]) -> Tensor:
    """The fused `qkv` from its thirds."""
    parts = [thirds[index] for index in range(3)]
    if operation.startswith("legacy"):
        heads = int(operation.rpartition("=")[2])
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
    return torch.cat(parts)
