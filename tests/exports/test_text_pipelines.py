"""Networks that are told text leave as pipelines of diffusers that draw the run's images."""

import copy
import json
import shutil

import diffusers
import pytest
import torch
import yaml
from captions import WORDS, write_encoders
from diffusers_networks import SHAPES, network
from exported import filled
from first_stages import save_dc, save_first_stages
from lightning import LightningModule
from tiny_digits import saved
from transformers import Gemma2Config, Gemma2Model

from ant_lightning import (
    DDIM,
    DDPM,
    EDM,
    CosineSchedule,
    DiffusersBackbone,
    DiscreteDiffusion,
    FirstStage,
    FlowMatching,
    IntervalExperts,
    LatentSpace,
    MultiTaskDiffusion,
    ODESampler,
    Sampling,
    SNRClustering,
    Tasks,
    TextEncoder,
    TextWriter,
    export,
    load_run,
)
from ant_lightning.cli.main import main
from ant_lightning.cli.parts import make_part
from ant_lightning.data.text.encoder import text_encodings
from ant_lightning.errors import ConfigError
from ant_lightning.exports.networks import first_network
from ant_lightning.exports.pipeline_folder import write_pipeline
from ant_lightning.exports.pipeline_source import PipelineSource, pipeline_source
from ant_lightning.exports.text_pipeline import text_pipeline_of
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.transfer.experts import borders_between

