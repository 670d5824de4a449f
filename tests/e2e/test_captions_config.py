"""`captions/...`: a folder with captions trains a tiny SD3 with LoRA under PCGrad from one YAML."""

import diffusers
import pytest
import torch
import yaml
from captions import write_encoders, write_images

from ant_lightning import export, load_run, save_adapter
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.main import main
from ant_lightning.files.safetensors_file import read_safetensors


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder like that of SD3: transformer, scheduler, VAE, text encoders, tokenizers."""
    folder = tmp_path_factory.mktemp("sd3")
    write_encoders(folder)
    torch.manual_seed(0)
    diffusers.SD3Transformer2DModel(
        sample_size=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=6,
    ).save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    return folder


def test_a_caption_folder_trains_sd3_with_lora_under_pcgrad(tmp_path, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path)
    root = write_images(tmp_path / "images", 10, metadata=True)
    encode = yaml.safe_load(config_names()["captions/encode"].read_text())
    assert len(encode["text"]["encoders"]) == 3
    encode["text"]["encoders"] = [
        {"folder": f"{pipeline}/text_encoder", "max_length": 5, "pooled": True, "layer": -2},
        {"folder": f"{pipeline}/text_encoder_2", "max_length": 6},
    ]
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(encode))
    data = [f"--data.root={root}", "--data.image_size=8"]
    assert main(["encode", "--config", "encode.yaml", *data, "--device=cpu"]) == 0
    args = ["--config", "captions/sd3_lora", *data, "--data.num_workers=0"]
    args += ["--data.embeddings=data/captions_sd3", "--trainer.precision=32"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.val_check_interval=1", "--model.backbone.input_size=4"]
    args += [f"--model.backbone.folder={pipeline}", f"--model.process.folder={pipeline}"]
    args += [f"--model.first_stage.source={pipeline}/vae", "--model.adapter.r=2"]
    args += ["--model.sampling.sampler.num_steps=2", "--model.tasks.clustering.num_tasks=3"]
    args += ["--model.tasks.balancer.num_tasks=3"]
    assert main(["fit", *args, "--trainer.max_steps=1"]) == 0
    assert main(["fit", *args, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    run = tmp_path / "runs" / "captions_sd3_lora"
    checkpoint = max(run.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    of_network = [name for name in weights if name.startswith("backbone.")]
    assert of_network
    assert all(".lora_" in name for name in of_network)  # none of what is adapted
    module = load_run(checkpoint)
    assert module.process.sampling_density.shift == 3.0
    assert set(module.conditions.null) == {"encoder_hidden_states", "pooled_projections"}
    assert module.conditions.null["encoder_hidden_states"].shape == (11, 12)
    told = {
        "encoder_hidden_states": torch.zeros(2, 11, 12),
        "pooled_projections": torch.zeros(2, 6),
    }
    assert module.sample(2, condition=told).shape == (2, 3, 8, 8)
    assert save_adapter(module, tmp_path / "lora").name == "pytorch_lora_weights.safetensors"
    exported = export(checkpoint, to="diffusers", output=tmp_path / "exported")
    assert exported.notes == ["the adapter alone: pipeline.load_lora_weights(FOLDER) reads it"]
    (weights, metadata), (saved, saved_metadata) = [
        read_safetensors(folder / "pytorch_lora_weights.safetensors")
        for folder in (exported.path, tmp_path / "lora")
    ]
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    # Not the files' bytes: diffusers writes the entries of the metadata in a random order.
    assert metadata == saved_metadata
    assert '"transformer.lora_alpha": 16.0' in metadata["lora_adapter_metadata"]
    assert main(["predict", *args, f"--ckpt_path={checkpoint}", "--samples.num_images=2"]) == 0
