"""Networks of one's own: what they say of themselves, and the conditions they are given."""

import re
import sys
from pathlib import Path

import pytest
import torch
from grouped import grouped
from tiny_digits import trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ant_lightning import (
    DDIM,
    Batch,
    ConfigError,
    CosineSchedule,
    DigitsData,
    MultiTaskDiffusion,
    PCGrad,
    SNRClustering,
    load_run,
)
from ant_lightning.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "your_model.md").read_text()
NULL = {"labels": 4, "text": torch.full((2, 3), 9.0), "mask": torch.zeros(())}


class Told(nn.Module):
    """Predicts a number that it makes of everything it is told."""

    in_channels, input_size, num_classes = 1, (4, 6), 4
    null_condition = NULL

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x_t, t, condition):
        self.calls.append({name: each.clone() for name, each in condition.items()})
        number = sum(each.float().flatten(1).sum(1) for each in condition.values() if each.ndim > 1)
        number = number + sum(each.float() for each in condition.values() if each.ndim == 1)
        return self.weight * x_t + 0.01 * torch.as_tensor(number).view(-1, 1, 1, 1)


def made(backbone=None, **settings):
    return MultiTaskDiffusion(
        Told() if backbone is None else backbone,
        **grouped(
            **{
                "variance_type": "fixed_small",
                "schedule": CosineSchedule(100),
                "clustering": SNRClustering(3),
                "sampler": DDIM(num_steps=2),
                "seed": 0,
                **settings,
            }
        ),
    )


def told(n, start=0):
    return {
        "text": torch.arange(start, start + n).float().view(-1, 1, 1).expand(n, 2, 3),
        "mask": torch.ones(n),
    }


class Images(Dataset):
    def __init__(self, **lacking):
        self.lacking = lacking

    def __len__(self):
        return 12

    def __getitem__(self, i):
        condition = {name: each[0] for name, each in told(1, i).items()} | self.lacking
        condition = {name: each for name, each in condition.items() if each is not None}
        image = torch.full((1, 4, 6), i / 12 - 0.5)
        return Batch(image, torch.tensor(i % 4), torch.tensor(i), condition)


def test_the_five_lines_of_the_page_train_and_resume_from_the_working_folder(tmp_path, monkeypatch):
    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "MyBackbone" in c)
    config = next(c for c in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "MyBackbone" in c)
    (tmp_path / "mine.py").write_text(code)
    # In a folder of its own: the parser is in that folder while it reads it.
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "mine.yaml").write_text(config)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = ["digits/dit", "balancer/pcgrad", "clustering/snr", "settings/mine.yaml"]
    args = ["fit", *(part for name in names for part in ("--config", name))]
    args += ["--data.init_args.batch_size=20", "--trainer.limit_val_batches=0"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*args, "--trainer.max_steps=1"]) == 0
    assert main([*args, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    out = tmp_path / "out"
    run = str(tmp_path / "runs" / "digits_dit" / "version_0")
    assert main(["export", run, "--to=safetensors", "--trust=mine", f"--output={out}"]) == 0
    assert 'load_run(FOLDER, trust="mine").sample(4)' in (out / "README.md").read_text()
    assert load_run(out, trust="mine").sample(2).shape == (2, 1, 8, 8)


UNET = """
model:
  class_path: ant_lightning.MultiTaskDiffusion
  init_args:
    backbone:
      class_path: diffusers.UNet2DModel
      init_args:
        sample_size: 8
        in_channels: 1
        out_channels: 1
        block_out_channels: [8, 8]
        layers_per_block: 1
        norm_num_groups: 4
        down_block_types: [DownBlock2D, DownBlock2D]
        up_block_types: [UpBlock2D, UpBlock2D]
    process: {init_args: {variance_type: fixed_large}}
    sampling: {guidance_scale: 1.0, sampler: {init_args: {num_steps: 2}}}
"""


def test_a_network_of_diffusers_by_class_path(tmp_path, monkeypatch):
    (tmp_path / "unet.yaml").write_text(UNET)
    monkeypatch.chdir(tmp_path)
    names = ["digits/dit", "balancer/uw", "clustering/snr", "unet.yaml"]
    args = ["fit", *(part for name in names for part in ("--config", name))]
    args += ["--data.init_args.batch_size=20", "--trainer.limit_val_batches=0"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*args, "--trainer.max_steps=1"]) == 0
    module = load_run(max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime))
    assert type(module.backbone.network).__name__ == "UNet2DModel"
    assert module.sample(2).shape == (2, 1, 8, 8)


