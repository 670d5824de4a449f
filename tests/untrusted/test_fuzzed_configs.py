"""Wrong configs on the command line: a few here, make test-faults runs two thousand."""

import logging

import lightning  # noqa: F401 - sets the level of its log, which is changed below
import pytest
from yaml import safe_dump

from configs import exit_code, fuzz_configs, good_config, has_default_sizes, run_arguments


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Names that are made up are those of files here."""
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def test_the_config_that_is_changed_trains(tmp_path):
    (tmp_path / "c.yaml").write_text(safe_dump(good_config(tmp_path)))
    assert exit_code(run_arguments(tmp_path)) == 0


def test_a_network_without_sizes_is_not_trained(tmp_path):
    good = good_config(tmp_path)
    assert not has_default_sizes(safe_dump(good))
    del good["model"]["init_args"]["backbone"]["init_args"]["depth"]
    assert has_default_sizes(safe_dump(good))


def test_a_wrong_config_ends_in_one_line(tmp_path):
    seen = fuzz_configs(tmp_path, 25, derandomize=True)
    assert seen[2] > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_wrong_configs(tmp_path):
    seen = fuzz_configs(tmp_path, 2_000, derandomize=False)
    print(dict(seen))
    assert sum(seen.values()) >= 2_000
    assert seen[2] > 1_000
    assert seen[0] > 20
