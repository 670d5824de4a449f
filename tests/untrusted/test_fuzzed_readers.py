"""Wrong files for each reader of foreign files: a few thousand here, make test-faults 100,000."""

import resource

import pytest
from fuzzing import fuzz
from readers import READERS

FULL = 100_000


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_file_is_read_or_refused_by_our_own_error(tmp_path, name):
    seen = fuzz(name, tmp_path, 100, derandomize=True)
    assert seen["refused"] > 100 / 3  # enough damage to mean something; as below


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", READERS)
def test_a_hundred_thousand_wrong_files(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = -(-FULL // len(READERS))
    seen = fuzz(name, tmp_path, count, derandomize=False)
    assert sum(seen.values()) >= count
    assert seen["refused"] > count / 3
    print(f"{name}: {dict(seen)}")
    # Kilobytes: nothing that a file only claims to hold was touched.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19
