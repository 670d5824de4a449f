"""The names of `ant_lightning` are the same for Python and for type checkers."""

import subprocess
import sys

import pytest

import ant_lightning


@pytest.mark.parametrize("name", ant_lightning.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(ant_lightning, name)
    assert value.__name__ == name
    assert value.__module__.startswith("ant_lightning.")


def test_a_name_that_is_not_public_is_an_error():
    with pytest.raises(AttributeError, match="module 'ant_lightning' has no attribute 'Loop'"):
        ant_lightning.Loop  # noqa: B018


def test_a_type_checker_knows_the_same_names(tmp_path):
    # The modules behind the stub are skipped: which names there are is the question here, and
    # `make check` reads the rest.
    (tmp_path / "mypy.ini").write_text("[mypy-ant_lightning.*]\nfollow_imports = skip\n")
    names = ", ".join([*ant_lightning.__all__, "Loop"])
    (tmp_path / "user.py").write_text(f"from ant_lightning import ({names})\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ant_lightning.__path__[0].removesuffix("/ant_lightning"))},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, checked.stdout + checked.stderr
    assert 'has no attribute "Loop"' in errors[0]
