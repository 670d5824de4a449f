"""Alignment with another network's features: REPA's formula, gradients, resume, errors."""

import copy
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from tiny_fit import SIZE, assert_same, everything, fit
from torch import nn

from ant_lightning import (
    FAMO,
    IMTLL,
    Batch,
    ConfigError,
    DigitsData,
    DiT,
    DiTModule,
    FeatureAlignment,
    FlowMatching,
    LatentSpace,
    MultiTaskStep,
    SNRClustering,
    Tasks,
    UncertaintyWeighting,
)
from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.cli.parser import run

# Of torch's own code, for a compiled network.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TASKS = torch.tensor([0, 1, 1, 0, 1, 2])
WEIGHTS = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64)


class Fixed(GradientBalancer):
    """Known weights, by way of the Gramian."""

    def solve(self, gramian):
        return WEIGHTS


def features():
    """A small random network: 4 patches of 5 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 5, 4, stride=4), nn.Tanh())


def alignment(block="blocks.0", **settings):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        sizes = {"width": 8, "feature_width": 5, "hidden_size": 16}
        return FeatureAlignment(block=block, features=features(), **(sizes | settings))


def problem():
    """Network, alignment, images and plain losses in float64."""
    torch.manual_seed(0)
    network = DiT(**SIZE, depth=1, num_heads=1, num_classes=0, learn_sigma=False)
    with torch.no_grad():  # adaLN-Zero starts with most gradients at 0
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    network.double()
    term = alignment().double()
    term.attach(network)
    x, times = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.linspace(0, 1, 6).double()

    def losses(rows):
        return network(x[rows], times[rows]).square().mean((1, 2, 3))

    return network, term, x, times, losses


def by_hand(term, tokens, images):
    """`-mean_n cos(...)` of each sample, after REPA's paper and in numpy."""
    numbers = [p.detach().numpy() for p in term.head.parameters()]
    h = tokens.detach().numpy()
    for weight, bias in ((numbers[0], numbers[1]), (numbers[2], numbers[3])):
        h = h @ weight.T + bias
        h = h / (1 + np.exp(-h))  # SiLU
    h = h @ numbers[4].T + numbers[5]
    f = term._features[0](images).detach().flatten(2).mT.numpy()
    cosines = (h * f).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(f, axis=-1)
    return -cosines.mean(-1)


