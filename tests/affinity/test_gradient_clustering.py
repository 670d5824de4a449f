"""Clusters from a measured affinity, given as a matrix or as a file."""

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, GradientClustering

LOG_SNR = torch.tensor([9.0, 8.9, 8.8, 1.0, 0.9, -5.0, -5.1, -5.2])


def _blocks(sizes):
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (block[:, None] == block).double()


def _save(path, timesteps, affinity, num_timesteps):
    np.savez(path, affinity=affinity, timesteps=np.array(timesteps), num_timesteps=num_timesteps)
    return path


def test_blocks_of_high_affinity_are_found():
    assert GradientClustering(_blocks([1, 5, 2]), 3)(LOG_SNR).boundaries == (0, 1, 6, 8)


def test_affinity_on_a_grid_is_spread_to_the_nearest(tmp_path):
    # 0 .. 2 are nearest to 1; 3 .. 6 to 4; 7 .. 10 to 9.
    path = _save(tmp_path / "a.npz", [1, 4, 9], _blocks([1, 1, 1]).numpy(), 11)
    log_snr = torch.zeros(11)
    assert GradientClustering(path, 3)(log_snr).boundaries == (0, 3, 7, 11)
    # 3 is as near to 2 as to 4, and goes to the lower.
    path = _save(tmp_path / "b.npz", [2, 4], _blocks([1, 1]).numpy(), 6)
    assert GradientClustering(str(path), 2)(torch.zeros(6)).boundaries == (0, 4, 6)


def test_a_full_grid_is_the_matrix_itself(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    affinity = torch.nn.functional.normalize(rows, dim=1)
    affinity = affinity @ affinity.T
    path = _save(tmp_path / "a.npz", list(range(8)), affinity.numpy(), 8)
    assert GradientClustering(path, 3)(LOG_SNR) == GradientClustering(affinity, 3)(LOG_SNR)


def test_bad_files_are_named(tmp_path):
    def cluster(path):
        return GradientClustering(path, 2)(LOG_SNR)

    with pytest.raises(ConfigError, match=r"affinity: .*absent\.npz"):
        cluster(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ConfigError, match=r"affinity: .*text\.npz"):
        cluster(tmp_path / "text.npz")
    np.savez(tmp_path / "keys.npz", affinity=np.eye(8))
    with pytest.raises(ConfigError, match=r"affinity: .*timesteps"):
        cluster(tmp_path / "keys.npz")
    np.savez(tmp_path / "pickle.npz", affinity=np.array([{}]), timesteps=[0], num_timesteps=8)
    with pytest.raises(ConfigError, match=r"affinity: .*pickle"):
        cluster(tmp_path / "pickle.npz")
    with pytest.raises(ConfigError, match=r"affinity: .* 8 timesteps, found 1000"):
        cluster(_save(tmp_path / "long.npz", [1, 500], np.eye(2), 1000))
    for timesteps, shape in (([4, 1], 2), ([1, 8], 2), ([-1, 3], 2), (np.zeros(0, int), 0)):
        words = r"affinity: .*grid\.npz: timesteps: must increase within 0 .. 7"
        with pytest.raises(ConfigError, match=words):
            cluster(_save(tmp_path / "grid.npz", timesteps, np.eye(shape), 8))
    with pytest.raises(ConfigError, match=r"grid\.npz: must have a row and a column for each"):
        cluster(_save(tmp_path / "grid.npz", [1, 2, 3], np.eye(2), 8))


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ConfigError, match=r"affinity: .* 8 .* found 7"):
        GradientClustering(torch.eye(7), 2)(LOG_SNR)
    with pytest.raises(ConfigError, match=r"num_tasks: must be at most 8 .* found 9"):
        GradientClustering(torch.eye(8), 9)(LOG_SNR)
