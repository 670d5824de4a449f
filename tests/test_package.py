"""What `pip install` brings: configs by name, a README with whole links, mathematics on its own."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from readme_renderer import markdown

from ant_lightning import __version__
from ant_lightning.cli.configs import config_names, with_paths_of_configs
from ant_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
URL = "https://example.org/owner/ant_lightning"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPOSITORY_URL", URL)
        path = next(iter(WheelBuilder(str(ROOT)).build(directory=str(folder))))
    with zipfile.ZipFile(path) as file:
        file.extractall(folder / "site")
    return folder / "site"


def run(code, site, folder):
    """Run code in a fresh interpreter, with the wheel's files and not those of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    # -P: the working folder is not on the path.
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("args", [["configs"], ["--help"], ["configs", "show", "digits/dit"]])
def test_a_reader_that_has_read_enough_is_no_error(args):
    command = [sys.executable, "-m", "ant_lightning", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as of a program that SIGPIPE ended


def test_a_reader_may_close_the_help_of_a_parser_and_the_errors():
    # The long help of `diagnose`, without waiting for its imports: any print and exit does.
    code = """
import sys
from ant_lightning.cli import configs, main
def run_configs(args):
    print("x" * 100_000)
    raise SystemExit(0)
configs.run_configs = run_configs
sys.exit(main.main(["configs"]))
"""
    for command, piped in (
        ([sys.executable, "-c", code], "stdout"),
        ([sys.executable, "-m", "ant_lightning", "fitt"], "stderr"),
    ):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, **pipes) as process:
            getattr(process, piped).close()
            other = process.stderr if piped == "stdout" else process.stdout
            assert other.read() == b""
        assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_the_output_is_one_line():
    command = [sys.executable, "-m", "ant_lightning", "configs"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "ant-lightning: error: standard output: could not be written: No space left on device\n"
    )


