"""What one of two ranks refuses or fails at ends for both: none waits for the other."""

import warnings

import pytest
import torch
from rank_processes import run_ranks
from torch import nn

from ant_lightning import ConfigError, MultiTaskStep, PCGrad
from ant_lightning.balancing import Loop, OnePass, UnsupportedError, auto

K = 3
TASKS = torch.tensor([0, 2, 1, 0, 0, 2, 1, 0, 2, 2, 2, 1])
PARTS = [(0, 5), (5, 12)]  # of the two ranks


class Network(nn.Module):
    """Only a batch of rank 1 has a sample above 10, and meets the branch."""

    def __init__(self, branch):
        super().__init__()
        torch.manual_seed(0)
        self.branch = branch
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.double()
        nn.init.zeros_(self.last.weight)  # the checks reach `first` in the second step only

    def forward(self, x):
        large = (x > 10).any(1, keepdim=True)
        x = self.first(x).tanh()
        if large.any():
            x = torch.where(large, self.branch(self, x), x)
        return self.last(x)


def no_rule(self, x):
    return x * self.last.weight.requires_grad_().sum()


def mixed(self, x):
    return x + self.first(x.mean(0)).unsqueeze(0).expand_as(x)


def hidden(self, x):
    # A use that torch is not told of: only the end of the backward pass shows it.
    with torch._C.DisableTorchFunctionSubclass():
        return x * self.last.bias.sum()


def twice(self, x):
    return self.first(x).tanh()


def broken(self, x):
    raise FloatingPointError("no such luck\nat all")


def data(rank):
    x = torch.randn(len(TASKS), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[8] = 40.0
    part = slice(*PARTS[rank]) if rank is not None else slice(None)
    return x[part], TASKS[part]


def trained(rank, branch, *, engine="auto", later=0, steps=3, micro_batch_size=None):
    """Weights after some steps, the engine that was used, and the messages of warnings.

    From step `later` on, the last rank's batch meets the branch.
    """
    x, tasks = data(rank)
    network = Network(branch)
    step = MultiTaskStep(
        network, PCGrad(K, seed=1), engine=engine, micro_batch_size=micro_batch_size
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(steps):
            inputs = x if number >= later else x.clamp(max=1)

            def losses(rows, inputs=inputs):
                return (network(inputs[rows]) - 1).square().mean(1) * (1 + tasks[rows])

            step.backward(losses, tasks)
            with torch.no_grad():
                for p in network.parameters():
                    p -= 0.05 * p.grad  # noqa: PLW2901
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    return weights, type(getattr(step.engine, "used", step.engine)), [str(w.message) for w in said]


BRANCHES = {"no rule": no_rule, "mixed": mixed, "hidden": hidden}


def fall_back(rank):
    found = {name: trained(rank, branch) for name, branch in BRANCHES.items()}
    # The second step is checked as well: no gradient has reached `first` before.
    found["later"] = trained(rank, no_rule, later=1)
    # Used once on one rank and twice on the other, with and without factors.
    found["twice"] = trained(rank, twice)
    # Rank 1 alone has more samples than one pass takes.
    found["parts"] = trained(rank, twice, micro_batch_size=5)
    # Rank 1 alone has enough work for the loop; the mean of both is below it, and then above.
    for name, in_all in (("little work", 50), ("much work", 45)):
        auto._CPU = in_all, 0
        found[name] = trained(rank, twice)
    return found


def errors(rank):
    found = []
    for branch, settings in [
        (broken, {}),
        (no_rule, {"engine": "one_pass"}),
        (hidden, {"engine": "one_pass"}),
    ]:
        try:
            trained(rank, branch, **settings)
        except Exception as error:
            found.append((type(error), str(error)))
    return found


def too_late(rank):
    trained(rank, no_rule, later=2)


def other_positions(rank):
    """Rank 1 has two tokens a sample in the third step, and one before."""
    layer = nn.Linear(64, 64)
    step = MultiTaskStep(layer, PCGrad(K))
    for tokens in (1, 1, 1 + rank):
        x = torch.ones(6, tokens, 64)
        step.backward(lambda rows, x=x: layer(x[rows]).square().mean((1, 2)), torch.arange(6) % K)


@pytest.fixture(scope="module")
def fallen(tmp_path_factory):
    return run_ranks(fall_back, 2, tmp_path_factory.mktemp("agreement"))


def expected(name):
    branch = BRANCHES.get(name, no_rule if name == "later" else twice)
    return trained(None, branch, engine="loop", later=int(name == "later"))[0]


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("no rule", Loop),
        ("mixed", Loop),
        ("hidden", Loop),
        ("later", Loop),
        ("twice", OnePass),
        ("parts", Loop),
        ("little work", OnePass),
        ("much work", Loop),
    ],
)
def test_two_ranks_take_the_same_engine(fallen, name, engine):
    first, second = (rank[name] for rank in fallen)
    assert first[1] is second[1] is engine
    assert torch.equal(first[0], second[0])
    if name != "mixed":  # whose samples depend on what is in their batch
        torch.testing.assert_close(first[0], expected(name), rtol=1e-9, atol=1e-9)
    assert second[2] == []
    refused = name in {*BRANCHES, "later"}
    assert len(first[2]) == refused
    assert not refused or first[2][0].endswith("; auto uses the loop from now on")


def test_an_error_of_one_rank_stops_both(tmp_path):
    first, second = run_ranks(errors, 2, tmp_path)
    assert first[0] == (RuntimeError, "rank 1 failed, and all ranks stop: no such luck at all")
    assert second[0] == (FloatingPointError, "no such luck\nat all")
    for one, other in zip(first[1:], second[1:], strict=True):
        assert one == other
        assert one[0] is UnsupportedError


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (too_late, "no rule for a parameter in requires_grad_"),
        (other_positions, "found another number for a weight of shape [64, 64]"),
    ],
)
def test_a_refusal_after_the_first_steps_says_what_to_do(tmp_path, run, words):
    (_, _), (_, fault) = run_ranks(run, 2, tmp_path, check=False)
    assert words in fault
    assert ConfigError.__name__ in fault
    assert "in a later one; use the loop from the start" in fault
