"""Specialists of intervals leave switched or merged, whole or as adapters."""

import copy
import json

import pytest
import torch
import yaml
from exported import (
    DIT,
    SETTINGS,
    dit_of_diffusers,
    edm,
    filled,
    flow,
    labelled,
    module,
    outputs,
    read,
    routed_rectangle,
    same_images,
    write_run,
)
from tiny_digits import saved

from ant_lightning import (
    DDIM,
    DiffusersBackbone,
    DiscreteDiffusion,
    DiT,
    IntervalExperts,
    LoRA,
    SNRClustering,
    Tasks,
    TimestepSampling,
    export,
    load_run,
    with_experts,
)
from ant_lightning.backbones.diffusers_folder import read_folder
from ant_lightning.cli.main import main
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.exports.networks import diffusers_network
from ant_lightning.exports.pipeline_folder import write_pipeline
from ant_lightning.transfer.experts import borders_between


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def experts(run, tmp_path_factory):
    """Specialists of both ends of the noise axis, live and averaged."""
    from ant_lightning import DiTModule

    files = []
    for seed, interval in ((1, (0, 300)), (2, (600, 1000))):
        network = DiT(**DIT, in_channels=1, num_classes=5)
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        made = DiTModule(
            network,
            tasks=Tasks(SNRClustering(3)),
            timesteps=TimestepSampling(interval=interval),
            seed=5,
        )
        files.append(saved(made, tmp_path_factory.mktemp("expert") / "last.ckpt"))
    return files


def test_a_pipeline_switches_between_experts(run, experts, tmp_path, monkeypatch):
    exported = export(run, to="diffusers", output=tmp_path / "out", weights="live", experts=experts)
    assert "2 specialists of intervals, switched" in (exported.path / "README.md").read_text()
    made = with_experts(load_run(run, weights="model"), experts, averaged=False)
    pipeline = same_images(made, exported.path, monkeypatch)
    assert len(pipeline.transformer.networks) == 3
    with pytest.raises(ConfigError, match=r"to: must be diffusers for a model that switches"):
        export(run, to="torch", output=tmp_path / "no", weights="live", experts=experts)


def test_the_command_line_takes_experts(run, experts, tmp_path, capsys):
    options = [f"--experts=[{', '.join(experts)}]", "--weights=live"]
    args = ["export", str(run), "--to=torch", f"--output={tmp_path / 'out'}", *options]
    assert main([*args, "--merge_weights=[0.5, 0]"]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["experts"], about["merge_weights"]) == (experts, [0.5, 0.0])
    assert main(args) == 2
    assert "to: must be diffusers for a model that switches" in capsys.readouterr().err


def test_merged_experts_leave_in_every_format(run, experts, tmp_path):
    merged = {"experts": experts, "merge_weights": [0.5, 0.25], "weights": "live"}
    made = with_experts(
        load_run(run, weights="model"), experts, merge_weights=[0.5, 0.25], averaged=False
    )
    exported = export(run, to="safetensors", output=tmp_path / "out", **merged)
    assert torch.equal(load_run(exported.path).sample(2), made.sample(2))
    assert "merged with weights [0.5, 0.25]" in (exported.path / "README.md").read_text()


def as_dit():
    process = DiscreteDiffusion(variance_type="learned_range")
    return module(dit_of_diffusers(5), process, sampler=DDIM(4), guidance_scale=1.5)


def changed(network):
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.04)
    return network


@pytest.mark.parametrize("make", [labelled, as_dit], ids=["UNet2DModel", "DiT"])
def test_networks_of_diffusers_are_switched_too(make, tmp_path, monkeypatch):
    made, other = make(), changed(make().backbone)
    made.backbone = IntervalExperts([made.backbone, other, made.backbone], [300.5, 600.5])
    write_pipeline(made, tmp_path)
    network = diffusers_network(made.backbone).networks
    assert [type(each).__name__ for each in network] == [type(network[0]).__name__] * 2
    same_images(made, tmp_path, monkeypatch)


