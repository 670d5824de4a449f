"""The docs say what the code is: links, paths, names and examples."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import ant_lightning
from ant_lightning import MultiTaskStep, UncertaintyWeighting
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = "ant_lightning|benchmarks|configs|docs|examples|notebooks|studies|tests"


def code_blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    paths = re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)(?:::\w+)*`", text)
    groups = {name.partition("/")[0] for name in config_names()}
    names = re.findall(rf"`((?:{'|'.join(groups)})/\w+)`", text)
    assert [name for name in names if name not in config_names()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_test_that_the_page_on_reliability_names_exists():
    page = (DOCS / "reliability.md").read_text()
    names = re.findall(r"(?<![\w/])(test_\w+(?:\.py)?)", page)
    assert names
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    sources = "\n".join(files.values())
    missing = [n for n in names if n not in files and f"def {n}(" not in sources]
    assert missing == []


def test_the_reference_has_every_public_name_once():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: ant_lightning\.(\w+)$", pages, re.MULTILINE)
    shown += re.findall(r"^\| `(\w+)` \|", pages, re.MULTILINE)  # presets
    assert sorted(shown) == sorted(ant_lightning.__all__)
    overview = (DOCS / "reference" / "index.md").read_text()
    listed = re.findall(r"\[`(\w+)`\]\[ant_lightning\.\w+\]", overview)
    assert set(listed) <= set(ant_lightning.__all__)


@pytest.mark.parametrize("number", range(len(code_blocks(DOCS / "reference" / "extending.md"))))
def test_the_classes_on_the_page_about_extending_work(number):
    exec(code_blocks(DOCS / "reference" / "extending.md")[number], {})


def test_the_loop_on_the_page_about_processes_learns_its_circle():
    (block,) = code_blocks(DOCS / "processes.md")
    found: dict = {}
    exec(block, found)
    assert float((found["x"].norm(dim=1) - 1).abs().mean()) < 0.2  # of noise it is 0.54


def test_every_decision_is_in_the_index():
    index = (DOCS / "decisions" / "index.md").read_text()
    files = {path.name for path in (DOCS / "decisions").glob("[0-9]*.md")}
    assert files == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "your_model.md"], ids=lambda p: p.name)
def test_the_loop_in_the_docs_runs(page):
    blocks = [code for code in code_blocks(page) if "step.backward(" in code]
    prelude = """
import torch
from diffusers import DDPMScheduler
scheduler = DDPMScheduler(1000)
x = torch.randn(16, 1, 4, 4)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    def forward(self, x_t, t):
        return self.conv(x_t) + t[:, None, None, None] / 1000
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = model.conv.weight.detach().clone()
"""
    scope = {}
    exec(prelude + blocks[0], scope)
    assert not scope["torch"].equal(scope["model"].conv.weight, scope["before"])
    for block in blocks[1:]:
        scope["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
        if "accumulate" in block:
            scope["step"] = MultiTaskStep(scope["model"], UncertaintyWeighting(5))
        exec(block, scope)
        assert scope["report"].finite
        assert int(scope["report"].num_samples.sum()) == 16


def commands():
    """The `fit` commands of the pages whose configs are all found by name."""
    blocks = [block for page in PAGES for block in code_blocks(page, "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    fits = {line for line in lines if line.startswith("ant-lightning fit --config")}
    return sorted(
        fit for fit in fits if set(re.findall(r"--config (\S+)", fit)) <= config_names().keys()
    )


@pytest.mark.parametrize("command", commands())
def test_settings_of_the_commands_in_the_docs_exist(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:  # the parser ends there
        main([*shlex.split(command)[1:], "--print_config"])
    assert end.value.code == 0
    assert "class_path: ant_lightning." in capsys.readouterr().out
