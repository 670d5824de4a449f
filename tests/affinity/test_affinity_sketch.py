import numpy as np
import pytest
import torch

from ant_lightning import ConfigError
from ant_lightning.affinity.sketch import HadamardSketch


def sketched(rows, *, sketch_dim, seed):
    sketch = HadamardSketch(rows.shape[1], sketch_dim=sketch_dim, seed=seed)
    return torch.stack([sketch(row) for row in rows.float()]).double()


def one_hot_pair(p):
    """Two rows that share nothing, with all their length in one number each."""
    rows = torch.zeros(2, p, dtype=torch.float64)
    rows[0, 3], rows[1, p - 5] = 1, 1
    return rows


def repeated_pair(p):
    """Rows whose blocks are all alike: equal, and with the sign of every second block changed."""
    block = torch.ones(16, dtype=torch.float64)
    even = block.repeat(p // 16)
    odd = torch.cat([block, -block]).repeat(p // 32)
    return torch.stack([even, odd]) / p**0.5


def random_pair(p):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, p, dtype=torch.float64, generator=generator)
    x, y = x / x.norm(), y / y.norm()
    mixed = 0.6 * x + 0.8 * y
    return torch.stack([x, mixed / mixed.norm()])


@pytest.mark.parametrize("make", [one_hot_pair, repeated_pair, random_pair])
def test_dot_products_are_unbiased_with_the_stated_variance(make):
    p, m, num_seeds = 320, 16, 400
    x, y = rows = make(p)
    dots = []
    for seed in range(num_seeds):
        a, b = sketched(rows, sketch_dim=m, seed=seed)
        dots.append([a @ b, a @ a])
    found = np.array(dots)
    exact = np.array([float(x @ y), float(x @ x)])
    bound = np.array([1 + exact[0] ** 2, 2.0]) / m
    assert (np.abs(found.mean(0) - exact) < 4 * np.sqrt(bound / num_seeds)).all()
    # The sample variance of 400 draws is within a third of its expectation.
    assert (found.var(0) < 1.35 * bound).all()


def test_cosines_of_many_rows_are_within_four_standard_errors():
    n, p, m = 40, 20_000, 1024
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(p, dtype=torch.float64, generator=generator)
    rows = torch.randn(n, p, dtype=torch.float64, generator=generator)
    rows[: n // 2] += common
    rows[::5, : p // 50] *= 30  # a few numbers that are much larger than the rest
    unit = rows / rows.norm(dim=1, keepdim=True)
    sketches = sketched(rows, sketch_dim=m, seed=0)
    sketches = sketches / sketches.norm(dim=1, keepdim=True)
    error = (sketches @ sketches.T - unit @ unit.T).abs()
    assert 0 < error.max() <= 4 / m**0.5


@pytest.mark.parametrize("sketch_dim", [64, 128])
def test_exact_if_no_longer_than_the_sketch(sketch_dim):
    rows = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = sketched(rows, sketch_dim=sketch_dim, seed=5)
    torch.testing.assert_close(found @ found.T, rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_linear_in_the_row_and_of_the_seed_alone():
    rows = torch.randn(2, 1000, generator=torch.Generator().manual_seed(2)).double()
    three = torch.cat([rows, (2 * rows[0] - rows[1])[None]])
    found = sketched(three, sketch_dim=32, seed=5)
    torch.testing.assert_close(found[2], 2 * found[0] - found[1], rtol=0, atol=1e-4)
    assert torch.equal(found, sketched(three, sketch_dim=32, seed=5))
    assert not torch.allclose(found, sketched(three, sketch_dim=32, seed=6))


def test_long_rows_are_mixed_in_parts_that_join():
    p, m = (1 << 22) + 777, 2
    row = torch.randn(p, generator=torch.Generator().manual_seed(2))
    sketch = HadamardSketch(p, sketch_dim=m, seed=0)
    whole = sketch(row)
    # Linear: the two sides of the border between parts add up to the whole.
    left, right = row.clone(), row.clone()
    left[(1 << 22) - 9 :] = 0
    right[: (1 << 22) - 9] = 0
    torch.testing.assert_close(sketch(left) + sketch(right), whole, rtol=1e-4, atol=1e-2)
    assert sketch(right).abs().sum() > 0


@pytest.mark.parametrize("sketch_dim", [0, 1, 3, 100, -4])
def test_sketch_dim_is_a_power_of_two(sketch_dim):
    with pytest.raises(ConfigError, match=f"sketch_dim: must be a power of two.*{sketch_dim}"):
        HadamardSketch(10, sketch_dim=sketch_dim, seed=0)
