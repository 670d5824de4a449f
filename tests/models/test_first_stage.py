"""First stages: every kind of source, latents as defined, and no trace in a checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from first_stages import save_dc, save_first_stages

from ant_lightning import ConfigError, FirstStage

CLASSES = {"kl": AutoencoderKL, "vq": VQModel}


@pytest.fixture(scope="module")
def tiny_first_stages(tmp_path_factory):
    return save_first_stages(tmp_path_factory.mktemp("first_stages"))


@pytest.fixture(params=["kl", "vq"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def official_name(name):
    """latent-diffusion's name of an entry of diffusers, for two resolutions."""
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.attentions", r"down.\1.attn", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    for ours, theirs in (("0", "1"), ("1", "0")):
        name = name.replace(f"decoder.up_blocks.{ours}.resnets", f"decoder.up.{theirs}.block")
        name = name.replace(f"decoder.up_blocks.{ours}.attentions", f"decoder.up.{theirs}.attn")
        name = name.replace(
            f"decoder.up_blocks.{ours}.upsamplers.0", f"decoder.up.{theirs}.upsample"
        )
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2"
    )
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out")):
        name = re.sub(rf"(attn[_.]\d)\.{ours}\.", rf"\1.{theirs}.", name)
    return re.sub(r"(attn[_.]\d)\.to_([qkv])\.", r"\1.\2.", name)


def official_file(folder, kind, path):
    """A latent-diffusion training file with this first stage."""
    weights = CLASSES[kind].from_pretrained(folder / kind).state_dict()
    tensors = {}
    for name, value in weights.items():
        attention = ".attentions." in name and name.endswith("weight") and value.ndim == 2
        tensors["first_stage_model." + official_name(name)] = (
            value[:, :, None, None].clone() if attention else value
        )
    tensors["first_stage_model.loss.discriminator.weight"] = torch.zeros(2)
    tensors["model.diffusion_model.out.2.weight"] = torch.zeros(2)
    torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path


def test_moments_latents_and_images_are_those_of_diffusers(tiny_first_stages, kind, images):
    folder = str(tiny_first_stages / kind)
    stage = FirstStage(folder, scale=0.5, shift=0.25)
    network = CLASSES[kind].from_pretrained(folder).eval()
    with torch.no_grad():
        found = network.encode(images)
    moments = stage.encode_moments(images)
    assert tuple(moments.shape[1:]) == stage.moments_shape((3, 16, 16))
    noise = torch.randn(3, *stage.latent_shape((3, 16, 16)))
    latents = stage.space.sample(moments, noise).double().numpy()
    if kind == "kl":
        torch.testing.assert_close(moments, found.latent_dist.parameters)
        mean, log_variance = np.split(moments.double().numpy(), 2, axis=1)
        z = mean + np.exp(log_variance / 2) * noise.double().numpy()
    else:
        torch.testing.assert_close(moments, found.latents)
        z = moments.double().numpy()
    np.testing.assert_allclose(latents, (z - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        wanted = network.decode(torch.from_numpy(z).float()).sample.clamp(-1, 1)
    torch.testing.assert_close(
        stage.decode(torch.from_numpy(latents).float()), wanted, rtol=1e-4, atol=1e-5
    )


def test_the_autoencoder_of_sana_gives_the_latents_and_images_of_diffusers(tmp_path, images):
    stage = FirstStage(str(save_dc(tmp_path, 3)))
    assert (stage.space.kind, stage.space.scale, stage.space.shift) == ("dc", 0.41407, 0.0)
    assert stage.latent_shape((3, 16, 16)) == stage.moments_shape((3, 16, 16)) == (4, 4, 4)
    network = AutoencoderDC.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        z = network.encode(images).latent
        wanted = network.decode(z).sample.clamp(-1, 1)
    latents = stage.space.sample(stage.encode_moments(images), torch.randn_like(z))
    torch.testing.assert_close(latents, 0.41407 * z)
    torch.testing.assert_close(stage.decode(latents), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("decoder_conv_act_fn", 3, "must have a config that diffusers takes"),
        ("encoder_block_out_channels", [8, 3, 8], "must have a config that diffusers takes"),
        ("encoder_layers_per_block", [1, 0, 1], "its architecture: it has no encoder"),
        ("encoder_layers_per_block", [1, 2**20, 1], "must be from 0 to 64"),
        ("scaling_factor", "x", "scale: must be above 0 and finite, found 'x'"),
    ],
)
def test_a_wrong_config_of_it_is_one_line(tmp_path, setting, value, message):
    path = save_dc(tmp_path, 3) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ConfigError, match=message) as error:
        FirstStage(str(tmp_path))
    assert "\n" not in str(error.value)


