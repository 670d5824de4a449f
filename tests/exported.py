"""Tiny modules to export, a run's folder, and how an export of each is read back."""

import json
import sys

import torch
import yaml
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    UNet2DModel,
)
from tiny_digits import saved

from ant_lightning import (
    DDIM,
    DDPM,
    EDM,
    ChannelRouting,
    CosineSchedule,
    DiffusersBackbone,
    DiffusersSampler,
    DiscreteDiffusion,
    DiT,
    FlowMatching,
    MultiTaskDiffusion,
    ODESampler,
    Sampling,
    SNRClustering,
    Tasks,
    UNet,
    load_official_checkpoint,
    load_run,
)
from ant_lightning.exports.stock import stock_of

UNET = {"input_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1}
DIT = {"input_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}


def filled(network, std=0.05):
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return network


def module(network, process=None, first_stage=None, **sampling):
    return MultiTaskDiffusion(
        filled(network),
        process=process or DiscreteDiffusion(),
        tasks=Tasks(SNRClustering(3)),
        sampling=Sampling(**sampling),
        first_stage=first_stage,
        seed=3,
    ).eval()


UNETS = {
    "adm": {**UNET, "out_channels": 6, "resblock_updown": True},
    "adm_with_classes": {**UNET, "num_classes": 4, "class_dropout_prob": 0.1},
    "ldm": {
        **UNET,
        "input_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "num_classes": 3,
        "class_dropout_prob": 0.1,
        "use_spatial_transformer": True,
        "context_dim": 8,
    },
}


def adm():
    network = UNet(**UNETS["adm"])
    process = DiscreteDiffusion(CosineSchedule(1000), variance_type="learned_range")
    return module(network, process, sampler=DDPM(10))


def ddim():
    return module(UNet(**UNET), DiscreteDiffusion(), sampler=DDIM(5, eta=0.3))


def labelled():
    sizes = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    network = UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=4,
        **sizes,
    )
    backbone = DiffusersBackbone(network, null_class=3)
    return module(backbone, DiscreteDiffusion(), sampler=DDPM(5), guidance_scale=1.5)


def adm_with_classes():
    network = UNet(**UNETS["adm_with_classes"])
    sampler = DDIM(5, eta=0.3)
    return module(network, DiscreteDiffusion(prediction_type="v"), sampler=sampler)


def dit():
    network = DiT(**DIT, in_channels=1, num_classes=5)
    process = DiscreteDiffusion(variance_type="learned_range")
    return module(network, process, sampler=DDPM(5, spacing="ddim"), guidance_scale=1.5)


def routed_rectangle():
    sizes = DIT | {"input_size": (8, 12)}
    network = DiT(**sizes, in_channels=1, num_classes=5, routing=ChannelRouting(1.0, 0.5))
    process = DiscreteDiffusion(variance_type="learned_range")
    return module(network, process, sampler=DDPM(5, spacing="ddim"), guidance_scale=1.5)


def flow(convention="sit", **settings):
    network = DiT(**DIT, in_channels=2, num_classes=0, learn_sigma=convention == "sit")
    process = FlowMatching(convention=convention)
    return module(network, process, sampler=ODESampler(4, method="euler", **settings))


def edm():
    sampler = DiffusersSampler(EDMEulerScheduler(), num_steps=4)
    return module(UNet(**UNET), EDM(), sampler=sampler)


def dit_of_diffusers(num_classes):
    return DiffusersBackbone(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=4,
            num_embeds_ada_norm=num_classes,
        )
    )


def same_images(made, folder, monkeypatch, num_images=3):
    """The images of the pipeline in `folder` are those of the module, from the same noise."""
    stock = stock_of(made)
    # Without trust, no code of the folder can run.
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=stock is None)
    pipeline.set_progress_bar_config(disable=True)
    noise = made.image_noise(range(num_images))
    for place in ("schedulers.scheduling_ddpm", "schedulers.scheduling_ddim", "utils.torch_utils"):
        monkeypatch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: noise())
    if stock is None:
        images = pipeline(latents=noise(), output_type="np").images
    else:
        own = sys.modules[type(pipeline).__module__]
        monkeypatch.setattr(own, "randn_tensor", lambda *_, **__: noise())
        chosen = {"batch_size": num_images}
        if made.num_classes:
            chosen = {"class_labels": list(range(num_images))}
        images = pipeline(output_type="np", **chosen, **stock.call).images
    expected = made.sample(num_images) / 2 + 0.5
    assert expected.std() > 0.01
    found = torch.from_numpy(images).movedim(-1, 1)
    torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)
    return pipeline


SETTINGS = {
    "model": {
        "class_path": "ant_lightning.DiTModule",
        "init_args": {
            "backbone": {
                "class_path": "ant_lightning.DiT",
                "init_args": {**DIT, "in_channels": 1, "num_classes": 5},
            },
            "tasks": {
                "clustering": {
                    "class_path": "ant_lightning.SNRClustering",
                    "init_args": {"num_tasks": 3},
                }
            },
            "sampling": {
                "sampler": {"class_path": "ant_lightning.DDIM", "init_args": {"num_steps": 2}}
            },
        },
    },
    "data": {"class_path": "ant_lightning.ImageFolderData", "init_args": {"folder": "photos"}},
    "seed_everything": 5,
}


def write_run(folder):
    """The folder of a run, with averages other than its weights, and a score."""
    from ant_lightning import DiTModule

    network = filled(DiT(**DIT, in_channels=1, num_classes=5))
    made = DiTModule(network, tasks=Tasks(SNRClustering(3)), seed=5)
    path = saved(made, folder / "checkpoints" / "last.ckpt")
    content = torch.load(path, weights_only=True)
    averages = {n: p.detach() / 2 for n, p in network.named_parameters() if p.requires_grad}
    content["callbacks"] = {"EMA": {"averages": averages}}
    torch.save(content, path)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    scores = {"num_images": 50, "scores": {"fid": 12.34567}}
    (folder / "generation_metrics.jsonl").write_text(json.dumps(scores) + "\n")
    return folder


INPUTS = (torch.linspace(-1, 1, 192).view(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.arange(3))


def outputs(network):
    with torch.no_grad():
        return network(*INPUTS)


def read(exported):
    """The network of an export, by the program that it is for."""
    path, own = exported.path, DiT(**DIT, in_channels=1, num_classes=5)
    if exported.to == "torch":
        return torch.export.load(path / "model.pt2").module()
    if exported.to == "diffusers":
        network = DiffusionPipeline.from_pretrained(path, trust_remote_code=True).transformer
        return lambda x, t, y: network(x, t, class_labels=y).sample
    if exported.to == "safetensors":
        return load_run(path).backbone
    # As the official code: a bare state dict that fits entirely.
    own.load_state_dict(torch.load(path / "model.pt", weights_only=True), strict=True)
    load_official_checkpoint(own, path / "model.pt")
    return own
