"""The docs say what the code is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", readme)
    links += re.findall(r"configs/[\w/]+\.yaml", readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_test_that_the_page_on_reliability_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    paths = re.findall(r"`((?:tests|benchmarks)/[\w/.]*)`", page)
    paths += re.findall(r"`(tests/[\w/.]+)::test_\w+`", page)
    names = re.findall(r"(?<![\w/])(test_\w+(?:\.py)?)", page)
    assert paths
    assert names
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    sources = "\n".join(files.values())
    missing = [n for n in names if n not in files and f"def {n}(" not in sources]
    assert missing == []


def test_the_loop_in_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    loop = next(
        code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "def losses" in code
    )
    prelude = """
import torch
from ant_lightning.diffusion import CosineSchedule, DiffusionProcess
log_snr = DiffusionProcess(CosineSchedule()).log_snr
x = torch.randn(16, 1, 4, 4)
x_t, target = torch.randn_like(x), torch.randn_like(x)
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
    exec(prelude + loop, scope)
    assert not scope["torch"].equal(scope["model"].conv.weight, scope["before"])