PAIRS = {
    "UNet2DModel": labelled,
    "routed DiT": routed_rectangle,
    "SiT": flow,
    "flow of diffusers": lambda: flow("diffusers", shift=3.0),
}


@pytest.mark.parametrize("case", PAIRS)
def test_two_experts_are_two_parts_of_a_pipeline(case, tmp_path, monkeypatch):
    made, low = PAIRS[case](), changed(PAIRS[case]().backbone)
    borders, rising = borders_between(made.process, [600])
    made.backbone = IntervalExperts([low, made.backbone], borders, rising=rising)
    assert write_pipeline(made, tmp_path) == []
    name = "unet" if case.startswith("UNet") else "transformer"
    pipeline = same_images(made, tmp_path, monkeypatch)
    assert pipeline.config.boundary_ratio == pytest.approx(0.6, abs=1e-3)
    second = getattr(pipeline, f"{name}_2")
    used = []
    for part, each in (("high", getattr(pipeline, name)), ("low", second)):
        each.register_forward_pre_hook(lambda *_, part=part: used.append(part))
    pipeline(batch_size=3, num_inference_steps=4)
    assert used == sorted(used)  # the network of much noise first
    assert set(used) == {"high", "low"}
    message = f"one network.*found (two|{name} and {name}_2)"
    with pytest.raises(FileError, match=message):
        read_folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        DiffusersBackbone(folder=str(tmp_path))


def test_two_experts_under_edm_are_one_part(tmp_path, monkeypatch):
    made, low = edm(), changed(edm().backbone)
    borders, rising = borders_between(made.process, [400])
    made.backbone = IntervalExperts([low, made.backbone], borders, rising=rising)
    write_pipeline(made, tmp_path)
    assert len(same_images(made, tmp_path, monkeypatch).unet.networks) == 2


def with_adapter(folder, name, seed, **settings):
    """A checkpoint with an adapter alone, of random weights."""
    from ant_lightning import DiTModule

    made = DiTModule(
        DiT(**DIT, in_channels=1, num_classes=5),
        tasks=Tasks(SNRClustering(3)),
        init_from=str(folder / "base.pt"),
        adapter=LoRA(r=2, alpha=6, target_modules=("qkv",)),
        seed=5,
        **settings,
    )
    torch.manual_seed(seed)
    for parameter in made.backbone.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return saved(made, folder / name)


def test_experts_that_are_adapters_leave_switched_and_merged(tmp_path, monkeypatch):
    base = filled(DiT(**DIT, in_channels=1, num_classes=5))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    with_adapter(tmp_path, "run/checkpoints/last.ckpt", 0)
    files = [
        with_adapter(tmp_path, f"{a}.ckpt", a, timesteps=TimestepSampling(interval=(a, a + 400)))
        for a in (100, 500)
    ]
    settings = copy.deepcopy(SETTINGS)
    adapter = {"r": 2, "alpha": 6, "target_modules": ["qkv"]}
    settings["model"]["init_args"] |= {
        "init_from": str(tmp_path / "base.pt"),
        "adapter": {"class_path": "ant_lightning.LoRA", "init_args": adapter},
    }
    run = tmp_path / "run"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    own = load_run(run, weights="model")
    options = {"weights": "live", "experts": files}
    switched = export(run, to="diffusers", output=tmp_path / "switched", **options)
    made = with_experts(own, files, averaged=False)
    assert not torch.allclose(made.sample(2), own.sample(2), atol=1e-3)
    same_images(made, switched.path, monkeypatch)
    options["merge_weights"] = [0.5, 0.25]
    made = with_experts(own, files, merge_weights=[0.5, 0.25], averaged=False)
    for to in ("official", "safetensors"):
        exported = export(run, to=to, output=tmp_path / to, **options)
        torch.testing.assert_close(
            outputs(read(exported)), outputs(made.backbone), atol=1e-5, rtol=0
        )
    (tmp_path / "base.pt").unlink()  # the adapter and its base are one now
    assert torch.equal(load_run(exported.path).sample(2), made.sample(2))
