"""Networks of diffusers train, resume and are guided, each as its pipeline calls it."""

import diffusers
import pytest
import torch
from diffusers_networks import CASES, FLUX, SHAPES, Images, backbone, fit, module, network
from torchjd.aggregation import UPGradWeighting

from ant_lightning import (
    DWA,
    EDM,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    STCH,
    ConfigError,
    ContinuousUncertainty,
    DiffusersBackbone,
    DiscreteDiffusion,
    FlowMatching,
    GradNorm,
    GradVac,
    LinearScalarization,
    MultiTaskDiffusion,
    NashMTL,
    PCGrad,
    SNRClustering,
    Tasks,
    TorchJDBalancer,
    UncertaintyWeighting,
    stored_process,
)
from ant_lightning.cli.configs import config_names
from ant_lightning.exports.pipeline_folder import write_pipeline

SD3, FAST = "SD3Transformer2DModel", {"uw", "gradnorm"}
BALANCERS = {
    "vanilla": lambda k: None,
    "linear": LinearScalarization,
    "uw": UncertaintyWeighting,
    "continuous_uw": ContinuousUncertainty,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "nash": NashMTL,
    "gradnorm": lambda k: GradNorm(k, initial_steps=1),  # the second step moves its weights
    "famo": FAMO,
    "gls": GLS,
    "imtl_l": IMTLL,
    "stch": STCH,
    "dwa": DWA,
    "rlw": RLW,
    "upgrad": lambda k: TorchJDBalancer(k, weighting=UPGradWeighting()),
}
# All pairs take minutes; each network has one balancer of losses and one of gradients in any case.
PAIRS = [
    pytest.param(case, name, marks=[] if case == SD3 or name in FAST else pytest.mark.slow)
    for case in CASES
    for name in BALANCERS
]


# One of each kind of call: with captions, with labels, with both kinds of guidance, and none.
RESUMED = {SD3, "DiTTransformer2DModel", "UNet2DConditionModel", "UNet2DModel", CASES[-2]}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in RESUMED else pytest.mark.slow) for c in CASES],
)
def test_two_steps_under_pcgrad_resume_bit_for_bit_and_sample_with_guidance(tmp_path, case):
    made = module(case, PCGrad(3))
    before = {name: each.clone() for name, each in made.state_dict().items()}
    whole = fit(tmp_path / "whole", made, 2)
    assert any(not torch.equal(whole[name], before[name]) for name in before)
    fit(tmp_path / "parts", module(case, PCGrad(3)), 1)
    resumed = fit(
        tmp_path / "parts", module(case, PCGrad(3)), 2, resume=tmp_path / "parts" / "step=1.ckpt"
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    net, scale = made.backbone, 2.0 if made.backbone.null_condition else 1.0
    told = {name: each[:2] for name, each in Images(net).told.items()}
    made.sampler.num_steps = 2
    drawn = made.sample(2, condition=told or None, guidance_scale=scale)
    assert drawn.shape == (2, net.in_channels, *net.input_size)
    assert drawn.isfinite().all()


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_two_steps_under_every_balancer(tmp_path, case, name):
    made = module(case, BALANCERS[name](3))
    before = {name: each.clone() for name, each in made.backbone.state_dict().items()}
    fit(tmp_path, made, 2)
    assert made.last_report.finite
    assert made.num_skipped_steps == 0
    after = made.backbone.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_every_balancer_of_the_configs_is_tried():
    names = {name.removeprefix("balancer/") for name in config_names() if "balancer/" in name}
    assert names == set(BALANCERS)


def test_a_unet_as_edm_and_as_it_is_handed_over():
    made = MultiTaskDiffusion(
        network("UNet2DModel"), process=EDM(), tasks=Tasks(SNRClustering(3)), seed=0
    )
    assert isinstance(made.backbone, DiffusersBackbone)
    assert made.image_shape == (3, 8, 8)
    made.sampler.num_steps = 2
    assert made.sample(2).isfinite().all()


def test_the_velocity_is_noise_minus_data_and_the_time_1000_sigma():
    made = module()
    seen = {}
    made.backbone.network.register_forward_pre_hook(
        lambda part, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    told = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    x, sigma = torch.randn(2, 4, 4, 4), torch.tensor([0.25, 0.5], dtype=torch.float64)
    output = made.denoise(x, sigma, told)
    assert seen["timestep"].tolist() == [250.0, 500.0]
    terms = made.process.losses(
        output, x_start=torch.zeros_like(x), x_t=x, times=sigma, noise=output.detach()
    )
    torch.testing.assert_close(terms.mse, torch.zeros(2))


def test_flux_is_packed_as_its_pipeline_packs():
    net = backbone(FLUX)
    seen = {}
    net.network.register_forward_pre_hook(
        lambda part, args, kwargs: seen.update(kwargs, packed=args[0]), with_kwargs=True
    )
    x = torch.randn(2, 4, 4, 6)
    told = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    output = net(x, torch.tensor([100.0, 900.0]), told)
    pipeline = diffusers.FluxPipeline
    assert torch.equal(seen["packed"], pipeline._pack_latents(x, 2, 4, 4, 6))
    ids = pipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], ids)
    torch.testing.assert_close(seen["timestep"], torch.tensor([0.1, 0.9]))
    direct = net.network(
        seen["packed"],
        told["encoder_hidden_states"],
        told["pooled_projections"],
        **{name: seen[name] for name in ("timestep", "img_ids", "txt_ids")},
    ).sample
    assert torch.equal(pipeline._unpack_latents(direct, 32, 48, 8), output)


