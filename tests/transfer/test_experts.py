"""Interval experts: switched by the noise level, merged by weights, compared and reported."""

import json

import pytest
import torch
from tiny_digits import TinyDiT, module, saved, trainer

from ant_lightning import (
    DDIM,
    DDPM,
    ConfigError,
    DigitsData,
    DigitsFeatures,
    DiscreteDiffusion,
    ExpertComparison,
    FlowMatching,
    IntervalExperts,
    LoRA,
    merged_weights,
    with_experts,
)
from ant_lightning.cli.report import write_report
from ant_lightning.transfer.experts import borders_between

INTERVALS = ((0, 30), (60, 100))
SAMPLER = DDPM(num_steps=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Specialists of random weights for the two ends of the noise axis."""
    folder = tmp_path_factory.mktemp("experts")
    return [
        saved(module(TinyDiT(seed=i + 1), interval=interval), folder / f"expert_{i}.ckpt")
        for i, interval in enumerate(INTERVALS)
    ]


def base(**settings):
    return module(TinyDiT(seed=0), sampler=SAMPLER, **settings).eval()


def switched_by_hand(model, index):
    """The image of an index, written out: one network for each step, by its timestep."""
    networks = [TinyDiT(seed=1).eval(), TinyDiT(seed=0).eval(), TinyDiT(seed=2).eval()]

    def denoiser(x, t):
        place = 0 if t[0] < 30 else 1 if t[0] < 60 else 2
        return networks[place](x, t, torch.full((len(x),), index % 10))

    noise = model.image_noise([index])
    with torch.no_grad():
        return SAMPLER.sample(
            model.process, denoiser, noise(), noise=noise, clip_denoised=model.clip_denoised
        ).clamp(-1, 1)


def test_sampling_switches_at_the_borders(files):
    model = base()
    switched = with_experts(model, files, averaged=False)
    torch.testing.assert_close(switched.sample([7]), switched_by_hand(model, 7), atol=1e-5, rtol=0)
    assert not torch.allclose(switched.sample([7]), model.sample([7]), atol=1e-2)
    # The order of the files does not matter, and the base is as it was.
    again = with_experts(model, files[::-1], averaged=False)
    assert torch.equal(again.sample([7]), switched.sample([7]))
    assert model.backbone.state_dict().keys() == TinyDiT().state_dict().keys()


def test_a_batch_of_several_noise_levels_is_split():
    networks = [TinyDiT(seed=i).eval() for i in range(2)]
    experts = IntervalExperts([networks[0], networks[1], networks[0]], [29.5, 59.5])
    x, t, labels = torch.randn(5, 1, 8, 8), torch.tensor([29, 30, 99, 59, 60]), torch.arange(5)
    with torch.no_grad():
        output = experts(x, t, labels)
        for i, network in enumerate((0, 1, 0, 1, 0)):
            rows = slice(i, i + 1)
            expected = networks[network](x[rows], t[rows], labels[rows])
            torch.testing.assert_close(output[rows], expected, atol=1e-6, rtol=1e-5)
    assert (experts.input_size, experts.num_classes, experts.null_class) == (8, 10, 10)
    # The network of two intervals is there once.
    assert sum(p.numel() for p in experts.parameters()) == 2 * sum(
        p.numel() for p in networks[0].parameters()
    )
    with pytest.raises(ConfigError, match=r"borders: must be 1 rising numbers.*found \[1, 2\]"):
        IntervalExperts(networks, [1, 2])


@pytest.mark.parametrize(
    "process", [DiscreteDiffusion(), FlowMatching(), FlowMatching(convention="diffusers")]
)
def test_every_cell_goes_to_its_interval(process):
    borders, rising = borders_between(process, [300, 700])
    experts = IntervalExperts([torch.nn.Identity() for _ in range(3)], borders, rising=rising)
    every = torch.arange(process.num_timesteps)
    _, told = process.network_inputs(torch.zeros(len(every), 1, 1, 1), process.times(every))
    expected = (every >= 300).long() + (every >= 700).long()
    assert torch.equal(experts.expert_of(told), expected)


def test_merged_weights_are_a_sum_and_zero_is_the_base(files):
    model = base()
    zero = with_experts(model, files, merge_weights=[0, 0], averaged=False).backbone.state_dict()
    own = model.backbone.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in zero.items())
    one = with_experts(model, files, merge_weights=[0, 1.0], averaged=False)
    expert = TinyDiT(seed=2).state_dict()
    for name, value in one.backbone.state_dict().items():
        torch.testing.assert_close(value, expert[name], atol=1e-6, rtol=0)
    pair = [TinyDiT(seed=i).double().state_dict() for i in (1, 2)]
    wide = {name: value.double() for name, value in own.items()}
    found = merged_weights(wide, pair, [0.3, -0.5])
    for name, value in found.items():
        expected = 1.2 * wide[name] + 0.3 * pair[0][name] - 0.5 * pair[1][name]
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match=r"weights: must be 2, .*found \[1.0\]"):
        with_experts(model, files, merge_weights=[1.0], averaged=False)


def test_adapters_are_folded_in(tmp_path):
    """Specialists that are LoRA of one base: their files hold the adapter alone."""

    def adapted(seed, **settings):
        made = module(
            TinyDiT(), sampler=SAMPLER, adapter=LoRA(r=2, target_modules=("qkv",)), **settings
        ).eval()
        torch.manual_seed(seed)
        for name, parameter in made.backbone.named_parameters():
            if "lora_" in name and seed:
                torch.nn.init.normal_(parameter, std=0.5)
        return made

    model = adapted(0)
    experts = [adapted(i + 1, interval=interval) for i, interval in enumerate(INTERVALS)]
    paths = [saved(each, tmp_path / f"lora_{i}.ckpt") for i, each in enumerate(experts)]
    held = torch.load(paths[0], weights_only=True)["state_dict"]
    assert all("lora_" in name for name in held if name.startswith("backbone."))
    switched = with_experts(model, paths, averaged=False)
    x, labels = torch.randn(3, 1, 8, 8), torch.arange(3)
    for cell, owner in ((10, experts[0]), (45, model), (80, experts[1])):
        t = torch.full((3,), cell)
        with torch.no_grad():
            expected = owner.backbone(x, t, labels)
            output = switched.backbone(x, t, labels)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # Weights of the merge multiply the products of the factors, not the factors.
    merged = with_experts(model, paths, merge_weights=[0.5, 0.25], averaged=False)
    weight = "blocks.0.attn.qkv.weight"
    change = merged.backbone.state_dict()[weight] - TinyDiT().state_dict()[weight]
    wanted = torch.zeros_like(change)
    for share, each in zip((0.5, 0.25), experts, strict=True):
        own = each.backbone.state_dict()
        a, b = (own[f"blocks.0.attn.qkv.lora_{x}.default.weight"] for x in "AB")
        wanted += share * b @ a
    torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-4)
    other = adapted(0)
    other.base_weights = "another"
    with pytest.raises(ConfigError, match=r"model.base_weights another like the multi-task model"):
        with_experts(other, paths, averaged=False)


def test_what_is_no_specialist_or_overlaps_is_refused(files, tmp_path):
    model = base()
    whole = saved(module(TinyDiT()), tmp_path / "whole.ckpt")
    with pytest.raises(ConfigError, match=r"specialists\[1\]: must be the checkpoint of a special"):
        with_experts(model, [files[0], whole])
    other = saved(module(TinyDiT(), interval=(20, 50)), tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"do not overlap, found \[0, 30\] and \[20, 50\]"):
        with_experts(model, [*files, other], averaged=False)


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_the_report_compares_base_switched_and_merged(files, tmp_path):
    comparison = ExpertComparison(
        specialists=files,
        merge_weights=[0.0, 0.0],
        extractor=DigitsFeatures(),
        num_images=8,
        num_held_out=6,
        num_draws=2,
    )
    run = trainer(tmp_path, comparison, limit_val_batches=1)
    model = module(TinyDiT(seed=0), sampler=DDIM(num_steps=3))
    run.validate(model, DigitsData(batch_size=8), verbose=False)
    found = comparison.result
    assert list(found) == ["base", "switched", "merged"]
    assert found["merged"] == found["base"]  # weights of 0
    assert list(found["base"]) == ["loss", "loss in [0, 30)", "loss in [60, 100)", "FID"]
    for name, value in found["switched"].items():
        assert value != found["base"][name]
    # Elsewhere the switched model is the base: the losses over all cells differ by the intervals'.
    assert json.loads((tmp_path / "interval_experts.jsonl").read_text())["models"] == found
    (tmp_path / "config.yaml").write_text("model: {class_path: ant_lightning.DiTModule}\n")
    text = write_report(tmp_path).read_text()
    assert "## Interval experts" in text
    for name, values in found.items():
        assert f"| {name} | {values['loss']:.4g} |" in text
