"""The classes that turn a log-SNR into clusters."""

import pytest
import torch

from ant_lightning import ConfigError, FixedClustering, SNRClustering, TimestepClustering

LOG_SNR = torch.tensor([9.0, 8.9, 8.8, 1.0, 0.9, -5.0, -5.1, -5.2])


def test_each_finds_what_is_plain_to_see():
    assert TimestepClustering(4)(LOG_SNR).boundaries == (0, 2, 4, 6, 8)
    assert SNRClustering(3)(LOG_SNR).boundaries == (0, 3, 5, 8)
    assert SNRClustering(3, power=2)(LOG_SNR).boundaries == (0, 3, 5, 8)
    assert FixedClustering([0, 1, 8])(LOG_SNR).boundaries == (0, 1, 8)


def test_the_power_matters():
    # Cut at 2: 0 + |6-5| + |0-5| = 6 or 26. Cut at 4: 2 |9-6| + |5-6| + 0 = 7 or 19.
    log_snr = torch.tensor([9.0, 9.0, 6.0, 5.0, 0.0])
    assert SNRClustering(2, power=1)(log_snr).boundaries == (0, 2, 5)
    assert SNRClustering(2, power=2)(log_snr).boundaries == (0, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TimestepClustering(0), "num_tasks: .* found 0"),
        (lambda: SNRClustering(-1), "num_tasks: .* found -1"),
        (lambda: SNRClustering(2, power=0), "power: .* found 0"),
        (lambda: TimestepClustering(9)(LOG_SNR), "num_tasks: must be at most .*8.*9"),
        (lambda: SNRClustering(9)(LOG_SNR), "num_tasks: must be at most .*8.*9"),
        (lambda: FixedClustering([0, 3, 2, 8]), "boundaries: .* found"),
        (lambda: FixedClustering([0, 3, 9])(LOG_SNR), "boundaries: .* 8, found 9"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_snr_in_place_of_its_logarithm_is_said():
    snr = torch.linspace(9, -9, 1000).exp()
    with pytest.warns(UserWarning, match="log_snr: must be the natural logarithm of the SNR"):
        SNRClustering(num_tasks=5)(snr)
    SNRClustering(num_tasks=5)(snr.log())