SD, XL = "UNet2DConditionModel", "UNet2DConditionModel of SDXL"
PIXART, SD3 = "PixArtTransformer2DModel", "SD3Transformer2DModel"
FLUX, SANA = "FluxTransformer2DModel with guidance", "SanaTransformer2DModel"
ALPHA, SPRINT = f"{PIXART} of Alpha", f"{SANA} of Sprint"
VARIANTS = {
    XL: {  # six numbers of the size, 8 values each, and 10 pooled ones
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 58,
    },
    ALPHA: {
        "sample_size": 128,  # the pipeline tells a network of this size alone that of the image
        "use_additional_conditions": True,
        "attention_head_dim": 12,  # a third of the width each for two sides and their ratio
        "cross_attention_dim": 24,
    },
    SPRINT: {"guidance_embeds": True},
}
STAGES = {ALPHA: "kl 8", SANA: "dc", SPRINT: "dc"}
PROMPT = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Autoencoders of factor 2, a KL of 8 as PixArt's network is told, and Sana's of 32 and 4."""
    root = save_first_stages(tmp_path_factory.mktemp("stages"))
    save_dc(root / "dc", 6)
    save_dc(root / "dc 4", 3)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(root / "kl 8")
    return root


def module_of(stages, case, sampler, *, stage="", masks=False, **settings):
    net = network(case.partition(" of ")[0], **VARIANTS.get(case, {}))
    net = DiffusersBackbone(net, input_size=(4, 8), masks=masks)
    is_flow = case.startswith(("SD3", "Flux", "Sana"))
    kind = "learned_range" if net.out_channels == 8 else "fixed_small"
    process = DiscreteDiffusion(CosineSchedule(1000), variance_type=kind)
    process = settings.pop("process", FlowMatching() if is_flow else process)
    shift = {"shift": 0.1} if is_flow and not case.startswith("Sana") else {}
    stage = STAGES.get(case, "kl") if stage == "" else stage
    return MultiTaskDiffusion(
        net,
        process=process,
        tasks=Tasks(SNRClustering(3)),
        sampling=Sampling(**{"sampler": sampler, "guidance_scale": 2.0} | settings),
        first_stage=stage and FirstStage(str(stages / stage), scale=0.5, **shift),
        seed=0,
    ).eval()


def given_to(module, told):
    """Conditions and their nulls under the names of the pipelines."""
    given = {PROMPT[name]: value for name, value in told.items()}
    given |= {
        f"negative_{PROMPT[name]}": module.conditions.null[name].expand_as(value)
        for name, value in told.items()
    }
    network = first_network(module.backbone).network
    if type(network).__name__.startswith(("PixArt", "Sana")):
        masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
        given |= dict.fromkeys(masks, torch.ones(2, 3)) | {"negative_prompt": None}
    return given


def assert_draws_the_same(module, pipeline, monkeypatch, told, **given):
    pipeline.set_progress_bar_config(disable=True)
    noise = module.image_noise(range(2))
    for place in ("scheduling_ddpm", "scheduling_ddim"):
        path = f"diffusers.schedulers.{place}.randn_tensor"
        monkeypatch.setattr(path, lambda *_, **__: noise())
    x = noise()
    if hasattr(pipeline, "_pack_latents"):
        x = pipeline._pack_latents(x, *x.shape)
    call = text_pipeline_of(module).call
    images = pipeline(latents=x, output_type="np", **given, **call).images
    expected = module.sample(2, condition=told) / 2 + 0.5
    assert expected.std() > 0.05
    found = torch.from_numpy(images).movedim(-1, 1)
    torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)


EQUAL = {
    "StableDiffusionPipeline": (SD, DDIM(5, eta=0.3, spacing="ldm"), 2),
    "StableDiffusionXLPipeline": (XL, DDPM(5), 0),
    "PixArtSigmaPipeline": (PIXART, DDIM(5), 0),
    "PixArtAlphaPipeline": (ALPHA, DDIM(5), 0),
    "SanaPipeline": (SANA, ODESampler(5, method="euler", shift=3.0), 2),
    "StableDiffusion3Pipeline": (SD3, ODESampler(5, method="euler", shift=3.0), 6),
    "FluxPipeline": (FLUX, ODESampler(5, method="euler"), 4),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_pipeline_without_encoders_draws_the_images_of_the_run(
    name, stages, tmp_path, monkeypatch
):
    case, sampler, num_missing = EQUAL[name]
    made = module_of(stages, case, sampler)
    notes = write_pipeline(made, tmp_path, source="there is none")
    assert notes == ["without text encoders, to draw from prompt_embeds: there is none"]
    text = text_pipeline_of(made)
    missing = dict.fromkeys(text.modules()[1])
    assert len(missing) == num_missing
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **missing)
    assert type(pipeline).__name__ == name
    told = {n: torch.randn(2, *SHAPES[n]) for n in made.conditions.names}
    given = given_to(made, told)
    assert_draws_the_same(made, pipeline, monkeypatch, told, **given)
    example = text.example("there is none")
    assert all(f"{each}=" in example for each in (*missing, *given, *text.call))
    prompted = text.example(PipelineSource(tmp_path, {}, 77))
    assert "from_pretrained(FOLDER)\nimages = pipeline(prompt=prompt, " in prompted
    assert ("max_sequence_length=77" in prompted) == (case not in {SD, XL})
    assert ("negative_prompt=''" in prompted) == (case == FLUX)  # which guides only with one


@pytest.mark.parametrize("name", EQUAL)
def test_a_pipeline_switches_between_experts_of_intervals(name, stages, tmp_path, monkeypatch):
    case, sampler, _ = EQUAL[name]
    made = module_of(stages, case, sampler)
    networks = [copy.deepcopy(made.backbone) for _ in range(3)]
    with torch.no_grad():
        for p in [*networks[0].parameters(), *networks[2].parameters()]:
            p.add_(torch.randn_like(p), alpha=0.05)
    borders, rising = borders_between(made.process, [500, 800])
    made.backbone = IntervalExperts(networks, borders, rising=rising)
    notes = write_pipeline(made, tmp_path, source="there is none")
    assert notes == ["without text encoders, to draw from prompt_embeds: there is none"]
    text = text_pipeline_of(made)
    assert "from_pretrained(FOLDER, trust_remote_code=True" in text.example("there is none")
    parts = dict.fromkeys(text.modules()[1])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, trust_remote_code=True, **parts
    )
    assert type(pipeline).__name__ == name
    switched = pipeline.unet if "UNet" in case else pipeline.transformer
    used = []
    for i, each in enumerate(switched.networks):
        each.register_forward_pre_hook(lambda *_, i=i: used.append(i))
    told = {n: torch.randn(2, *SHAPES[n]) for n in made.conditions.names}
    assert_draws_the_same(made, pipeline, monkeypatch, told, **given_to(made, told))
    assert used == sorted(used, reverse=True)  # from the most noise to the least
    assert set(used) == {0, 1, 2}


def test_the_ddpm_of_sd_draws_the_same_too(stages, tmp_path, monkeypatch):
    made = module_of(stages, SD, DDPM(4), guidance_scale=1.0)
    write_pipeline(made, tmp_path)
    parts = {"text_encoder": None, "tokenizer": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **parts)
    told = {"encoder_hidden_states": torch.randn(2, 3, 12)}
    given = {"prompt_embeds": told["encoder_hidden_states"]}
    assert_draws_the_same(made, pipeline, monkeypatch, told, **given)
    assert "negative" not in text_pipeline_of(made).example("")


OTHERWISE = [
    (SD, {"sampler": DDIM(5)}, "StableDiffusionPipeline moves the timesteps by 1"),
    (SD, {"clip_denoised": True}, "StableDiffusionPipeline does not clip"),
    (XL, {"masks": True}, "does not tell the network which tokens are padding"),
    (ALPHA, {"stage": "kl"}, "tells the network another size of the image"),
    (SD, {"guided_channels": 3}, "guides all channels"),
    (SD, {"guidance_scale": 0.5}, "has no guidance below 1"),
    (PIXART, {"sampler": DDPM(5)}, "drops the predicted variance"),
    (SD3, {"sampler": ODESampler(4)}, "Euler's method on even times samples in place of"),
]


@pytest.mark.parametrize(("case", "changed", "note"), OTHERWISE)
def test_what_a_pipeline_does_otherwise_is_said(case, changed, note, stages):
    plain = ODESampler(4, method="euler") if case == SD3 else DDIM(5, spacing="ldm")
    (found,) = text_pipeline_of(module_of(stages, case, **{"sampler": plain} | changed)).notes
    assert note in found


NONE = [
    (SANA, {"stage": "kl"}, "takes an AutoencoderDC with one scale for all channels and no shift"),
    (SANA, {"stage": "dc 4"}, "SanaPipeline draws images whose sides are multiples of 32"),
    (SPRINT, {}, "the pipeline of a Sana with embedded guidance has a sampler of its own"),
    (SD3, {"stage": None}, "StableDiffusion3Pipeline decodes latents, and the run has none"),
    (SD, {"process": FlowMatching()}, "StableDiffusionPipeline is for DiscreteDiffusion"),
    (SD3, {"process": EDM()}, "StableDiffusion3Pipeline is for FlowMatching"),
]


@pytest.mark.parametrize(("case", "changed", "reason"), NONE)
def test_what_has_no_pipeline_leaves_as_parts(case, changed, reason, stages, tmp_path):
    made = module_of(stages, case, **{"sampler": None} | changed)
    notes = write_pipeline(made, tmp_path)
    assert notes[0].startswith("parts of a pipeline, ")
    assert "for that of the base: " in notes[0]
    assert notes[0].endswith(reason)
    assert not (tmp_path / "model_index.json").exists()
    back = DiffusersBackbone(folder=str(tmp_path), input_size=(4, 8)).network.state_dict()
    own = made.backbone.network.state_dict()
    assert all(torch.equal(back[name], value) for name, value in own.items())


def test_first_stages_of_another_kind_have_no_pipeline(stages):
    made = module_of(stages, SD, DDIM(5, spacing="ldm"))
    made.latent_space = LatentSpace(
        kind="kl", scale=(0.5,) * 4, shift=0.0, fingerprint="", source=""
    )
    assert "takes an AutoencoderKL with one scale for all channels" in text_pipeline_of(made)
    made.first_stage = None
    assert "(--first_stage)" in text_pipeline_of(made)


@pytest.fixture(scope="module")
def base(stages, tmp_path_factory):
    """A pipeline folder like that of Stable Diffusion."""
    folder = write_encoders(tmp_path_factory.mktemp("sd"))
    filled(network(SD, cross_attention_dim=8, sample_size=4)).save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    shutil.copytree(stages / "kl", folder / "vae")
    shutil.rmtree(folder / "text_encoder_2")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run on it, with other weights, and a cache of its embeddings."""
    folder = tmp_path_factory.mktemp("run")
    encoder = TextEncoder(str(base / "text_encoder"), max_length=6)
    TextWriter(str(folder / "text"), encoders=[encoder]).write(["a red square"])
    known = "ant_lightning"
    sampler = {"class_path": f"{known}.DDIM", "init_args": {"num_steps": 4, "spacing": "ldm"}}
    snr = {"class_path": f"{known}.SNRClustering", "init_args": {"num_tasks": 3}}
    init = {
        "backbone": {
            "class_path": f"{known}.DiffusersBackbone",
            "init_args": {"folder": str(base / "unet")},
        },
        "process": {"class_path": f"{known}.stored_process", "init_args": {"folder": str(base)}},
        "first_stage": {
            "class_path": f"{known}.FirstStage",
            "init_args": {"source": str(base / "vae")},
        },
        "tasks": {"clustering": snr},
        "sampling": {"sampler": sampler, "guidance_scale": 2.0},
        "seed": 5,
    }
    model = {"class_path": f"{known}.MultiTaskDiffusion", "init_args": init}
    data = {
        "class_path": f"{known}.CaptionFolderData",
        "init_args": {"embeddings": f"{folder}/text"},
    }
    made = make_part(model, LightningModule)
    for parameter in made.backbone.parameters():
        parameter.data.mul_(1.2)
    saved(made, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    return folder


OPTIONS = {"to": "diffusers", "weights": "live"}


def test_a_run_leaves_with_the_text_encoders_of_its_pipeline(run, tmp_path, monkeypatch):
    exported = export(run, output=tmp_path / "out", **OPTIONS)
    assert exported.notes == []
    card = (exported.path / "README.md").read_text()
    assert "from_pretrained(FOLDER)\nimages = pipeline(prompt=prompt, height=8" in card
    pipeline = diffusers.DiffusionPipeline.from_pretrained(exported.path)
    assert sorted(path.name for path in exported.path.iterdir() if path.is_dir()) == [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    ]
    made = load_run(run, weights="model")
    text, null = pipeline.encode_prompt(["a red square", "a blue square"], "cpu", 1, True)
    made.conditions.take_null({"encoder_hidden_states": null[0]})
    given = {"prompt": ["a red square", "a blue square"]}
    assert_draws_the_same(made, pipeline, monkeypatch, {"encoder_hidden_states": text}, **given)


def test_sana_leaves_with_its_text_encoder(stages, tmp_path, monkeypatch):
    base = write_encoders(tmp_path / "base")
    shutil.rmtree(base / "text_encoder")
    torch.manual_seed(0)
    gemma = {"hidden_size": 12, "intermediate_size": 8, "head_dim": 4, "num_hidden_layers": 1}
    gemma |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(WORDS)}
    Gemma2Model(Gemma2Config(**gemma)).save_pretrained(base / "text_encoder")
    made = module_of(stages, SANA, ODESampler(4, method="euler"), masks=True)
    listed = {
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    }
    notes = write_pipeline(made, tmp_path / "out", source=PipelineSource(base, listed, 6))
    assert notes == ["SanaPipeline takes prompts in small letters"]
    encoder = TextEncoder(str(base / "text_encoder"), max_length=6, mask=True)
    encode = text_encodings([encoder], "cpu")
    captions = ["a red square", "a large blue square"]
    made.conditions.take_null({name: each[0] for name, each in encode([""]).items()})
    given = {"prompt": captions, "max_sequence_length": 6}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_draws_the_same(made, pipeline, monkeypatch, encode(captions), **given)
    plain = module_of(stages, SANA, ODESampler(4, method="euler"))
    notes = write_pipeline(plain, tmp_path / "plain", source=PipelineSource(base, listed, 6))
    assert notes[1] == "SanaPipeline tells the network which tokens of a prompt are padding"


