"""Images of 8 x 16 train, are sampled, drawn as a grid and scored."""

import json

import pytest
import torch
from first_stages import save_first_stages
from PIL import Image
from tiny_digits import trainer

from ant_lightning import (
    DDIM,
    DiscreteDiffusion,
    DiT,
    FirstStage,
    GenerationMetrics,
    LatentsData,
    LatentWriter,
    MapStyleData,
    ModuleFeatures,
    MultiTaskDiffusion,
    PCGrad,
    SampleGrid,
    SampleWriter,
    Sampling,
    SNRClustering,
    StoredImages,
    Tasks,
    UNet,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::ant_lightning.generation.frechet.RankDeficientWarning"
)
NETWORKS = {
    "dit": lambda: DiT(
        input_size=(8, 16),
        patch_size=4,
        in_channels=3,
        hidden_size=8,
        depth=1,
        num_heads=1,
        num_classes=0,
        learn_sigma=False,
    ),
    "adm": lambda: UNet(
        input_size=(8, 16), model_channels=32, channel_mult=[1, 1], num_res_blocks=1
    ),
}


class Features(torch.nn.Module):
    """Means of rows and of columns: an image of another shape has another number of them."""

    def forward(self, images):
        values = images.double().mean(1)
        return torch.cat([values.mean(1), values.mean(2)], 1)


def test_rectangular_latents_are_encoded_trained_and_decoded(tmp_path):
    torch.manual_seed(0)
    images = list(torch.randint(0, 256, (12, 3, 8, 16), dtype=torch.uint8))
    data = MapStyleData(images, batch_size=6, num_held_out=6, num_workers=0)
    stage = FirstStage(str(save_first_stages(tmp_path) / "kl"), scale=0.5)
    LatentWriter(str(tmp_path / "cache")).write(data, stage)
    sizes = {"input_size": (4, 8), "patch_size": 2, "in_channels": 4, "hidden_size": 8}
    module = MultiTaskDiffusion(
        DiT(**sizes, depth=1, num_heads=1, num_classes=0, learn_sigma=False),
        process=DiscreteDiffusion(),
        tasks=Tasks(SNRClustering(2), balancer=PCGrad(2)),
        sampling=Sampling(DDIM(2)),
        first_stage=stage,
        seed=0,
    )
    cached = LatentsData(str(tmp_path / "cache"), images=data, batch_size=6, num_workers=0)
    trainer(tmp_path, steps=2).fit(module, cached)
    assert module.sample(2).shape == (2, 3, 8, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rectangle_trains_samples_and_scores(name, tmp_path):
    torch.manual_seed(0)
    images = list(torch.randint(0, 256, (24, 3, 8, 16), dtype=torch.uint8))
    data = MapStyleData(images, batch_size=8, num_held_out=8, num_workers=0)
    module = MultiTaskDiffusion(
        NETWORKS[name](),
        process=DiscreteDiffusion(),
        tasks=Tasks(SNRClustering(2), balancer=PCGrad(2)),
        sampling=Sampling(DDIM(2)),
        seed=0,
    )
    assert module.image_shape == (3, 8, 16)
    features = ModuleFeatures(Features(), num_features=24, name="rows and columns")
    grid = SampleGrid(num_images=4, columns=2)
    scores = GenerationMetrics(features, num_images=8)
    run = trainer(tmp_path, scores, grid, steps=2, val_check_interval=2)
    before = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    run.fit(module, data)
    assert any(not torch.equal(before[n], p) for n, p in module.backbone.named_parameters())
    assert module.sample(3).shape == (3, 3, 8, 16)
    row = json.loads(next(tmp_path.rglob("generation_metrics.jsonl")).read_text().splitlines()[-1])
    assert row["scores"]["fid"] > 0
    with Image.open(grid.path) as picture:
        assert picture.width > picture.height
    writer = SampleWriter(num_images=2, folder=str(tmp_path / "images"), batch_size=2)
    trainer(tmp_path, writer).predict(module, data)
    stored = StoredImages(str(tmp_path / "images"))
    assert next(stored.batches(batch_size=2)).shape == (2, 3, 8, 16)
