"""The benchmark of two hosts: what it leaves behind, and what it prints."""

import subprocess

import pytest

from benchmarks import two_hosts


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


def use_until_an_error(seen):
    with two_hosts.hosts() as both:
        seen += [name for name, _ in both]
        assert all(name in namespaces() for name in seen)
        raise RuntimeError("in between")


def test_namespaces_are_gone_after_an_error():
    reason = two_hosts.missing()
    if reason:
        pytest.skip(reason)
    names = []
    with pytest.raises(RuntimeError, match="in between"):
        use_until_an_error(names)
    assert len(names) == 2
    assert not any(name in namespaces() for name in names)


def test_targets_are_those_of_the_rate():
    def steps(seconds, megabytes):
        return [[seconds, seconds, 1e6 * megabytes]] * 3

    methods = {
        "ddp": steps(1.0, 66),
        "vanilla": steps(1.06, 66),
        "pcgrad": steps(1.4, 125),
        "forward": steps(0.2, 0),
    }
    found = list(two_hosts.lines({"10": methods, "1": methods}))
    assert [line.split("|")[-2].strip() for line in found] == [
        *("", "1.05 missed", "1.50 met", ""),
        *("", "1.05 missed", "1.40 met", ""),  # 0.2 s and 1.2 times 1.0 s
    ]
