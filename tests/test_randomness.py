"""Keyed generators depend on their key alone."""

import torch
from hypothesis import given, settings, strategies as st

from ant_lightning.randomness import ImageNoise, keyed_generator, keyed_seed

keys = st.tuples(st.integers(0, 99), st.sampled_from(["noise", "order"]), st.integers(0, 99))


@settings(max_examples=50, deadline=None)
@given(keys, keys)
def test_equal_keys_give_equal_draws_and_different_keys_different_ones(a, b):
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in (a, b)]
    assert torch.equal(*draws) == (a == b)


def test_seeds_fit_a_generator():
    assert all(0 <= keyed_seed(0, "x", i) < 2**63 for i in range(1000))


def test_image_noise_does_not_depend_on_the_batch():
    together = ImageNoise([4, 7, 9], shape=(1, 2, 2), seed=5)
    alone = ImageNoise([7], shape=(1, 2, 2), seed=5)
    for _ in range(3):
        assert torch.equal(together()[1:2], alone())


def test_data_and_model_take_the_seed_of_the_run(monkeypatch):
    from ant_lightning import DigitsData

    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert DigitsData().seed == 7
    assert DigitsData(seed=3).seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert DigitsData().seed == 0