def test_the_term_is_that_of_the_paper():
    network, term, x, _, losses = problem()
    seen = []
    network.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    rows = torch.tensor([4, 1, 5])
    added = term.added(losses, x)(rows)
    wanted = 0.5 * (1 + by_hand(term, seen[0], x[rows]))
    np.testing.assert_allclose((added - losses(rows)).detach().numpy(), wanted, rtol=1e-9)
    pair = term.added(lambda rows: (losses(rows), rows), x)(rows)
    torch.testing.assert_close(pair, (added, rows))
    factors = torch.linspace(1, 2, 6).double()
    scaled = term.added(losses, x, factors=factors)(rows) - losses(rows)
    np.testing.assert_allclose(scaled.detach().numpy(), wanted * factors[rows].numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("engine", "compiled"),
    [
        ("loop", False),
        ("one_pass", False),
        ("low_memory", False),
        ("auto", False),
        ("one_pass", True),
        pytest.param("loop", True, marks=pytest.mark.slow),
        pytest.param("low_memory", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autograd(engine, compiled):
    network, term, x, times, losses = problem()
    # Plain autograd, with everything written out.
    other, head = copy.deepcopy(network), copy.deepcopy(term.head)
    seen = []
    other.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    plain = other(x, times).square().mean((1, 2, 3))
    targets = features().double()(x).flatten(2).mT
    cosines = nn.functional.cosine_similarity(head(seen[0]), targets, dim=-1).mean(-1)
    of_samples = WEIGHTS[TASKS] / TASKS.bincount()[TASKS]
    trained = [p for p in other.parameters() if p.requires_grad]
    total = ((plain - 0.5 * cosines) * of_samples).sum()
    wanted = torch.autograd.grad(total, trained, retain_graph=True)
    of_head = torch.autograd.grad(-0.5 * cosines.mean(), list(head.parameters()))

    if compiled:
        torch._dynamo.reset()
        network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    step = MultiTaskStep(network, Fixed(3), engine=engine)
    for _ in range(2):  # the second step has no checks
        report = step.backward(term.added(losses, x), TASKS)
        term.backward()
    assert report.gramian.shape == (3, 3)
    named = [p for p in network.parameters() if p.requires_grad]
    for p, gradient in zip(named, wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)
    for p, gradient in zip(term.head.parameters(), of_head, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(term.value, -cosines.mean().detach())


@pytest.mark.parametrize("balancer", [UncertaintyWeighting, IMTLL, FAMO])
def test_a_balancer_that_asks_twice_and_small_parts_change_no_gradient(balancer):
    network, term, x, _, losses = problem()
    found = []
    for size, scale, norm in ((None, 1.0, None), (2, 8.0, None), (None, 8.0, 1e-3)):
        step = MultiTaskStep(network, balancer(3), micro_batch_size=size)
        step.backward(term.added(losses, x), TASKS, loss_scale=scale)
        term.backward(loss_scale=scale, max_norm=norm)
        step.update()  # FAMO asks for the losses once more
        found.append(torch.cat([p.grad.flatten() for p in term.head.parameters()]) / scale)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0] * (1e-3 / found[0].norm()), rtol=1e-2, atol=0)


def test_cached_latents_without_their_first_stage_are_refused():
    model = flow_module(auxiliary=alignment())
    model.latent_space = LatentSpace(kind="vq", scale=1.0, shift=0.0, fingerprint="", source="")
    batch = Batch(torch.randn(2, 1, 8, 8), torch.arange(2), torch.arange(2))
    draws = model.draws(batch, model.clusters, step=0, rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"auxiliary\.features: need images, or a first_stage"):
        model._with_auxiliary(model.auxiliary, model.losses(batch.images, draws), batch, draws)


@pytest.mark.parametrize("method", ["vanilla", "uw", "pcgrad"])
def test_a_run_with_it_resumes_bit_for_bit(method, tmp_path):
    def parts():  # new ones for each run
        return {"auxiliary": alignment()}

    fit(tmp_path / "a", method=method, steps=4, model=parts())
    half = tmp_path / "b"
    fit(half, method=method, steps=2, model=parts())
    fit(half, method=method, steps=4, model=parts(), resume=half / "step=2.ckpt")
    assert_same(tmp_path / "a" / "step=4.ckpt", half / "step=4.ckpt")
    stored = everything(tmp_path / "a" / "step=4.ckpt")
    first = dict(alignment().named_parameters())
    for name, value in first.items():
        assert not torch.equal(stored[f".state_dict.auxiliary.{name}"], value)
    assert not any("features" in name for name in stored)
    assert not any("averages" in name and "head" in name for name in stored)


def test_off_it_is_bit_identical_and_a_checkpoint_without_it_is_refused(tmp_path):
    for name, kind in (("plain", DiT), ("watched", _Watched)):
        fit(tmp_path / name, steps=2, model={"kind": kind})
    plain = everything(tmp_path / "plain" / "step=2.ckpt")
    watched_run = everything(tmp_path / "watched" / "step=2.ckpt")
    weights = [name for name in plain if name.startswith((".state_dict", ".optimizer"))]
    for name in weights:
        one, two = plain[name], watched_run[name]
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    with pytest.raises(ConfigError, match=r"auxiliary: must be that of the checkpoint.*no head"):
        fit(
            tmp_path / "on",
            steps=4,
            model={"auxiliary": alignment()},
            resume=tmp_path / "plain" / "step=2.ckpt",
        )


class _Watched(DiT):
    """A network whose block is watched by an alignment that no run has."""

    def __init__(self, **settings):
        super().__init__(**settings)
        alignment().attach(self)


def test_two_steps_from_yaml(tmp_path):
    config = tmp_path / "aligned.yaml"
    config.write_text(
        """
model:
  init_args:
    auxiliary:
      class_path: ant_lightning.FeatureAlignment
      init_args:
        block: blocks.1
        features:
          class_path: torch.nn.Conv2d
          init_args: {in_channels: 1, out_channels: 5, kernel_size: 2, stride: 2}
        width: 64
        feature_width: 5
        hidden_size: 16
"""
    )
    names = ("digits/sit", "balancer/pcgrad", "clustering/snr")
    files = [*(str(CONFIGS / f"{name}.yaml") for name in names), str(config)]
    args = [each for file in files for each in ("--config", file)]
    args += [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.batch_size=20",
        f"--trainer.logger.save_dir={tmp_path}",
    ]
    cli = run(["fit", *args])
    assert cli.trainer.global_step == 2
    assert -1 <= float(cli.model.auxiliary.value) <= 1
    roles = [group.get("role") for group in cli.trainer.optimizers[0].param_groups]
    assert roles == [None, "head"]


def flow_module(**settings):
    torch.manual_seed(0)
    return DiTModule(
        DiT(**SIZE, depth=1, num_heads=1, num_classes=10, learn_sigma=False),
        process=FlowMatching(num_timesteps=100),
        tasks=Tasks(SNRClustering(num_tasks=3)),
        seed=0,
        **settings,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "blocks.7"}, r"auxiliary\.block: must be a part of .* found 'blocks.7'"),
        ({"width": 4}, r"auxiliary\.width: must be the 8 channels of blocks.0, found 4"),
        ({"feature_width": 4}, r"auxiliary\.feature_width: must be the 5 channels of features"),
        ({"features": nn.Conv2d(1, 5, 2, 2)}, r"auxiliary\.features: must give the 4 patches"),
        ({"features": nn.Flatten()}, r"auxiliary\.features: must give a tensor \[b, n, 5"),
        ({"block": "x_embedder"}, None),
        ({"block": "t_embedder.mlp.0"}, r"auxiliary\.block: must give a tensor .* found \[10, 8"),
        ({"weight": 0.0}, "weight: must be above 0 and finite, found 0.0"),
        ({"hidden_size": 0}, "hidden_size: must be at least 1, found 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(settings, message, tmp_path):
    def train():
        sizes = {"width": 8, "feature_width": 5, "hidden_size": 16, "features": features()}
        term = FeatureAlignment(**({"block": "blocks.0"} | sizes | settings))
        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(flow_module(auxiliary=term), datamodule=DigitsData(batch_size=10))

    if message is None:
        train()  # any part whose output has patches will do
        return
    with pytest.raises(ConfigError, match=message) as found:
        train()
    assert "\n" not in str(found.value)


def test_analysis_and_validation_leave_the_term_out():
    images = torch.randn(6, 1, 8, 8)
    batch = Batch(images, torch.arange(6), torch.arange(6))
    found = []
    for term in (None, alignment()):
        model = flow_module(auxiliary=term)
        draws = model.draws(batch, model.clusters, step=0, rank=0, world_size=1)
        found.append(model.losses(images, draws)(torch.arange(6))[0])
    assert torch.equal(*found)