def test_every_condition_reaches_the_network_and_all_of_an_image_are_dropped_together(tmp_path):
    module = made(class_dropout=0.5, balancer=PCGrad(3))
    trainer(tmp_path, steps=2).fit(module, *[DataLoader(Images(), 12)] * 2)
    calls = module.backbone.calls
    text, mask, labels = (
        torch.cat([call[n] for call in calls]) for n in ("text", "mask", "labels")
    )
    dropped = mask == 0
    assert 0 < int(dropped.sum()) < len(mask)
    assert torch.equal((text == 9.0).all((1, 2)) & (labels == 4), dropped)
    kept = ~dropped
    assert torch.equal(labels[kept], text[kept][:, 0, 0].long() % 4)


def test_dropout_is_equal_on_one_and_two_ranks():
    module = made(class_dropout=0.5)
    batch = Batch(torch.zeros(8, 1, 4, 6), torch.arange(8) % 4, torch.arange(8), told(8))
    whole = module.draws(batch, module.clusters, step=3, rank=0, world_size=1).condition
    for rank in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        half = Batch(*(part[mine] for part in batch[:3]), {n: e[mine] for n, e in told(8).items()})
        found = module.draws(half, module.clusters, step=3, rank=rank, world_size=2).condition
        assert all(torch.equal(found[name], whole[name][mine]) for name in whole)


def test_guidance_takes_the_null_of_every_entry():
    module = made()
    module.sample(2, condition=told(2), guidance_scale=2.0)
    first = module.backbone.calls[0]
    assert torch.equal(first["text"][2:], NULL["text"].expand(2, 2, 3))
    assert first["labels"].tolist() == [0, 1, 4, 4]
    assert first["mask"].tolist() == [1, 1, 0, 0]
    x, t = torch.randn(2, 1, 4, 6), torch.tensor([5, 50])
    guided = module.guided([0, 1], condition=told(2), guidance_scale=3.0)(x, t)
    plain = module.guided([0, 1], condition=told(2), guidance_scale=1.0)(x, t)
    null = {"text": NULL["text"].expand(2, 2, 3), "mask": torch.zeros(2)}
    weak = module.guided([0, 1], condition=null, labels=4, guidance_scale=1.0)(x, t)
    torch.testing.assert_close(guided, weak + 3 * (plain - weak))


def test_an_output_object_is_unwrapped():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    class Wrapped(Told):
        def forward(self, x_t, t, condition):
            return Output(super().forward(x_t, t, condition))

    assert torch.equal(
        made(Wrapped()).sample(2, condition=told(2)), made().sample(2, condition=told(2))
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"null_condition": {"text": "none"}}, "null_condition must map the name .* 'none'"),
        ({"null_condition": {}}, "num_classes must be the number of classes .* found 4 with none"),
        ({"num_classes": 0}, "num_classes must be the number of classes .* found 0 with labels"),
        ({"input_size": (4, 6, 8)}, r"input_size must be a whole number .* pair|a height and"),
    ],
)
def test_a_wrong_part_of_the_protocol_is_named(attributes, message):
    with pytest.raises(ConfigError, match=f"^backbone: Told.*{message}"):
        made(Told(**attributes))


def test_a_missing_null_is_named():
    without = {**NULL, "text": None}
    for settings in ({"class_dropout": 0.1}, {"guidance_scale": 2.0}):
        with pytest.raises(ConfigError, match=r"must be 0|1 because Told has no null for text"):
            made(Told(null_condition=without), **settings)
    with pytest.raises(ConfigError, match="guidance_scale: must be 1 because Told has no null for"):
        made(Told(null_condition=without)).sample(2, condition=told(2), guidance_scale=2.0)


def test_a_condition_that_is_not_given_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^condition: must have text, mask for Told, "):
        made().sample(2)
    with pytest.raises(ConfigError, match=r"^condition: text must have one entry for each of"):
        made().sample(3, condition=told(2))
    with pytest.raises(ConfigError, match=r"^batch.condition: must have text for Told, found"):
        trainer(tmp_path).fit(made(), *[DataLoader(Images(text=None), 12)] * 2)
    null = {**NULL, "labels": 10}
    net = Told(input_size=8, num_classes=10, null_condition=null)
    with pytest.raises(ConfigError, match=r"^data: must have text, mask for Told, found none"):
        trainer(tmp_path).fit(made(net), DigitsData(batch_size=20))
    with pytest.raises(ConfigError, match=r"^null_condition: text must broadcast to the shape"):
        trainer(tmp_path).fit(made(), *[DataLoader(Images(text=torch.zeros(5)), 12)] * 2)
