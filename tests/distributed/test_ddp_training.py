"""Two ranks under stock DDP against one process on the concatenated batch."""

import pytest
import torch
from rank_processes import run_ranks
from tiny_runs import METHODS, PartlyUsed, fit, sgd

LOW = {"precision": "bf16-mixed", "optimizer": sgd}


def every_method(rank):
    exact = {name: fit(name, ranks=2) for name in METHODS}
    return exact, {name: fit(name, ranks=2, **LOW) for name in ("uw", "pcgrad")}


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(every_method, 2, tmp_path_factory.mktemp("ddp"))


def check_ranks_agree_to_the_last_bit(first, second):
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert largest_difference(first["averages"], second["averages"]) == 0
    assert str(first["balancer"]) == str(second["balancer"])
    assert first["num_updates"] == second["num_updates"] == 5


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process_does(two_ranks, method):
    one = fit(method)
    first, second = (exact[method] for exact, _ in two_ranks)
    assert largest_difference(first["weights"], one["weights"]) < 1e-6
    assert largest_difference(first["averages"], one["averages"]) < 1e-6
    torch.testing.assert_close(first["task_weights"], one["task_weights"], rtol=1e-5, atol=1e-7)
    assert first["num_samples"].tolist() == one["num_samples"].tolist()
    if method != "vanilla":
        assert sorted(one["num_samples"].tolist()) == [6, 7, 7]
    check_ranks_agree_to_the_last_bit(first, second)


@pytest.mark.parametrize("method", ["uw", "pcgrad"])
def test_bf16_mixed_differs_by_its_rounding_alone(two_ranks, method):
    one = fit(method, **LOW)
    first, second = (low[method] for _, low in two_ranks)
    start = flat({n: p.detach() for n, p in PartlyUsed().named_parameters()})
    update = flat(one["weights"]) - start
    error = flat(first["weights"]) - flat(one["weights"])
    assert 0 < error.norm() < 0.02 * update.norm()
    check_ranks_agree_to_the_last_bit(first, second)