def other(base, folder, **changed):
    """A copy of the pipeline with other entries of its index."""
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changed))
    return folder


def test_sources_that_do_not_fit_are_refused(base, run, tmp_path, capsys):
    wrong = other(base, tmp_path / "class", _class_name="StableDiffusionXLPipeline")
    lacking = other(base, tmp_path / "part", image_encoder=["transformers", "CLIPVisionModel"])
    encoders = other(base, tmp_path / "encoders")
    tokenizer = encoders / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for folder, message in (
        (tmp_path, "source: must be a pipeline folder of diffusers, found "),
        (wrong, "a StableDiffusionPipeline, found StableDiffusionXLPipeline in"),
        (lacking, "source: must hold image_encoder, as its model_index.json says"),
        (encoders, "source: must have the text encoders of the run's embeddings"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline_source(settings, "StableDiffusionPipeline", str(folder))
    args = ["export", str(run), "--to", "safetensors", "--weights=live", f"--source={base}"]
    assert main(args) == 2
    assert "source: must be left out unless" in capsys.readouterr().err


def test_two_pipelines_in_the_settings_are_not_chosen_between(base, run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    again = other(base, tmp_path / "again")
    settings["model"]["init_args"]["process"]["init_args"]["folder"] = str(again)
    assert pipeline_source(settings, "StableDiffusionPipeline") == (
        f"the pipeline of the run is not known (--source FOLDER), found {base} and {again}"
    )
    given = pipeline_source(settings, "StableDiffusionPipeline", str(again))
    assert (given.folder, given.max_length) == (again, 6)
    settings["model"]["init_args"]["process"] = {"init_args": {}}
    assert pipeline_source(settings, "StableDiffusionPipeline").folder == base
    assert pipeline_source(settings, "FluxPipeline").startswith(
        "the run's is another: source: must"
    )
    assert pipeline_source({}, "FluxPipeline").endswith("(--source FOLDER), found none")


def test_cached_latents_are_decoded_by_the_vae_that_made_them(run, stages, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["model"]["init_args"]["first_stage"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    options = OPTIONS | {"config": tmp_path / "config.yaml"}
    exported = export(run, output=tmp_path / "out", **options)
    assert exported.notes == []
    own, theirs = (
        read_safetensors(folder / "diffusion_pytorch_model.safetensors")[0]
        for folder in (exported.path / "vae", stages / "kl")
    )
    assert all(torch.equal(own[name], value) for name, value in theirs.items())
