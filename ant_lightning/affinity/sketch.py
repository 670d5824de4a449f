"""A random projection of gradients that preserves dot products, without a `p x m` matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_CHUNK = 1 << 22  # numbers projected at a time, which bounds the working memory


class HadamardSketch:
    """Projects a vector `[p]` to `[m]` such that dot products are unbiased.

    The vector is cut into blocks `x_b` of m numbers. With the Hadamard matrix `H` (entries ±1) and
    diagonal matrices of random signs `D_b` and `E_b`, the sketch is

        S x = m^-1/2 sum_b E_b H D_b x_b.

    Each `m^-1/2 E_b H D_b` is a rotation, so products within a block are exact. Terms between two
    blocks have mean 0 and variance 1/m, as with a dense matrix of random signs. Hence

        E[Sx · Sy] = x · y,     Var[Sx · Sy] <= (|x|² |y|² + (x · y)²) / m,

    and the cosine `c` of two sketches has the standard error `(1 - c²) / sqrt(m)`. Unlike with a
    sketch that hashes coordinates to m buckets, the error has no heavy tails if a few numbers of
    the gradient are much larger than the rest. A projection takes about `4 p sqrt(m)` operations,
    and the signs two bytes for each parameter.

    Args:
        num_parameters: Length of the vectors `p`.
        sketch_dim: Length of the sketches `m`, a power of two.
        seed: Seed of the signs; only sketches with the same seed can be compared.
        device: Device of the vectors.

    Raises:
        ConfigError: If `sketch_dim` is not a power of two, 2 or more.

    Reference:
        Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 2009.

    Examples:
        >>> import torch
        >>> from ant_lightning.affinity.sketch import HadamardSketch
        >>> sketch = HadamardSketch(1000, sketch_dim=64, seed=0)
        >>> sketch(torch.ones(1000)).shape
        torch.Size([64])
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
        # H of size 2^(i+j) is the Kronecker product of those of sizes 2^i and 2^j, so two small
        # matrix products apply it.
        self._left = _hadamard(log2 // 2).to(device)
        self._right = _hadamard(log2 - log2 // 2).to(device)
        padded = -(-num_parameters // sketch_dim) * sketch_dim
        generator = keyed_generator(seed, "affinity-sketch")
        # The diagonals of all D_b and E_b. One D shared by all blocks would double the variance
        # for vectors whose blocks are equal.
        self._before = _signs(padded, generator).to(device)
        self._after = _signs(padded, generator).to(device)

    def __call__(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " m"]:
        """The sketch of a float32 vector."""
        m = self.sketch_dim
        total = torch.zeros(m, dtype=torch.float32, device=vector.device)
        step = max(1, _CHUNK // m) * m  # whole blocks
        for start in range(0, self.num_parameters, step):
            part = vector[start : start + step]
            part = torch.nn.functional.pad(part, (0, -len(part) % m))
            signed = part * self._before[start : start + len(part)]
            # (A kron B) x is A X B^T for x laid out as the matrix X; Hadamard's are symmetric.
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
