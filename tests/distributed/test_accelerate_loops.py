"""The loops of Accelerate in `examples/`: two processes train as one does on the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate_loops import run_loops
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel as UNet,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCRIPT = Path(__file__).with_name("accelerate_loops.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight captioned images, and a Stable Diffusion of random weights."""
    root = tmp_path_factory.mktemp("loops")
    (root / "images").mkdir()
    lines = []
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 90)).save(root / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "ab"[i % 2] * (1 + i)}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    letters = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"))
    tokenizer.model_max_length = 8
    text = CLIPTextConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        bos_token_id=4,
        eos_token_id=5,
        pad_token_id=5,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    unet = UNet(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def one_process_again(monkeypatch):
    """Forget what Lightning leaves behind: LOCAL_RANK means several processes to Accelerate."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


# Three interpreters import diffusers, transformers and PEFT.
@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(folder, tmp_path):
    alone = run_loops(folder, batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, str(SCRIPT), str(folder), str(tmp_path / "two.pt")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"two.pt.{rank}", weights_only=True) for rank in range(2)]
    assert alone.keys() == two.keys()
    assert len(two) == 4
    for name, found in two.items():
        assert (alone[name]["processes"], found["processes"]) == (1, 2)
        assert found["wrapper"] == "DistributedDataParallel"
        assert alone[name]["wrapper"] != found["wrapper"]
        assert len(found["history"]) == 2
        assert found["history"] == pytest.approx(alone[name]["history"], rel=1e-5)
        for weight, value in found["weights"].items():
            assert torch.equal(ranks[0][name][weight], ranks[1][name][weight])
            torch.testing.assert_close(value, alone[name]["weights"][weight], atol=2e-5, rtol=1e-4)
    # Accumulation is another run, and every run has changed its weights.
    for kind in ("unconditional", "lora"):
        first, second = (two[f"{kind} {parts}"]["weights"] for parts in (1, 2))
        assert any(not torch.equal(first[each], second[each]) for each in first)
    assert any(value.any() for name, value in two["lora 1"]["weights"].items() if "lora_B" in name)


def test_diffusers_reads_what_the_loops_wrote(folder):
    if not (folder / "lora").exists():
        run_loops(folder, batch_size=4)
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=1).images[0].size == (8, 8)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder / "lora")
    image = pipeline("ab", height=16, width=16, num_inference_steps=1).images[0]
    assert image.size == (16, 16)