def test_the_wheel_finds_every_config_in_an_empty_folder_without_torch(wheel, tmp_path, capsys):
    code = """
import sys
from ant_lightning.cli.main import main
assert main(["configs"]) == main(["configs", "show", "digits/dit"]) == main(["--version"]) == 0
assert not {"torch", "lightning", "numpy"} & set(sys.modules)
"""
    found = run(code, wheel, tmp_path)
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    assert found == (
        listed + (ROOT / "configs/digits/dit.yaml").read_text() + f"ant-lightning {__version__}\n"
    )
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").glob("*/*.yaml")}
    assert {line.split()[0] for line in listed.splitlines()} == {
        path.with_suffix("").as_posix() for path in shipped
    }


def _outside_functions(node):
    """The imports of a module, those for type checkers among them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (each.name for each in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module
        elif not isinstance(child, ast.FunctionDef):
            yield from _outside_functions(child)


def test_all_that_a_module_imports_is_installed_with_the_package():
    # Also for type checkers: jsonargparse reads the types of settings through these imports.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", each)[0].lower() for each in project["dependencies"]}
    known = packages_distributions()
    missing = {}
    for path in (ROOT / "ant_lightning").rglob("*.py"):
        for name in _outside_functions(ast.parse(path.read_text())):
            package = name.split(".")[0]
            names = {each.lower().replace("_", "-") for each in known.get(package, [package])}
            ours = package in sys.stdlib_module_names or package == "ant_lightning"
            if not ours and not names & declared:
                missing[package] = path
    assert not missing


def test_every_config_begins_with_a_sentence_in_one_line():
    first = {name: path.read_text().split("\n")[0] for name, path in config_names().items()}
    assert [name for name, line in first.items() if not re.fullmatch(r"# \S.{1,97}\.", line)] == []


def test_names_of_configs_become_paths_and_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("{}")
    known = config_names()
    args = ["fit", "--config", "digits/dit", "--config=balancer/uw", "-c", "mine"]
    args += ["--config", "{a: 1}", "--config=missing.yaml", "--config"]
    assert with_paths_of_configs(args) == [
        *("fit", "--config", str(known["digits/dit"]), f"--config={known['balancer/uw']}"),
        *("-c", "mine", "--config", "{a: 1}", "--config=missing.yaml", "--config"),
    ]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["fit", "--config", "digits/dti"],
            "config: must be a file or a name that `ant-lightning configs` lists, found "
            "'digits/dti'; did you mean 'digits/dit' or 'digits/sit'?",
        ),
        (
            ["configs", "show", "uw"],
            "config: must be a file or a name that `ant-lightning configs` lists, found 'uw'; did "
            "you mean 'balancer/uw'?",
        ),
        (
            ["encode", "--config", "configs/imagenet/encode.yaml"],
            "config: found nothing at configs/imagenet/encode.yaml; did you mean "
            "'imagenet/encode'?",
        ),
        (["configs", "list"], "configs: takes nothing or `show NAME`, found 'list'"),
    ],
)
def test_a_name_that_is_unknown_ends_in_one_line(args, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert capsys.readouterr().err == f"ant-lightning: error: {line}\n"


def test_the_readme_on_the_index_has_whole_links_to_files_that_exist(wheel):
    metadata = Parser().parsestr(next(wheel.glob("*.dist-info/METADATA")).read_text("utf8"))
    assert dict(each.split(", ") for each in metadata.get_all("Project-URL"))["Repository"] == URL
    page = markdown.render(metadata.get_payload())
    targets = re.findall(r'(?:href|src)="(?!#)([^"]+)"', page)
    own = [re.fullmatch(rf"{URL}/(?:raw|blob)/HEAD/([^#]+)(?:#.*)?", each) for each in targets]
    assert [t for t, m in zip(targets, own, strict=True) if not m and "://" not in t] == []
    files = [ROOT / match[1] for match in own if match]
    assert len(files) > 20
    assert [file for file in files if not file.exists()] == []
    assert [m[0] for m in own if m and m[1].endswith(".png") and "/raw/" not in m[0]] == []


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    """The code of each cell, without the lines that only a notebook understands."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in cells]
    return ["\n".join(li for li in text.splitlines() if li[:1] != "%") for text in texts]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_needs_nothing_of_a_checkout(notebook, wheel):
    own = {path.stem for path in ROOT.iterdir()} - {"ant_lightning"}
    code = "\n".join(code_of(notebook))
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] not in own, name
            if name.startswith("ant_lightning"):
                path = wheel / name.replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
    assert "sys.path" not in code
    assert "../" not in code


def test_the_notebooks_find_their_data_in_the_wheel(wheel, tmp_path):
    # Their first cells, in an empty folder, without what the notebooks of long runs do next.
    firsts = [code_of(path)[0] for path in NOTEBOOKS if path.name[:2] in {"01", "02", "05"}]
    assert len(firsts) == 3
    code = f"for code in {firsts!r}:\n    exec(code, {{}})\nimport ant_lightning\n"
    found = run(f"{code}print(ant_lightning.__file__)", wheel, tmp_path)
    assert Path(found.strip()).is_relative_to(wheel)
    assert list(tmp_path.iterdir()) == []


def test_the_source_distribution_has_the_tests(tmp_path):
    path = next(iter(SdistBuilder(str(ROOT)).build(directory=str(tmp_path))))
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("tests", "configs", "studies", "notebooks", "docs"):
        files = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {".py", ".yaml", ".md", ".npz", ".json"}
            and "__pycache__" not in path.parts
        }
        assert files <= names


ALONE = """
import importlib, pkgutil, sys
from importlib import metadata
from re import match

def needed(name, found):
    if name not in found:
        found.add(name)
        for line in metadata.requires(name) or []:
            if "extra ==" not in line and "platform_system" not in line:
                needed(match(r"[\\w.-]+", line)[0].lower().replace("-", "_"), found)
    return found

owners = metadata.packages_distributions()
few = {each for name in ("torch", "numpy", "einops") for each in needed(name, set())}
few_modules = {m for m, of in owners.items() if few & {o.lower().replace("-", "_") for o in of}}
others = set(owners) - few_modules - {"ant_lightning"}
assert {"lightning", "torchmetrics", "jaxtyping", "scipy", "yaml"} <= others

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in others
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)

for folder in ("tasks", "balancing", "diffusion", "backbones"):
    package = importlib.import_module(f"ant_lightning.{folder}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith(".figure"):
            importlib.import_module(module.name)

import torch
from ant_lightning import (
    CosineSchedule, DDIM, DiT, DiscreteDiffusion, NashMTL, PCGrad, SNRClustering,
    UncertaintyWeighting, multitask_backward,
)
network = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1,
              num_classes=0, learn_sigma=False)
process = DiscreteDiffusion(CosineSchedule(100))
clusters = SNRClustering(num_tasks=3)(process.log_snr)
x, noise = torch.randn(2, 12, 1, 8, 8)
t, tasks = clusters.sample(12)
def losses(rows):
    x_t = process.q_sample(x[rows], t[rows], noise[rows])
    return (network(x_t, t[rows], None) - noise[rows]).square().mean((1, 2, 3))
for balancer in (PCGrad(num_tasks=3), NashMTL(num_tasks=3), UncertaintyWeighting(num_tasks=3)):
    assert multitask_backward(losses, tasks, network.parameters(), balancer).finite
print(len(sys.modules))
"""


def test_the_mathematics_needs_torch_numpy_and_einops_alone(tmp_path):
    assert int(run(ALONE, ROOT, tmp_path)) > 500


def test_a_report_and_the_list_of_configs_do_not_wait_for_lightning(tmp_path):
    found = run(
        "import sys, ant_lightning.cli.report, ant_lightning.cli.configs\n"
        "print('lightning' in sys.modules, 'torchmetrics' in sys.modules)",
        ROOT,
        tmp_path,
    )
    assert found.split() == ["False", "False"]
