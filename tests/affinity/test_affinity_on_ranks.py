"""Two ranks share the timesteps: the result is that of one process, on both."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from ant_lightning import task_affinity
from ant_lightning.affinity.gradient import NonFiniteGradientError

GRID = (0, 2, 3, 6, 9)  # an odd number: the ranks have three and two


class Linear:
    """A loss whose gradient is a fixed random row for each timestep and half."""

    def __init__(self, bad=None):
        self.theta = torch.zeros(700, requires_grad=True)
        self.seen = []
        self.bad = bad

    def loss(self, timestep, half):
        self.seen.append(timestep)
        generator = torch.Generator().manual_seed(2 * timestep + half)
        row = 1 + torch.randn(700, generator=generator)
        return (row @ self.theta) * (float("nan") if timestep == self.bad else 1)


def measure(model, sketch_dim=None, **settings):
    return task_affinity(
        model.loss,
        parameters=[model.theta],
        num_timesteps=10,
        timesteps=GRID,
        sketch_dim=sketch_dim,
        warn_below=-1.0,
        **settings,
    )


def on_rank(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Linear()
    exact = measure(model)
    seen = sorted(set(model.seen))
    sketch = measure(Linear(), sketch_dim=64)
    alone = Linear()
    measure(alone, sharded=False)
    # In memory, with blocks of columns that the budget makes narrow: equal ones on both ranks.
    narrow = measure(Linear(), memory_budget_mb=(3 * 8 * 700 + 2_400 + 10 * 24 * 300) / 2**20)
    assert torch.equal(narrow.half_dots.float(), exact.half_dots.float())
    streamed = measure(Linear(), resume_dir=f"{folder}/state")
    again = Linear()
    measure(again, resume_dir=f"{folder}/state")
    failures = []
    for bad in (3, 9):
        try:
            measure(Linear(bad=bad))
        except NonFiniteGradientError as error:
            kept = error.partial and (error.partial.timesteps, error.partial.half_dots.numpy())
            failures.append((error.timestep, error.half, kept))
    queue.put(
        (
            rank,
            exact.half_dots.numpy(),
            sketch.half_dots.numpy(),
            streamed.half_dots.numpy(),
            seen,
            (sorted(set(alone.seen)), again.seen, failures),
        )
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    ranks = [context.Process(target=on_rank, args=(r, str(folder), queue)) for r in (0, 1)]
    for each in ranks:
        each.start()
    found = {report[0]: report[1:] for report in (queue.get(timeout=90) for _ in ranks)}
    for each in ranks:
        each.join(30)
    assert [each.exitcode for each in ranks] == [0, 0]
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_work_and_both_have_the_result_of_one(reports, rank):
    exact, sketch, streamed, seen, (alone, again, _) = reports[rank]
    assert seen == [list(GRID[0::2]), list(GRID[1::2])][rank]
    whole = measure(Linear())
    torch.testing.assert_close(torch.from_numpy(exact), whole.half_dots, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.from_numpy(streamed), whole.half_dots, rtol=1e-12, atol=0)
    whole_sketch = measure(Linear(), sketch_dim=64)
    torch.testing.assert_close(torch.from_numpy(sketch), whole_sketch.half_dots, rtol=1e-6, atol=0)
    assert alone == list(GRID)
    assert again == []


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_raises_what_one_rank_met(reports, rank):
    *_, (_, _, failures) = reports[rank]
    # What both had finished is kept: the beginning of the grid.
    assert [(timestep, half, kept[0]) for timestep, half, kept in failures] == [
        (3, 0, GRID[:2]),
        (9, 0, GRID[:4]),
    ]
    whole = measure(Linear()).half_dots
    for *_, (timesteps, dots) in failures:
        n = len(timesteps)
        torch.testing.assert_close(torch.from_numpy(dots), whole[..., :n, :n], rtol=1e-12, atol=0)
