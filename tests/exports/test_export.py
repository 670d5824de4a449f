"""Networks and pipelines of an export compute and sample the same as the module."""

import json
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
)
from exported import (
    DIT,
    UNET,
    UNETS,
    adm,
    adm_with_classes,
    ddim,
    dit,
    dit_of_diffusers,
    edm,
    flow,
    labelled,
    module,
    routed_rectangle,
    same_images,
)
from first_stages import save_first_stages

from ant_lightning import (
    DDIM,
    DDPM,
    CosineSchedule,
    DiscreteDiffusion,
    DiT,
    EDMSampler,
    FirstStage,
    FlowMatching,
    ODESampler,
    ScaledLinearSchedule,
    UNet,
    load_official_checkpoint,
)
from ant_lightning.errors import ConfigError
from ant_lightning.exports.card import model_card
from ant_lightning.exports.official_notes import official_notes
from ant_lightning.exports.pipeline_folder import write_pipeline
from ant_lightning.exports.single_files import write_official, write_program
from ant_lightning.exports.stock import stock_of


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return save_first_stages(tmp_path_factory.mktemp("stages"))


def ldm(stages, kind="kl"):
    channels = {"kl": 4, "vq": 3}[kind]
    network = UNet(**UNETS["ldm"] | {"in_channels": channels, "out_channels": channels})
    process = DiscreteDiffusion(ScaledLinearSchedule())
    sampler = DDIM(5, spacing="ldm")
    stage = FirstStage(str(stages / kind), scale=0.5, shift=0.1)
    return module(network, process, stage, sampler=sampler, guidance_scale=2.0)


CASES = {
    "adm": adm,
    "ddim": ddim,
    "labelled": labelled,
    "adm_with_classes": adm_with_classes,
    "dit": dit,
    "routed_rectangle": routed_rectangle,
    "flow": flow,
    "flow_of_diffusers": lambda: flow("diffusers", shift=3.0),
    "edm": edm,
}
STOCK = {"adm": "DDPMPipeline", "ddim": "DDIMPipeline"}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_draws_the_images_of_the_run(case, tmp_path, monkeypatch):
    made = CASES[case]()
    notes = write_pipeline(made, tmp_path)
    assert notes == []
    pipeline = same_images(made, tmp_path, monkeypatch)
    assert type(pipeline).__name__ == STOCK.get(case, "ANTPipeline")


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_latent_pipeline_has_first_stage_and_classes(kind, stages, tmp_path, monkeypatch):
    made = ldm(stages, kind)
    assert write_pipeline(made, tmp_path) == []
    pipeline = same_images(made, tmp_path, monkeypatch)
    tokens = pipeline.class_table(torch.tensor([2]))
    assert torch.equal(tokens[0, 0], made.backbone.class_embedder["embedding"].weight[2])
    assert pipeline(class_labels=[1], num_inference_steps=1).images[0].size == (8, 8)


def test_a_pipeline_knows_the_names_of_classes_and_refuses_others(tmp_path, monkeypatch, caplog):
    write_pipeline(labelled(), tmp_path, class_names=["cat", "dog", "hen"])
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["1"] == "dog"
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        pipeline = same_images(labelled(), tmp_path, monkeypatch)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == []
    assert pipeline.get_label_ids(["dog", "cat"]) == [1, 0]
    with pytest.raises(ValueError, match="one of cat, dog, hen; found 'owl'"):
        pipeline.get_label_ids("owl")
    for label in (4, -1):
        with pytest.raises(ValueError, match=rf"class_labels: must be from 0 to 3, found {label}"):
            pipeline(class_labels=[0, label])
    pipeline.save_pretrained(tmp_path / "again")
    found = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert found["id2label"]["2"] == "hen"


def test_a_pipeline_without_classes_takes_no_labels(tmp_path, monkeypatch):
    write_pipeline(edm(), tmp_path)
    pipeline = same_images(edm(), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="label: must be one of none"):
        pipeline.get_label_ids("cat")
    with pytest.raises(ValueError, match="class_labels: must be left out"):
        pipeline(class_labels=[0])


def latents_of(stages, kind, network, **sampling):
    process = DiscreteDiffusion(ScaledLinearSchedule(), variance_type="fixed_small")
    if getattr(network, "out_channels", 0) == 8:
        process = DiscreteDiffusion(ScaledLinearSchedule(), variance_type="learned_range")
    return module(network, process, FirstStage(str(stages / kind), scale=0.5), **sampling)


def latent_unet(stages):
    sizes = {"input_size": 4, "in_channels": 3, "out_channels": 3}
    return latents_of(stages, "vq", UNet(**UNET | sizes), sampler=DDIM(5, eta=0.3, spacing="ldm"))


