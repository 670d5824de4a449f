"""Sampling of a module: processes, their samplers, guidance in an interval and by a checkpoint."""

import pytest
import torch
from grouped import grouped
from tiny_digits import saved

from ant_lightning import (
    DDIM,
    EDM,
    ConfigError,
    DiffusersSampler,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    EDMSampler,
    FlowMatching,
    MultiTaskDiffusion,
    ODESampler,
    Sampling,
    SDESampler,
    SNRClustering,
    Tasks,
)
from ant_lightning.transfer.switching import SpecialistSampler

SIZES = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}


def network(seed=0, *, depth=1, learn_sigma=False, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = DiT(**{**SIZES, **settings}, depth=depth, learn_sigma=learn_sigma)
        for parameter in dit.parameters():  # the published initialisation answers 0
            torch.nn.init.normal_(parameter, std=0.2)
    return dit


def module(process, *, seed=0, backbone=None, **sampling):
    return MultiTaskDiffusion(
        backbone or network(seed),
        process=process,
        tasks=Tasks(SNRClustering(num_tasks=3)),
        sampling=Sampling(**sampling),
        seed=3,
    ).eval()


def called(model):
    """Sizes of the batches of all calls of the backbone."""
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


CASES = {
    "ddpm": (DiscreteDiffusion(), DDIM(5)),
    "flow": (FlowMatching(), ODESampler(4)),
    "sde": (FlowMatching("gvp"), SDESampler(4)),
    "adaptive": (FlowMatching(), ODESampler(method="bosh3", rtol=1e-2, atol=1e-2)),
    "edm": (EDM(), EDMSampler(4, S_churn=2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_a_function_of_seed_and_index(name):
    process, sampler = CASES[name]
    model = module(process, sampler=sampler, guidance_scale=2.0)
    together = model.sample([0, 1, 2, 3])
    assert together.shape == (4, 1, 4, 4)
    assert together.isfinite().all()
    # A batch of another size is rounded otherwise. A fixed method changes by as much, an adaptive
    # one may choose its steps by it: it changes by less than its tolerance.
    atol = 1e-2 if name == "adaptive" else 2e-5
    torch.testing.assert_close(model.sample([2]), together[2:3], rtol=0, atol=atol)
    torch.testing.assert_close(model.sample([3, 2]), together[[3, 2]], rtol=0, atol=atol)
    # In a batch of the same size not a bit depends on the other images.
    assert torch.equal(model.sample([0, 7, 8, 9])[0], together[0])
    assert not torch.allclose(model.sample([2], seed=4), together[2:3])


@pytest.mark.parametrize("name", CASES)
def test_interval_of_guidance(name):
    process, sampler = CASES[name]
    sizes = called(model := module(process, sampler=sampler, guidance_scale=3.0))
    guided = model.sample(2)
    num_guided = sum(sizes)
    sizes.clear()
    plain = model.sample(2, guidance_scale=1.0)
    num_plain = sum(sizes)
    assert not torch.equal(plain, guided)
    outside = module(process, sampler=sampler, guidance_scale=3.0, guidance_interval=(1e6, 1e7))
    sizes = called(outside)
    assert torch.equal(outside.sample(2), plain)
    assert sum(sizes) == num_plain
    if name == "adaptive":  # whose steps depend on the field, and are tiny at the interval's ends
        return
    assert num_guided == 2 * num_plain
    inside = module(process, sampler=sampler, guidance_scale=3.0, guidance_interval=(0.3, 5.0))
    assert not torch.equal(inside.sample(2), plain)
    assert not torch.equal(inside.sample(2), guided)


def test_autoguidance_by_an_earlier_checkpoint_and_a_smaller_network(tmp_path):
    process, sampler = FlowMatching(), ODESampler(3, method="euler")
    weaker = module(process, seed=1)
    path = saved(weaker, tmp_path / "early.ckpt")
    settings = {"sampler": sampler, "guide_checkpoint": path, "guide_weights": "model"}
    model = module(process, guidance_scale=2.0, **settings)
    found = model.sample(2)

    def by_hand(x, times, labels):
        strong, weak = (each.denoise(x, times, labels) for each in (model, weaker))
        return weak + 2.0 * (strong - weak)

    with torch.no_grad():
        labels, noise = torch.tensor([0, 1]), model.image_noise([0, 1])
        wanted = sampler.sample(process, lambda x, t: by_hand(x, t, labels), noise())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    # The guide is in no checkpoint, is not trained, and follows the module.
    assert not any("guide" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(list(weaker.parameters()))
    assert next(model.double().guide.parameters()).dtype == torch.float64
    # A network without a null class and one without classes can be guided, too.
    small = network(2, depth=2, num_classes=0)
    plain = module(process, backbone=small)
    path = saved(plain, tmp_path / "small.ckpt")
    model = module(
        process,
        backbone=network(class_dropout_prob=0.0),
        guidance_scale=2.0,
        sampler=sampler,
        guide_checkpoint=path,
        guide_weights="model",
        guide_backbone=network(5, depth=2, num_classes=0),
    )
    assert model.null_class is None
    assert not torch.equal(model.sample(2), model.sample(2, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"guidance_interval": (2.0, 1.0)},
            "guidance_interval: must satisfy 0 .*found 2.0",
        ),
        ({"guide_backbone": network()}, "guide_checkpoint: needed with a guide_backbone"),
        (
            {"guide_checkpoint": "/nope.ckpt"},
            "sampling.guide_checkpoint: /nope.ckpt: no such file",
        ),
        ({"sampler": DDIM(5)}, "^sampling.sampler: must be one for FlowMatching, found DDIM"),
        (
            {"sampler": EDMSampler()},
            "^sampling.sampler: must be one for FlowMatching, found EDMSampler",
        ),
        ({"sampler": SDESampler(diffusion="sbdm")}, "diffusion: must be finite at t = 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        module(FlowMatching(), **settings)


def test_a_checkpoint_of_another_network_does_not_guide(tmp_path):
    path = saved(module(FlowMatching(), backbone=network(depth=2)), tmp_path / "deep.ckpt")
    settings = {"guide_checkpoint": path, "guide_weights": "model"}
    with pytest.raises(ConfigError, match=r"sampling.guide_checkpoint: .*deep.ckpt: must fit"):
        module(FlowMatching(), **settings)
    with pytest.raises(ConfigError, match=r"guide_checkpoint: .*'ema'|guide_checkpoint: .*ema"):
        module(FlowMatching(), guide_checkpoint=path)
    with pytest.raises(ConfigError, match=r"guide_backbone: num_classes must be .* 3, found 2"):
        module(FlowMatching(), guide_backbone=network(num_classes=2), **settings)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        (FlowMatching(), ODESampler(6)),
        (FlowMatching(), SDESampler(6)),
        (EDM(), EDMSampler(6, S_churn=3.0)),
    ],
    ids=["ode", "sde", "edm"],
)
def test_a_specialist_takes_over_inside_its_cells(process, sampler):
    """The model as its own specialist gives its own images; another one changes them."""
    model, other = module(process, sampler=sampler), network(7)
    switching = SpecialistSampler(model, [(0, 300), (300, 700), (700, 1000)])
    own = switching.sample([0, 1])
    assert torch.equal(own, model.sample(2))
    assert switching.num_steps == 6
    firsts = [switching.first_step[each] for each in switching.intervals]
    assert firsts[0] > firsts[1] > firsts[2] == 0
    for interval in switching.intervals:
        again = switching.sample_with(model.backbone, interval, [0, 1])
        torch.testing.assert_close(again, own, rtol=0, atol=1e-6)
        assert not torch.allclose(switching.sample_with(other, interval, [0, 1]), own)


def test_an_adaptive_solver_does_not_switch_between_networks():
    model = module(FlowMatching(), sampler=ODESampler(method="dopri5"))
    with pytest.raises(ConfigError, match=r"sampler: must have fixed times .*dopri5"):
        SpecialistSampler(model, [(0, 1000)]).sample([0])


def test_default_samplers_and_schedulers_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert isinstance(module(FlowMatching()).sampler, ODESampler)
    assert isinstance(module(EDM()).sampler, EDMSampler)
    settings = grouped(tasks=Tasks(SNRClustering(num_tasks=3)))
    assert DiTModule(network(learn_sigma=True), **settings).sampler.num_steps == 250
    sampler = DiffusersSampler(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps=3)
    assert module(FlowMatching(), sampler=sampler).sample(2).isfinite().all()
