"""Every balancer on the configs of flow matching and EDM: two ranks resume, and equal one."""

import pytest
import torch
from rank_processes import run_ranks
from test_flow_and_edm_on_ranks import CONFIGS, check_resumed, fit_and_resume, fit_and_save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BALANCERS = sorted(path.stem for path in (CONFIGS / "balancer").glob("*.yaml"))
PAIRS = [(config, balancer) for config in ("sit", "edm") for balancer in BALANCERS]


def every_pair(rank, folder):
    for config, balancer in PAIRS:
        fit_and_resume(folder / config / balancer, config, balancer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of all runs on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(every_pair, 2, folder / "processes", folder, limit=800)
    return folder


@pytest.mark.parametrize(("config", "balancer"), PAIRS)
def test_two_ranks_resume_to_the_last_bit(folder, config, balancer):
    check_resumed(folder / config / balancer)


@pytest.mark.parametrize(("config", "balancer"), PAIRS)
def test_two_ranks_train_as_one_process_on_the_joined_batch(folder, tmp_path, config, balancer):
    fit_and_save(tmp_path, config, balancer, ranks=1)
    one = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    two = torch.load(folder / config / balancer / "last.ckpt", weights_only=True)["state_dict"]
    assert one.keys() == two.keys()
    # Four steps of a clipped norm of 1, with float32 sums in another order. With momentum 0.9 step
    # i moves by at most 1 + 0.9 + .. + 0.9^(i - 1) of them.
    moved = 0.05 * sum(1 - 0.9**i for i in range(1, 5)) / (1 - 0.9)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=moved * 100 * 2**-24, equal_nan=True, msg=name
        )