def test_a_dit_of_diffusers_drops_no_label_by_itself():
    net = backbone("DiTTransformer2DModel").train()
    x, t, told = torch.randn(8, 4, 4, 4), torch.full((8,), 50), {"labels": torch.arange(8) % 5}
    assert all(torch.equal(net(x, t, told), net(x, t, told)) for _ in range(4))
    assert net.null_condition == {"labels": 5}


SCHEDULERS = {
    "DDPMScheduler": {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"},
    "DDIMScheduler": {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "PNDMScheduler": {"beta_schedule": "linear", "num_train_timesteps": 500},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "DPMSolverMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "EDMEulerScheduler": {"sigma_max": 60.0},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_process_is_that_of_the_stored_scheduler(tmp_path, name):
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    scheduler.save_pretrained(tmp_path / "scheduler")
    process = stored_process(str(tmp_path))
    if isinstance(process, DiscreteDiffusion):
        # diffusers' table is in float32; its cumulative product of T factors loses up to T ulps.
        found = process.alphas_cumprod.float()
        torch.testing.assert_close(found, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
        assert process.prediction_type == ("v" if name == "DDIMScheduler" else "eps")
        assert process.variance_type == (
            "fixed_large" if name == "DDPMScheduler" else "fixed_small"
        )
    elif isinstance(process, FlowMatching):
        assert (process.convention, process.sampling_density.shift) == ("diffusers", 3.0)
    else:
        assert isinstance(process, EDM)
        assert process.max_time == pytest.approx(60.0)


def test_a_stored_network_is_the_one_that_was_saved(tmp_path):
    saved = network("DiTTransformer2DModel")
    saved.save_pretrained(tmp_path / "transformer")
    found = DiffusersBackbone(folder=str(tmp_path)).network
    assert all(map(torch.equal, found.state_dict().values(), saved.state_dict().values()))
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    assert stored_process(str(tmp_path)).variance_type == "learned_range"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (DiffusersBackbone, "folder: needed without a network"),
        (lambda: DiffusersBackbone(torch.nn.Linear(1, 1)), "network: must be one of .* Linear"),
        (lambda: DiffusersBackbone(network(FLUX, in_channels=16)), "input_size: must be given"),
        (lambda: DiffusersBackbone(network(FLUX), input_size=(4, 5)), "input_size: must be even"),
        (
            lambda: DiffusersBackbone(network("SD3Transformer2DModel"), masks=True),
            "masks: must be false for SD3",
        ),
        (
            lambda: DiffusersBackbone(network("UNet2DModel"), null_class=3),
            "null_class: must be None for a network without labels, found 3",
        ),
        (
            lambda: DiffusersBackbone(network("DiTTransformer2DModel"), null_class=6),
            "null_class: must be a row of the table, 0 to 5, found 6",
        ),
        (
            lambda: DiffusersBackbone(network("UNet2DModel", class_embed_type="timestep")),
            "class_embed_type of UNet2DModel must be None, found 'timestep'",
        ),
        (lambda: stored_process("/nowhere"), "folder: must hold a scheduler of diffusers"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_folder_of_another_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match=r"folder: must hold one of UNet2DModel.*AutoencoderKL"):
        DiffusersBackbone(folder=str(tmp_path))


@pytest.mark.parametrize("case", ["SD3Transformer2DModel", "UNet2DModel"])
def test_what_was_trained_leaves_as_parts_of_a_pipeline_and_comes_back(tmp_path, case):
    made = module(case)
    made.sampler.num_steps = 10
    notes = write_pipeline(made, tmp_path)
    if case == SD3:
        assert notes[0].startswith("parts of a pipeline, transformer and scheduler, for")
    else:
        assert notes == []
        assert (
            type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)).__name__ == "DDPMPipeline"
        )
    back = DiffusersBackbone(folder=str(tmp_path))
    theirs = back.network.state_dict()
    assert all(torch.equal(theirs[n], v) for n, v in made.backbone.network.state_dict().items())
    process = stored_process(str(tmp_path))
    torch.testing.assert_close(process.log_snr, made.process.log_snr)
    assert process.prediction_type == made.process.prediction_type