LATENTS = {
    "LDMPipeline": latent_unet,
    "DiTPipeline": lambda stages: latents_of(
        stages, "kl", dit_of_diffusers(1000), sampler=DDIM(5), guidance_scale=1.5
    ),
    "ANTPipeline": lambda stages: latents_of(  # the null class of `DiTPipeline` is 1,000
        stages, "kl", dit_of_diffusers(5), sampler=DDIM(5), guidance_scale=1.5
    ),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents_leave_as_a_pipeline_of_diffusers(name, stages, tmp_path, monkeypatch):
    made = LATENTS[name](stages)
    assert write_pipeline(made, tmp_path) == []
    pipeline = same_images(made, tmp_path, monkeypatch)
    assert type(pipeline).__name__ == name
    stock = stock_of(made)
    card = model_card(made, {}, tmp_path, about=ABOUT)
    assert ("trust_remote_code" in card) == (stock is None)
    assert (stock.example() if stock else "num_inference_steps=5)") in card


ABOUT = {"to": "diffusers", "weights": "ema", "experts": [], "merge_weights": None, "notes": []}


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (dit, "class_labels=[0, 1, 2, 3], guidance_scale=1.5, num_inference_steps=5"),
        (adm_with_classes, "class_labels=[0, 1, 2, 3], guidance_scale=1.0, num_inference_steps=5"),
        (ddim, "batch_size=4, num_inference_steps=5, eta=0.3, use_clipped_model_output=True"),
        (edm, "batch_size=4, num_inference_steps=4"),
    ],
)
def test_the_call_in_the_card_draws_the_images_of_the_run(make, call, tmp_path, monkeypatch):
    made = make()
    write_pipeline(made, tmp_path)
    card = model_card(made, {}, tmp_path, about=ABOUT)
    assert f"pipeline({call}).images" in card
    assert "Drawn as in the run" in card
    noise = made.image_noise(range(4))
    for place in ("schedulers.scheduling_ddpm", "schedulers.scheduling_ddim", "utils.torch_utils"):
        monkeypatch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: noise())
    load, draw = re.search(r"```python\n(.*?)(images = .*?)\n```", card, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(load, names)
    own = sys.modules[type(names["pipeline"]).__module__]
    monkeypatch.setattr(own, "randn_tensor", lambda *_, **__: noise(), raising=False)
    exec(draw, names)
    images = torch.stack([torch.from_numpy(np.array(each)) for each in names["images"]])
    expected = 255 * (made.sample(4) / 2 + 0.5).movedim(1, -1)
    # Pillow rounds, and has no axis for one channel.
    torch.testing.assert_close(images.view_as(expected).float(), expected, atol=1.0, rtol=0)


@pytest.mark.parametrize(
    "changed",
    [{"guided_channels": 3}, {"sampler": DDIM(5, eta=0.5)}, {"sampler": DDPM(5)}],
    ids=["guided channels", "eta", "DDPM"],
)
def test_what_a_pipeline_of_diffusers_does_otherwise_keeps_our_own(changed, stages):
    settings = {"sampler": DDIM(5), "guidance_scale": 1.5} | changed
    assert stock_of(latents_of(stages, "kl", dit_of_diffusers(1000), **settings)) is None


@pytest.mark.parametrize("make", [dit, routed_rectangle])
def test_networks_of_a_folder_compute_the_same_at_all_times(make, tmp_path):
    made = make()
    write_pipeline(made, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    x, t = torch.randn(4, *made.image_shape), torch.tensor([0, 1, 500, 999])
    labels = torch.arange(4)
    with torch.no_grad():
        expected = made.backbone(x, t, labels)
        output = pipeline.transformer(x, t, class_labels=labels).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    back = make().backbone.requires_grad_(False)
    torch.nn.init.zeros_(back.blocks[0].mlp.fc1.weight)
    load_official_checkpoint(back, tmp_path)
    assert torch.equal(back.eval()(x, t, labels), expected)


def test_a_routed_network_does_not_come_back_without_its_routing(tmp_path):
    made = routed_rectangle()
    write_pipeline(made, tmp_path)
    other = DiT(**DIT | {"input_size": (8, 12)}, in_channels=1, num_classes=5)
    with pytest.raises(
        ConfigError, match=r"must have routing None as the backbone, found \[1.0, 0"
    ):
        load_official_checkpoint(other, tmp_path)


def test_what_samples_otherwise_is_said(tmp_path):
    made = dit()
    made.sampler = DDIM(7, spacing="even")
    (note,) = write_pipeline(made, tmp_path)
    others = ": the same noise gives other images than in the run"
    visits = "DDIMScheduler visits other timesteps than the run's DDIM(num_steps=7, spacing=even)"
    assert note == visits + others
    heun = flow()
    heun.sampler = ODESampler(4)
    (note,) = write_pipeline(heun, tmp_path / "heun")
    euler = "Euler's method on even times samples in place of the run's "
    assert note == f"{euler}ODESampler(num_steps=4){others}"
    karras = edm()
    karras.sampler = EDMSampler(4, S_churn=2.0)
    (note,) = write_pipeline(karras, tmp_path / "karras")
    assert note == (
        "EDMEulerScheduler, which is of first order, samples in place of the run's "
        f"EDMSampler(num_steps=4, S_churn=2.0){others}"
    )


def test_what_has_no_scheduler_is_refused(tmp_path):
    made = module(DiT(**DIT, in_channels=2, num_classes=0), FlowMatching("gvp"))
    with pytest.raises(ConfigError, match=r"process.path: must be linear .*found gvp"):
        write_pipeline(made, tmp_path)
    made = module(DiT(**DIT, in_channels=2, num_classes=0), FlowMatching(prediction_type="eps"))
    with pytest.raises(ConfigError, match=r"process.prediction_type: must be v .*found eps"):
        write_pipeline(made, tmp_path)


def test_an_official_file_is_for_a_process_of_its_repository(tmp_path):
    with pytest.raises(ConfigError, match=r"process: must be DiscreteDiffusion, .*found EDM"):
        write_official(edm(), tmp_path)
    with pytest.raises(ConfigError, match=r"process: must be .*found FlowMatching"):
        write_official(flow("diffusers"), tmp_path)
    (note,) = write_official(adm_with_classes(), tmp_path)
    assert note.startswith("the official code of ADM and P2 cannot sample from this network, which")
    assert "predicts v: it knows networks that predict eps or x0; " in note
    sit = module(DiT(**DIT, in_channels=2, num_classes=3), FlowMatching())
    assert write_official(sit, tmp_path / "sit") == []
    report = load_official_checkpoint(
        DiT(**DIT, in_channels=2, num_classes=3), tmp_path / "sit" / "model.pt"
    )
    assert report.layout == "state dict"


SMALL = CosineSchedule(100)
DIT_CALL = "in sample.py of DiT, call create_diffusion(..., "
CANNOT = "the official code of {} cannot sample from this network, which "


@pytest.mark.parametrize(
    ("network", "process", "note"),
    [
        ("dit", DiscreteDiffusion(variance_type="learned_range"), None),
        ("dit", DiscreteDiffusion(), f"{DIT_CALL}learn_sigma=False, sigma_small=True)"),
        (
            "dit",
            DiscreteDiffusion(SMALL, prediction_type="x0", variance_type="learned_range"),
            f"{DIT_CALL}noise_schedule='squaredcos_cap_v2', diffusion_steps=100, "
            "predict_xstart=True)",
        ),
        ("dit", DiscreteDiffusion(prediction_type="v"), CANNOT.format("DiT") + "predicts v: "),
        (
            "dit",
            DiscreteDiffusion(ScaledLinearSchedule()),
            CANNOT.format("DiT") + "has another noise schedule: it knows linear and cosine ones",
        ),
        ("unet", DiscreteDiffusion(), None),
        (
            "unet",
            DiscreteDiffusion(CosineSchedule(), prediction_type="x0"),
            "sample with --noise_schedule cosine --predict_xstart True",
        ),
        ("dit", FlowMatching("gvp", prediction_type="score"), "--path-type GVP --prediction score"),
        ("dit", FlowMatching(prediction_type="eps"), "sample with --prediction noise"),
        ("dit", FlowMatching(prediction_type="x0"), CANNOT.format("SiT") + "predicts x0: "),
    ],
)
def test_what_an_official_repository_must_be_told_is_said(network, process, note):
    made = DiT(**DIT, in_channels=1, num_classes=3) if network == "dit" else UNet(**UNET)
    told = SimpleNamespace(backbone=made, process=process)
    found = official_notes(told, is_latent_unet=False)
    assert found == [] if note is None else note in found[0]


def test_latent_diffusion_takes_the_prediction_from_its_config():
    told = SimpleNamespace(backbone=None, process=DiscreteDiffusion(prediction_type="x0"))
    (note,) = official_notes(told, is_latent_unet=True)
    assert note.startswith("set parameterization: x0 in its config")


@pytest.mark.parametrize("case", ["adm", "adm_with_classes", "ldm"])
def test_official_files_and_programs_of_unets(case, stages, tmp_path):
    made = ldm(stages) if case == "ldm" else CASES[case]()
    write_official(made, tmp_path)
    fresh = UNet(**UNETS[case])
    # Latent diffusion keeps the class table outside of the UNet.
    file = tmp_path / ("model.ckpt" if case == "ldm" else "model.pt")
    report = load_official_checkpoint(fresh, file, weights="model")
    assert report.layout == ("latent-diffusion" if case == "ldm" else "state dict")
    program = fresh
    if case == "ldm":  # tracing takes long
        write_program(made, tmp_path)
        program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):  # any batch size
        x, t = torch.randn(count, *made.image_shape), torch.arange(count) * 200
        inputs = (x, t, torch.arange(count) % 3) if made.num_classes else (x, t)
        with torch.no_grad():
            expected = made.backbone(*inputs)
            torch.testing.assert_close(fresh.eval()(*inputs), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(program(*inputs), expected, atol=1e-5, rtol=0)
