"""DINOv2 and CLIP from local folders: equal to direct calls on tiny random networks."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ant_lightning import CaptionScore, CLIPFeatures, ConfigError, DINOv2Features
from ant_lightning.cli.score import run_score

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CAPTIONS = ["a cat", "a small dog", "one of seven boats"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(a) for a in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    text = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=SMALL | text,
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=generator)


def resized(images, size, mean, deviation):
    x = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True) / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


@torch.no_grad()
def test_dinov2_gives_the_class_token(dinov2, images):
    network = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    x = resized(images, 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    extractor = DINOv2Features(dinov2, size=28)
    torch.testing.assert_close(extractor(images), network(x).pooler_output)
    assert (extractor.num_features, extractor.name[:13]) == (16, "dinov2-16-28-")
    grey = images[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


@torch.no_grad()
def test_clip_gives_projected_embeddings(clip, images):
    network = transformers.CLIPModel.from_pretrained(clip).eval()
    mean, deviation = (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
    direct = network.get_image_features(resized(images, 32, mean, deviation))
    direct = getattr(direct, "pooler_output", direct)  # transformers 5 wraps it
    torch.testing.assert_close(CLIPFeatures(clip)(images), direct)


def direct_score(clip, images):
    network = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    x = processor(
        text=CAPTIONS, images=list(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = network(**x)
    cosines = F.cosine_similarity(output.image_embeds, output.text_embeds)
    return float(100 * cosines.mean())


def test_the_score_of_captions_is_the_mean_cosine(clip, images):
    metric = CaptionScore(clip)
    metric.update(images[:1], CAPTIONS[:1])
    metric.update(images[1:], CAPTIONS[1:])
    mean = direct_score(clip, images)
    assert float(metric.score / metric.n_samples) == pytest.approx(mean, abs=1e-3)
    assert float(metric.compute()) == pytest.approx(max(mean, 0), abs=1e-3)
    with pytest.raises(ConfigError, match="one for each of 3 images, found 1"):
        metric.update(images, CAPTIONS[:1])


# 3 images do for equality, not for a FID that means something.
@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_score_takes_captions_and_any_extractor(clip, dinov2, images, tmp_path, capsys):
    np.savez(tmp_path / "all.npz", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    extractor = {"class_path": "ant_lightning.DINOv2Features"}
    extractor["init_args"] = {"folder": str(dinov2), "size": 28}
    data = {"image_size": 20, "num_images": 8, "num_held_out": 8}
    options = [f"--images={tmp_path}/all.npz", "--accelerator=cpu", "--data=ShapesData"]
    options += [f"--data.{name}={value}" for name, value in data.items()]
    options += [f"--metrics.extractor={json.dumps(extractor)}", "--metrics.k=1"]
    options += ["--metrics.with_train=false"]
    captions = f"--captions={tmp_path}/captions.txt"
    scores = run_score([*options, captions, f"--clip={clip}"])
    assert scores["clip_score"] == pytest.approx(max(direct_score(clip, images), 0), abs=1e-3)
    assert np.isfinite(scores["fid"])
    with pytest.raises(ConfigError, match="clip: must be given with captions"):
        run_score([*options, captions])
    (tmp_path / "captions.txt").write_text("one")
    with pytest.raises(ConfigError, match="captions: must have 3 lines"):
        run_score([*options, captions, f"--clip={clip}"])


@pytest.mark.parametrize("kind", [DINOv2Features, CLIPFeatures, CaptionScore])
def test_other_folders_are_refused_in_one_line(kind, tmp_path, dinov2, clip):
    with pytest.raises(ConfigError, match=r"must be a folder with config\.json"):
        kind(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="must hold weights as safetensors"):
        kind(tmp_path)
    with pytest.raises(ConfigError, match="folder: must hold a "):
        kind(clip if kind is DINOv2Features else dinov2)
