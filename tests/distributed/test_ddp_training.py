"""Two ranks under stock DDP against one process on the concatenated batch."""

import pytest
import torch
from rank_processes import run_ranks
from tiny_runs import METHODS, fit


def every_method(rank, precision):
    return {name: fit(name, ranks=2, precision=precision) for name in METHODS}


def largest_difference(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(every_method, 2, tmp_path_factory.mktemp("ddp"), "32-true")


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process_does(two_ranks, method):
    one = fit(method)
    first, second = (rank[method] for rank in two_ranks)
    assert largest_difference(first["weights"], one["weights"]) < 1e-6
    assert largest_difference(first["averages"], one["averages"]) < 1e-6
    torch.testing.assert_close(first["task_weights"], one["task_weights"], rtol=1e-5, atol=1e-7)
    assert first["num_samples"].tolist() == one["num_samples"].tolist()
    if method != "vanilla":
        assert sorted(one["num_samples"].tolist()) == [6, 7, 7]
    # And the ranks agree to the last bit.
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert largest_difference(first["averages"], second["averages"]) == 0
    assert str(first["balancer"]) == str(second["balancer"])
    assert first["num_updates"] == second["num_updates"] == 5
