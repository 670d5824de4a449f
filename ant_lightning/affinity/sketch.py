"""A random projection of gradients that keeps dot products, without a `p x m` matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["HadamardSketch"]

_CHUNK = 1 << 22  # numbers that are mixed at a time


class HadamardSketch:
    """Projects `[p]` to `[m]` so that dot products are unbiased: blocks of `m`, mixed and summed.

    The row is cut into blocks `x_b` of m numbers, and with the Hadamard matrix `H` (entries ±1)
    and diagonals of random signs `D_b` and `E_b`

        S x = m^-1/2 sum_b E_b H D_b x_b.

    Each `m^-1/2 E_b H D_b` is a rotation, so products within a block are exact; the terms between
    two blocks have mean 0 and variance 1/m, as if S were a dense matrix of random signs. Hence

        E[Sx · Sy] = x · y,     Var[Sx · Sy] <= (|x|² |y|² + (x · y)²) / m,

    and a cosine `c` of two sketches has standard error `(1 - c²) / sqrt(m)`. Unlike one that
    hashes coordinates to m buckets, the error does not grow tails when a few numbers of the
    gradient are much larger than the rest. Projecting costs about `4 p sqrt(m)` operations, and
    two bytes for each parameter: its signs.

    Args:
        num_parameters: `p`.
        sketch_dim: `m`, a power of two.
        seed: Keys the signs; rows can be compared only if they have the same seed.
        device: Where the rows are.

    Raises:
        ConfigError: If `sketch_dim` is not a power of two, 2 or more.

    Reference:
        Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 2009.
    """

    def __init__(
        self,
        num_parameters: int,
        *,
        sketch_dim: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if sketch_dim < 2 or sketch_dim & (sketch_dim - 1):
            raise ConfigError(f"sketch_dim: must be a power of two, 2 or more, found {sketch_dim}")
        self.num_parameters = num_parameters
        self.sketch_dim = sketch_dim
        log2 = sketch_dim.bit_length() - 1
        # H of size 2^(i+j) is the Kronecker product of two, so that two small products apply it.
        self._left = _hadamard(log2 // 2).to(device)
        self._right = _hadamard(log2 - log2 // 2).to(device)
        padded = -(-num_parameters // sketch_dim) * sketch_dim
        generator = keyed_generator(seed, "affinity-sketch")
        # With one D for all blocks, rows whose blocks are alike would have twice the variance.
        self._before = _signs(padded, generator).to(device)
        self._after = _signs(padded, generator).to(device)

    def __call__(self, row: Float[Tensor, " p"]) -> Float[Tensor, " m"]:
        """The sketch of a float32 row."""
        m = self.sketch_dim
        total = torch.zeros(m, dtype=torch.float32, device=row.device)
        step = max(1, _CHUNK // m) * m
        for start in range(0, self.num_parameters, step):
            part = row[start : start + step]
            part = torch.nn.functional.pad(part, (0, -len(part) % m))
            signed = part * self._before[start : start + len(part)]
            mixed = self._left @ signed.view(-1, len(self._left), len(self._right)) @ self._right
            mixed = mixed.view(-1).mul_(self._after[start : start + len(part)])
            total += mixed.view(-1, m).sum(0)
        return total.div_(m**0.5)


def _hadamard(log2: int) -> Tensor:
    """Sylvester's Hadamard matrix of size `2^log2`."""
    matrix = torch.ones(1, 1)
    for _ in range(log2):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """Random signs, int8."""
    return torch.randint(0, 2, (count,), dtype=torch.int8, generator=generator).mul_(2).sub_(1)
