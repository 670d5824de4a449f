"""`TimestepClusters`: boundaries, tasks of timesteps, and batches drawn from them."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import ConfigError, TimestepClusters

boundaries_of_any_size = st.sets(st.integers(1, 60), min_size=1, max_size=9).map(
    lambda inner: (0, *sorted(inner))
)


@given(boundaries_of_any_size)
@settings(max_examples=20, deadline=None)
def test_clusters_tile_the_timesteps(boundaries):
    clusters = TimestepClusters(boundaries)
    tasks = clusters.task_of(torch.arange(clusters.num_timesteps))
    assert tasks.tolist() == [
        i for i in range(len(boundaries) - 1) for _ in range(boundaries[i], boundaries[i + 1])
    ]
    assert clusters.sizes.tolist() == torch.bincount(tasks).tolist()
    assert clusters.num_tasks == len(boundaries) - 1


@given(
    boundaries_of_any_size,
    st.integers(1, 70),
    st.sampled_from(["equal", "proportional"]),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_of_any_size_has_the_right_counts(boundaries, batch_size, allocation, seed):
    clusters = TimestepClusters(boundaries)
    generator = torch.Generator().manual_seed(seed)
    timesteps, tasks = clusters.sample(batch_size, generator=generator, allocation=allocation)
    assert timesteps.shape == tasks.shape == (batch_size,)
    assert timesteps.dtype == tasks.dtype == torch.int64
    assert bool((tasks.diff() >= 0).all())
    assert torch.equal(clusters.task_of(timesteps), tasks)
    k, num_timesteps = clusters.num_tasks, boundaries[-1]
    for task, count in enumerate(torch.bincount(tasks, minlength=k).tolist()):
        share = boundaries[task + 1] - boundaries[task]
        part, whole = (1, k) if allocation == "equal" else (share, num_timesteps)
        # Floor or ceiling of batch_size * part / whole, in whole numbers.
        assert batch_size * part // whole <= count <= -(-batch_size * part // whole)


@pytest.mark.parametrize("allocation", ["equal", "proportional"])
def test_expected_counts_and_uniform_timesteps(allocation):
    clusters = TimestepClusters((0, 1, 4, 20))
    generator = torch.Generator().manual_seed(0)
    draws = 1000
    counts = torch.zeros(20)
    for _ in range(draws):
        timesteps, _ = clusters.sample(8, generator=generator, allocation=allocation)
        counts += torch.bincount(timesteps, minlength=20)
    sizes = torch.tensor([1.0, 3.0, 16.0])
    shares = torch.full((3,), 8 / 3) if allocation == "equal" else 8 * sizes / 20
    expected = (shares / sizes).repeat_interleave(sizes.long())
    # Five standard errors of a count, at most that of independent draws.
    assert ((counts / draws - expected).abs() < 5 * (expected / draws).sqrt()).all()


def test_defect_3_a_batch_of_256_has_256_timesteps_of_their_own_cluster():
    """Defect 3: the official batch of 256 with k = 5 has 255, and its slices mix clusters."""
    clusters = TimestepClusters((0, 153, 394, 624, 823, 1000))
    generator = torch.Generator().manual_seed(3)
    extra = set()
    for _ in range(40):
        timesteps, tasks = clusters.sample(256, generator=generator)
        assert len(timesteps) == 256
        starts = torch.tensor(clusters.boundaries)[tasks]
        stops = torch.tensor(clusters.boundaries)[tasks + 1]
        assert bool(((starts <= timesteps) & (timesteps < stops)).all())
        counts = torch.bincount(tasks)
        assert sorted(counts.tolist()) == [51, 51, 51, 51, 52]
        extra.add(int(counts.argmax()))
    assert extra == set(range(5))  # the remainder is spread at random


def test_defect_1_every_timestep_is_drawn():
    """Defect 1: with the official floats cut to int, timesteps 131, 370, 651, 879 never come."""
    clusters = TimestepClusters((0, 132, 371, 652, 880, 1000))
    timesteps, _ = clusters.sample(20_000, generator=torch.Generator().manual_seed(1))
    assert set(timesteps.tolist()) == set(range(1000))
    with pytest.raises(ConfigError, match=r"boundaries: must be integers, found \(0.0, 131.0"):
        TimestepClusters((0.0, 131.0, 1000.0))


def test_the_generator_alone_decides():
    clusters = TimestepClusters((0, 3, 10))
    for allocation in ("equal", "proportional"):
        torch.manual_seed(1)
        first = clusters.sample(
            7, generator=torch.Generator().manual_seed(5), allocation=allocation
        )
        torch.manual_seed(2)
        again = clusters.sample(
            7, generator=torch.Generator().manual_seed(5), allocation=allocation
        )
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    torch.manual_seed(3)
    assert len(clusters.sample(7)[0]) == 7


def test_frozen_hashable_and_kept_by_json():
    clusters = TimestepClusters([0, 3, 10])
    assert clusters.boundaries == (0, 3, 10)
    assert clusters == TimestepClusters(tuple(json.loads(json.dumps(clusters.boundaries))))
    assert len({clusters, TimestepClusters((0, 3, 10))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        clusters.boundaries = (0, 10)


@pytest.mark.parametrize(
    "boundaries", [(0,), (), (1, 5), (0, 5, 5), (0, 7, 5), (0, -1), ("0", "3"), 3.5]
)
def test_bad_boundaries_are_named(boundaries):
    with pytest.raises(ConfigError, match=r"boundaries: .*found"):
        TimestepClusters(boundaries)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.sample(0), "batch_size: .* found 0"),
        (lambda c: c.sample(4, allocation="even"), "allocation: .* found 'even'"),
        (lambda c: c.task_of(torch.tensor([0, 10])), r"timesteps: .* 0 .. 9, found 0 .. 10"),
        (lambda c: c.task_of(torch.tensor([-1])), "timesteps: .* found -1"),
        (lambda c: c.task_of(torch.rand(3)), "timesteps: must be integers, found torch.float32"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call(TimestepClusters((0, 3, 10)))
