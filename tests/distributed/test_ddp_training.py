"""Two ranks under stock DDP against one process on the concatenated batch."""

import pytest
import torch
from rank_processes import run_ranks
from tiny_runs import METHODS, ROUNDING, fit, largest_difference, sgd

# Of one image each, micro-batches are the same however many ranks there are, and so is all that
# bfloat16 rounds, but for a weight now and then that lies between two of its values.
LOW = {"precision": "bf16-mixed", "optimizer": sgd, "batch_size": 8}


def every_method(rank):
    exact = {name: fit(name, ranks=2) for name in METHODS}
    low = {name: fit(name, ranks=2, accumulate_grad_batches=4, **LOW) for name in METHODS}
    return exact, low


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(every_method, 2, tmp_path_factory.mktemp("ddp"))


def check_ranks_agree_to_the_last_bit(first, second):
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert largest_difference(first["averages"], second["averages"]) == 0
    assert str(first["balancer"]) == str(second["balancer"])
    assert first["num_updates"] == second["num_updates"] == 5


def check_two_ranks_equal(ranks, one, limit=ROUNDING):
    first, second = ranks
    assert largest_difference(first["weights"], one["weights"]) < limit
    assert largest_difference(first["averages"], one["averages"]) < limit
    assert largest_difference(one["averages"], one["weights"]) > 10 * limit
    torch.testing.assert_close(first["task_weights"], one["task_weights"], rtol=1e-3, atol=0)
    assert first["num_samples"].tolist() == one["num_samples"].tolist()
    check_ranks_agree_to_the_last_bit(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process_does(two_ranks, method):
    one = fit(method)
    check_two_ranks_equal([exact[method] for exact, _ in two_ranks], one)
    if method != "vanilla":
        assert sorted(one["num_samples"].tolist()) == [6, 7, 7]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process_does_in_bf16_mixed(two_ranks, method):
    one = fit(method, accumulate_grad_batches=8, **LOW)
    exact = fit(method, accumulate_grad_batches=8, **(LOW | {"precision": "32-true"}))
    rounded = largest_difference(one["weights"], exact["weights"])
    assert rounded > 1e-6
    # Thousands of numbers are rounded; few may be rounded in another way.
    check_two_ranks_equal([low[method] for _, low in two_ranks], one, limit=0.2 * rounded)
