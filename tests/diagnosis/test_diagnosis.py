"""Advice from gradients that are planted, in numbers and in two runs."""

import inspect
import json
import re
import subprocess
import sys
from html import escape
from importlib.metadata import metadata
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml

from ant_lightning import (
    AffinityResult,
    CosineSchedule,
    Diagnosis,
    DiscreteDiffusion,
    SNRClustering,
    TimestepClusters,
)
from ant_lightning.cli.main import main
from ant_lightning.diagnosis import advice as diagnosis_advice
from ant_lightning.diagnosis.advice import advice
from ant_lightning.diagnosis.callback import _centres, _enough
from ant_lightning.diagnosis.findings import Findings, median_interval
from ant_lightning.diagnosis.page import write_page
from ant_lightning.errors import ConfigError
from ant_lightning.files import documentation

NETWORK = """
import torch

class Gain(torch.nn.Module):
    in_channels = out_channels = 1
    input_size = 8
    num_classes = 0

    def __init__(self, start: float):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(start))

    def forward(self, x_t, t, labels=None):
        return self.gain * x_t
"""


FIRST = {
    -1.0: "Do not expect a gain from PCGrad",
    0.5: "Tasks conflict: compare NashMTL with vanilla",
}


def findings(gradients, noise=0.0, losses=None, **settings):
    """From two halves with the gradients `[n, p]` of 6 timesteps and noise of this size."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, *gradients.shape)
    halves = gradients + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    dots = torch.einsum("gip,hjp->ghij", halves, halves)[None]
    log_snr = torch.linspace(6, -6, 12, dtype=torch.float64)
    affinity = AffinityResult(
        timesteps=(0, 2, 4, 6, 8, 10), num_timesteps=12, half_dots=dots, log_snr=log_snr
    )
    losses = torch.ones(3) if losses is None else torch.tensor(losses)
    clusters = TimestepClusters((0, 4, 8, 12))
    return Findings(affinity, torch.ones(6), losses.double(), clusters, **settings)


def titles(found):
    return titles_of(advice(found))


def titles_of(pieces):
    return " | ".join(each.title for each in pieces)


def test_planted_conflict_and_agreement_get_different_advice():
    opposed = torch.eye(3).double().repeat_interleave(2, 0)
    opposed[4:] = torch.tensor([-1.0, 0.0, 0.1]).double()
    found = findings(opposed)
    assert found.conflicts == [(0, 2)]
    assert float(found.cosines[0, 2]) == pytest.approx(-1 / 1.01**0.5)
    assert "compare NashMTL with vanilla" in titles(found)
    agreed = findings(torch.ones(6, 3).double())
    assert agreed.conflicts == []
    assert "no tasks conflict" in titles(agreed)
    torch.testing.assert_close(agreed.weights["PCGrad"], torch.ones(3).double())
    assert float(found.weights["PCGrad"][1]) != pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "latent"), [("v", False), ("v", True), ("F", False)])
def test_a_page_advises_no_balancer_where_the_documentation_advises_none(kind, latent):
    opposed = torch.eye(3).double().repeat_interleave(2, 0)
    opposed[4:] = torch.tensor([-1.0, 0.0, 0.1]).double()
    settings = {"prediction_type": kind, "is_latent": latent}
    found = advice(findings(opposed, losses=[1.0, 2.0, 0.05], **settings))
    assert found[0].title == f"Train without a balancer first: the network predicts {kind}"
    assert found[1].title == "Tasks conflict, which alone is no reason for a balancer"
    assert not re.search(r"(?i)nashmtl|(?<!you )try uncertainty", titles_of(found[2:-1]))
    agreed = advice(findings(torch.ones(6, 3).double(), **settings))
    assert agreed[0] == found[0]
    assert "no tasks conflict" in agreed[1].title


def test_caveats_come_before_any_method():
    few = advice(findings(torch.ones(6, 3).double(), steps=60, num_images=16))
    assert [each.is_caveat for each in few] == [True] * 2 + [False] * (len(few) - 2)
    assert "This is step 60" in few[0].text
    assert "that of 16 images only" in few[1].text
    assert "--num_images 256" in few[1].text
    assert advice(findings(torch.ones(6, 3).double(), steps=0))[0].title.startswith("Train first")
    for settings in ({}, {"steps": 250, "num_images": 64}):
        found = advice(findings(torch.ones(6, 3).double(), **settings))
        assert not any(each.is_caveat for each in found)


def test_what_is_said_of_uncertainty_weighting_are_its_figures():
    # Inverse losses 1, 1/2 and 1/3 have the mean 11/18.
    found = findings(torch.ones(6, 3).double(), losses=[1.0, 2.0, 3.0])
    said = next(each for each in advice(found) if "needs no bound" in each.title)
    assert "largest weight is 3.0 times its smallest" in said.title
    assert "0.55 to 1.64 times equal weights" in said.text
    assert "Above a factor of 10" in said.text


@pytest.mark.parametrize(("n", "j"), [(5, 0), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (25, 8)])
def test_the_interval_of_a_median_is_that_of_the_tables_of_the_sign_test(n, j):
    """Conover, Practical Nonparametric Statistics, table A3 at p = 0.5."""
    values = list(range(1, n + 1))
    assert median_interval(values[::-1]) == ((j, n + 1 - j) if j else None)


def test_what_slows_a_machine_for_a_while_does_not_change_the_ratios(tmp_path):
    load = [1.0, 1.0, 2.5, 3.0, 1.1, 1.0, 1.0]  # of each turn
    times = {"vanilla": [0.010 * x for x in load], "PCGrad": [0.012 * x for x in load]}
    found = findings(torch.ones(6, 3).double(), times=times)
    assert found.relative_times["PCGrad"] == pytest.approx((1.2, 1.2, 1.2))
    write_page(found, tmp_path, {}, about="x")
    page = (tmp_path / "diagnosis.md").read_text()
    assert "of 7 timed steps." in page
    assert "| vanilla | 10 | 10 to 30 | 1 |  |" in page
    assert "| PCGrad | 12 | 12 to 36 | 1.20 | 1.20 to 1.20 |" in page
    assert "cannot be told" not in page
    assert found.numbers()["seconds"]["vanilla"] == 0.010


def test_a_ratio_that_tells_nothing_is_not_shown(tmp_path):
    plain = [1.0] * 6
    busy = [0.6, 1.0, 1.1, 1.3, 0.9, 1.2]
    times = {"vanilla": plain, "UW": busy, "PCGrad": [1.05, 1.1, 1.15, 1.1, 1.1, 1.2]}
    found = findings(torch.ones(6, 3).double(), times=times)
    write_page(found, tmp_path, {}, about="x")
    page = (tmp_path / "diagnosis.md").read_text()
    assert "| too wide to tell | 0.60 to 1.30 |" in page
    assert "| 1.10 | 1.05 to 1.20 |" in page
    assert "The cost of UW cannot be told: " in page
    few = {name: each[:5] for name, each in times.items()}
    write_page(findings(torch.ones(6, 3).double(), times=few), tmp_path, {}, about="x")
    page = (tmp_path / "diagnosis.md").read_text()
    assert "of 5 timed steps, too few to compare the methods" in page
    assert "relative to vanilla" not in page


def test_noise_is_not_taken_for_a_conflict():
    found = findings(torch.full((6, 40), 0.01).double(), noise=1.0)
    assert "Measure with more images" in titles(found)
    quiet = findings(torch.ones(6, 40).double(), noise=0.1)
    assert "Measure with more images" not in titles(quiet)


def test_a_sentence_lists_a_few_tasks():
    assert diagnosis_advice._tasks([3]) == "task 3"
    assert diagnosis_advice._tasks([1, 3]) == "tasks 1, 3"
    assert diagnosis_advice._tasks(list(range(40))).endswith(" 6, 7 and 32 more")


def test_losses_shares_and_what_the_network_predicts():
    gradients = torch.ones(6, 2).double() * torch.tensor([1.0, 1, 1, 1, 3, 3])[:, None].double()
    found = findings(gradients, losses=[2.0, 1, 0.1])
    torch.testing.assert_close(found.gradient_shares, torch.tensor([1, 1, 9.0]).double() / 11)
    weights = found.weights["UW"]
    torch.testing.assert_close(weights[2] / weights[0], torch.tensor(20.0).double())
    assert "bound it with min_loss" in titles(found)
    assert "needs no bound" in titles(findings(gradients))
    assert "predicts v" in titles(findings(gradients, prediction_type="v"))
    latents = titles(findings(gradients, is_latent=True))
    assert "prediction_type: v" in latents
    assert "try uncertainty weighting" in latents
    predicts_v = titles(findings(gradients, is_latent=True, prediction_type="v"))
    assert "prediction_type: v" not in predicts_v
    assert "try uncertainty weighting" not in predicts_v
    pixels = titles(findings(gradients))
    assert "prediction_type: v" in pixels
    assert "try uncertainty weighting" not in pixels
    assert found.clusterings.keys() == {"timestep", "SNR", "gradient"}
    with pytest.raises(ConfigError, match="none in task 1"):
        Findings(found.affinity, torch.ones(6), torch.ones(3), TimestepClusters((0, 1, 2, 12)))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder of a run whose network is one number that starts at `start` and stays there."""
    (tmp_path / "gain_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def train(start):
        settings = {
            "trainer": {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0}
            | {"enable_progress_bar": False, "num_sanity_val_steps": 0}
            | {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}},
            "data": {"class_path": "ant_lightning.DigitsData", "init_args": {"batch_size": 20}},
            "model": {
                "class_path": "ant_lightning.MultiTaskDiffusion",
                "init_args": {
                    "backbone": {
                        "class_path": "gain_network.Gain",
                        "init_args": {"start": start},
                    },
                    "process": {
                        "class_path": "ant_lightning.DiscreteDiffusion",
                        "init_args": {"variance_type": "fixed_small"},
                    },
                    "tasks": {"clustering": "ant_lightning.SNRClustering"},
                    "optimization": {
                        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-9}}
                    },
                    "sampling": {"guidance_scale": 1.0},
                },
            },
        }
        settings["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path), "name": f"{start}"}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        assert main(["fit", "--config", "run.yaml"]) == 0
        return tmp_path / f"{start}" / "version_0"

    return train


def test_the_numbers_are_plain_and_those_of_the_properties():
    gradients = torch.eye(3).double().repeat_interleave(2, 0)
    gradients[4:] = torch.tensor([-3.0, 0.0, 4.0]).double()
    found = findings(gradients, losses=[0.5, 1.0, 2.0])
    numbers = json.loads(json.dumps(found.numbers(), allow_nan=False))
    assert numbers["gradient_norms"] == pytest.approx([1, 1, 1, 1, 5, 5])
    assert numbers["log_snr"] == pytest.approx(found.affinity.grid_log_snr.tolist())
    tasks = numbers["tasks"]
    assert tasks["gradient_share"] == pytest.approx([1 / 27, 1 / 27, 25 / 27])
    assert tasks["conflicts"] == [[0, 2]]
    assert tasks["cosines"][0][2] == pytest.approx(-0.6)
    assert tasks["weights"]["UW"] == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert tasks["transfer"] is None
    drowned = findings(1e-3 * gradients, noise=1.0)
    assert any(None in line for line in drowned.numbers()["tasks"]["cosines"])


def test_two_runs_with_planted_conflicts_get_different_pages(trained, capsys, tmp_path):
    """The best gain is the noise's share of x_t: 0 without noise, 1 without signal."""
    pages = {}
    for start in (-1.0, 0.5):  # below every task's optimum, and between them
        run = trained(start)
        # On a CPU: 64 images at 20 timesteps.
        options = ["--timed_steps=1", "--trainer.enable_progress_bar=true"]
        assert main(["diagnose", str(run), *options]) == 0
        pages[start] = (run / "diagnosis.md").read_text()
        html = (run / "diagnosis.html").read_text()
        assert html.count("data:image/png;base64,") == 3
        lines = capsys.readouterr().out.splitlines()
        assert any("20 timesteps, 64 images each" in line for line in lines)
        for count in ("20 timesteps", "60 losses", "12 timed steps"):
            assert f"diagnose: 0 of {count}" in lines
        # The line and the page ask for the same number of images.
        assert re.findall(r"--num_images (\d+)", " ".join(lines)) == ["256"]
        assert set(re.findall(r"--num_images (\d+)", pages[start])) == {"256"}
        *_, early, first, also, last = lines
        assert early.startswith("Train longer before you choose a method. This is step 1,")
        assert first.startswith("Train the next model with prediction_type: v. ")
        assert also.startswith(f"Also: {FIRST[start]}")
        page = run.relative_to(tmp_path) / "diagnosis"
        assert last == f"With reasons and evidence in {page}.html and {page}.md"
        assert any(each.startswith("diagnose: averaged (EMA) weights of ") for each in lines)
        assert not any("validate" in each for each in lines)
        assert (run / "diagnose.yaml").is_file()
        assert not (run / "validate.yaml").exists()
        assert (run / "task_affinity.safetensors").is_file()
        numbers = json.loads((run / "diagnosis.json").read_text())
        assert numbers["step"] == 1
        assert len(numbers["losses"]) == len(numbers["gradient_norms"]) == 20
        assert bool(numbers["tasks"]["conflicts"]) is (start == 0.5)
    assert "no tasks conflict" in pages[-1.0]
    assert FIRST[0.5] in pages[0.5]
    for page in pages.values():
        assert "of 1 timed step, too few to compare the methods" in page
        assert "relative to vanilla" not in page
        assert "## Transfer" in page


def test_a_wrong_option_of_the_diagnosis_is_named_as_it_was_given(trained, capsys):
    run = str(trained(0.5))
    for option, value, line in (
        ("weights", "raw", "weights: must be one of 'ema', 'live', found raw"),
        ("num_images", "1", "num_images: must be at least 2, found 1"),
        ("num_images", "many", "num_images: must be a whole number, found many"),
    ):
        assert main(["diagnose", run, f"--{option}", value]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"ant-lightning: error: {line}"


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "must be the folder of a run, found no config.yaml" in capsys.readouterr().err
    assert main(["diagnose", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  --{name}: " in shown for name in signature(Diagnosis).parameters)
    assert main(["diagnose"]) == 2
    assert "needs the folder of a run, or --config, found none" in capsys.readouterr().err


def test_help_of_diagnose_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from ant_lightning.cli.main import main; code = main(['diagnose', '--help']); "
        "sys.exit(code or ', '.join({'torch', 'lightning'} & {*sys.modules}) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_task_has_a_point_of_the_default_grid():
    class Module:
        num_tasks = 5
        clusters = TimestepClusters((0, 300, 310, 500, 700, 1000))
        process = DiscreteDiffusion(CosineSchedule())

    count = _enough(20, Module)
    centres = _centres(1000, count)
    assert count > 20
    assert any(300 <= each < 310 for each in centres)
    assert not any(300 <= each < 310 for each in _centres(1000, count - 1))
    Module.clusters = SNRClustering(5)(Module.process.log_snr)
    assert _enough(20, Module) == 20


@pytest.mark.parametrize("url", ["", "https://example.org/me/repo"])
def test_evidence_leads_to_the_repository_that_the_package_names(url, monkeypatch, tmp_path):
    about = metadata("ant-lightning")
    del about["Project-URL"]
    if url:
        about["Project-URL"] = f"Repository, {url}"
    monkeypatch.setattr(documentation, "metadata", lambda name: about)
    documentation._repository.cache_clear()
    try:
        write_page(findings(torch.ones(6, 3).double()), tmp_path, {}, about="x")
    finally:
        documentation._repository.cache_clear()
    markdown, html = ((tmp_path / f"diagnosis.{kind}").read_text() for kind in ("md", "html"))
    page = "docs/results.md#reading-the-evidence"
    if url:
        assert f"([evidence]({url}/blob/HEAD/{page}))" in markdown
        assert f'<a href="{url}/blob/HEAD/{page}">evidence</a>' in html
    else:
        words = '"Reading the evidence" on the page "Results" in the documentation of ant_lightning'
        assert f"(evidence: {words})" in markdown
        assert f"(evidence: {escape(words)})" in html


def test_every_piece_of_evidence_is_a_section_of_the_documentation():
    named = set(re.findall(r'"(\w+\.md)#([\w-]+)"', inspect.getsource(diagnosis_advice)))
    assert len(named) >= 4
    for page, section in named:
        text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text()
        titles = [each.rstrip("?") for each in re.findall(r"^##+ (.*)$", text, re.MULTILINE)]
        # The words that name a section without a URL are its title.
        assert section.replace("-", " ").capitalize() in titles