def test_scale_and_shift_default_to_the_files_and_else_to_the_published(
    tiny_first_stages, tmp_path
):
    import shutil

    config = json.loads((tiny_first_stages / "kl" / "config.json").read_text())
    folder = tmp_path / "kl"
    shutil.copytree(tiny_first_stages / "kl", folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "scaling_factor": 0.7, "shift_factor": 0.1})
    )
    space = FirstStage(str(folder)).space
    assert (space.scale, space.shift) == (0.7, 0.1)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if not k.endswith("_factor")})
    )
    space = FirstStage(str(folder)).space
    assert (space.scale, space.shift) == (0.18215, 0.0)


def test_it_follows_the_device_and_type_but_is_in_no_state_dict(tiny_first_stages, images):
    holder = torch.nn.Module()
    holder.stage = FirstStage(str(tiny_first_stages / "kl"))
    assert not holder.state_dict()
    assert not list(holder.parameters())
    before = holder.stage.encode_moments(images)
    holder.train()
    torch.testing.assert_close(holder.stage.encode_moments(images), before)
    holder.double()
    network = holder.stage._held[0]
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in network.parameters())
    holder.to("meta")
    assert all(p.is_meta for p in network.parameters())


def test_a_latent_diffusion_file_gives_the_same_first_stage(
    tiny_first_stages, kind, images, tmp_path
):
    path = official_file(tiny_first_stages, kind, tmp_path / "model.ckpt")
    theirs = FirstStage(str(path), scale=1.0)
    ours = FirstStage(str(tiny_first_stages / kind), scale=1.0)
    torch.testing.assert_close(theirs.encode_moments(images), ours.encode_moments(images))
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.space.kind == kind


def test_a_single_file_of_diffusers_needs_its_config_beside_it(tiny_first_stages, tmp_path):
    weights = tiny_first_stages / "kl" / "diffusion_pytorch_model.safetensors"
    whole = FirstStage(str(tiny_first_stages / "kl"))
    assert FirstStage(str(weights)).fingerprint == whole.fingerprint
    alone = tmp_path / weights.name
    alone.write_bytes(weights.read_bytes())
    with pytest.raises(ConfigError, match=r"config\.json beside it"):
        FirstStage(str(alone))


def test_the_fingerprint_changes_with_weights_scale_and_shift(tiny_first_stages):
    def fingerprint(kind, **options):
        return FirstStage(str(tiny_first_stages / kind), **options).fingerprint

    every = [
        fingerprint("kl"),
        fingerprint("kl", scale=0.5),
        fingerprint("kl", shift=0.5),
        fingerprint("vq"),
    ]
    assert len(set(every)) == 4
    assert fingerprint("kl") == every[0]


def refused(words, *args, **options):
    with pytest.raises(ConfigError) as error:
        FirstStage(*args, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_sources_are_named(tiny_first_stages, tmp_path):
    kl = tiny_first_stages / "kl"
    refused(["no such file", "missing/place/x"], "missing/place/x")
    refused(["owner/no-such-name", "hub"], "owner/no-such-name", local_files_only=True)
    refused(["kind", "'kl'", "'vq'"], str(kl), kind="vq")
    refused(["scale", "-1"], str(kl), scale=-1.0)
    refused(["config.json", str(tmp_path)], str(tmp_path))
    weights = (kl / "diffusion_pytorch_model.safetensors").read_bytes()
    cut = tmp_path / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(weights[: len(weights) // 2])
    config = json.loads((kl / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(["truncated", str(cut)], str(tmp_path))
    cut.write_bytes(weights)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    refused(["do not fit", str(cut)], str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    refused(["AutoencoderKL", "UNet2DModel"], str(tmp_path))
    torch.save(
        {"state_dict": {"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}}, tmp_path / "a"
    )
    refused(["has no entry", "conv_in"], str(tmp_path / "a"))


def test_images_that_do_not_fit_are_refused(tiny_first_stages):
    stage = FirstStage(str(tiny_first_stages / "kl"))
    with pytest.raises(ConfigError, match=r"3 channels.*multiples of 2.*\(1, 16, 16\)"):
        stage.encode_moments(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ConfigError, match=r"\(3, 15, 16\)"):
        stage.latent_shape((3, 15, 16))
