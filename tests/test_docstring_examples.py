"""Every public name has an example in its docstring that shows a value, and every example runs.

Examples are written for a Python shell after `import torch` and `from ant_lightning import *`.
"""

import doctest
import pkgutil
import re
from importlib import import_module

import pytest
import torch

import ant_lightning

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(docstring):
    return doctest.DocTestParser().get_examples(docstring or "")


def run_examples(docstring, name, folder):
    scope = {"torch": torch, **{n: getattr(ant_lightning, n) for n in ant_lightning.__all__}}
    found = doctest.DocTest(examples(docstring), scope, name, None, 0, docstring)
    output = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = doctest.DocTestRunner(optionflags=FLAGS).run(found, out=output.append)
    assert result.failed == 0, "".join(output)
    assert list(folder.iterdir()) == [], f"{name}: its example leaves files behind"


def documented_elsewhere():
    """Modules, classes, methods and functions with an example that are no public name."""
    values = [getattr(ant_lightning, name) for name in ant_lightning.__all__]
    public = {f"{value.__module__}.{value.__qualname__}" for value in values}
    for module in pkgutil.walk_packages(ant_lightning.__path__, "ant_lightning."):
        if not module.name.endswith("__main__"):
            for found in doctest.DocTestFinder().find(import_module(module.name), module.name):
                if found.examples and found.name not in public:
                    yield found.name, found.docstring


@pytest.mark.parametrize("name", ant_lightning.__all__)
def test_a_public_name_has_an_example_that_shows_a_value(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docstring = getattr(ant_lightning, name).__doc__
    assert any(example.want for example in examples(docstring)), f"{name}: no example"
    # The site shows a section with this title as code.
    assert re.search(r"^ *Examples:$", docstring, re.MULTILINE), f"{name}: no section Examples"
    run_examples(docstring, name, tmp_path)


def test_examples_of_what_is_not_public_run_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, docstring in documented_elsewhere():
        run_examples(docstring, name, tmp_path)
