"""Exports are read back by the programs they are for, and compute and sample the same."""

import json

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, EDMEulerScheduler
from first_stages import save_first_stages
from lightning import Trainer

from ant_lightning import (
    DDIM,
    DDPM,
    EDM,
    CosineSchedule,
    DiffusersSampler,
    DiscreteDiffusion,
    DiT,
    FirstStage,
    FlowMatching,
    MultiTaskDiffusion,
    ODESampler,
    Sampling,
    ScaledLinearSchedule,
    SNRClustering,
    Tasks,
    UNet,
    export,
    load_official_checkpoint,
    load_run,
    with_experts,
)
from ant_lightning.cli.main import main
from ant_lightning.errors import ConfigError
from ant_lightning.exports.exported import Exported
from ant_lightning.exports.pipeline_folder import write_pipeline
from ant_lightning.exports.single_files import write_official, write_program

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


def adm_with_classes():
    network = UNet(**UNETS["adm_with_classes"])
    sampler = DDIM(5, eta=0.3)
    return module(network, DiscreteDiffusion(prediction_type="v"), sampler=sampler)


def dit():
    network = DiT(**DIT, in_channels=1, num_classes=5)
    process = DiscreteDiffusion(variance_type="learned_range")
    return module(network, process, sampler=DDPM(5, spacing="ddim"), guidance_scale=1.5)


def flow(convention="sit", **settings):
    network = DiT(**DIT, in_channels=2, num_classes=0, learn_sigma=convention == "sit")
    process = FlowMatching(convention=convention)
    return module(network, process, sampler=ODESampler(4, method="euler", **settings))


def edm():
    sampler = DiffusersSampler(EDMEulerScheduler(), num_steps=4)
    return module(UNet(**UNET), EDM(), sampler=sampler)


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
    "adm_with_classes": adm_with_classes,
    "dit": dit,
    "flow": flow,
    "flow_of_diffusers": lambda: flow("diffusers", shift=3.0),
    "edm": edm,
}


def same_images(made, folder, monkeypatch, num_images=3):
    """The images of the pipeline in `folder` are those of the module, from the same noise."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = made.image_noise(range(num_images))
    for place in ("schedulers.scheduling_ddpm", "schedulers.scheduling_ddim", "utils.torch_utils"):
        monkeypatch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: noise())
    monkeypatch.setattr(
        "diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *_, **__: noise()
    )
    if type(pipeline).__name__ == "DDPMPipeline":
        steps = {"num_inference_steps": made.sampler.num_steps}
        images = pipeline(batch_size=num_images, output_type="pt", **steps).images
    else:
        images = pipeline(latents=noise(), output_type="pt").images
    expected = made.sample(num_images) / 2 + 0.5
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1 / 255, rtol=0)
    return pipeline


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_draws_the_images_of_the_run(case, tmp_path, monkeypatch):
    made = CASES[case]()
    notes = write_pipeline(made, tmp_path)
    assert len(notes) == (case == "edm")
    pipeline = same_images(made, tmp_path, monkeypatch)
    assert (type(pipeline).__name__ == "DDPMPipeline") == (case == "adm")


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_latent_pipeline_has_first_stage_and_classes(kind, stages, tmp_path, monkeypatch):
    made = ldm(stages, kind)
    assert write_pipeline(made, tmp_path) == []
    pipeline = same_images(made, tmp_path, monkeypatch)
    tokens = pipeline.class_table(torch.tensor([2]))
    assert torch.equal(tokens[0, 0], made.backbone.class_embedder["embedding"].weight[2])
    assert pipeline(class_labels=[1], num_inference_steps=1).images[0].size == (8, 8)


def test_networks_of_a_folder_compute_the_same_at_all_times(tmp_path):
    made = dit()
    write_pipeline(made, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 500, 999]), torch.arange(4)
    with torch.no_grad():
        expected = made.backbone(x, t, labels)
        output = pipeline.transformer(x, t, class_labels=labels).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_what_samples_otherwise_is_said(tmp_path):
    made = dit()
    made.sampler = DDIM(7, spacing="even")
    (note,) = write_pipeline(made, tmp_path)
    assert note.startswith("DDIMScheduler visits other timesteps than DDIM(num_steps=7")
    heun = flow()
    heun.sampler = ODESampler(4)
    (note,) = write_pipeline(heun, tmp_path / "heun")
    assert note.startswith("Euler's method on even times samples in place of ODESampler(")


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
    assert write_official(adm_with_classes(), tmp_path) == [
        "the network predicts v; tell the official code"
    ]
    sit = module(DiT(**DIT, in_channels=2, num_classes=3), FlowMatching())
    assert write_official(sit, tmp_path / "sit") == []
    report = load_official_checkpoint(
        DiT(**DIT, in_channels=2, num_classes=3), tmp_path / "sit" / "model.pt"
    )
    assert report.layout == "state dict"


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


# From a run's folder.

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with averages other than its weights, and a score."""
    from ant_lightning import DiTModule

    folder = tmp_path_factory.mktemp("run")
    network = filled(DiT(**DIT, in_channels=1, num_classes=5))
    made = DiTModule(network, tasks=Tasks(SNRClustering(3)), seed=5)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(made)
    path = folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
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


@pytest.mark.parametrize("to", ["diffusers", "official", "safetensors", "torch"])
def test_every_format_is_read_back_with_equal_outputs(to, run, tmp_path):
    live, averaged = load_run(run, weights="model").backbone, load_run(run).backbone
    assert (outputs(live) - outputs(averaged)).abs().max() > 1e-2
    exported = export(run, to=to, output=tmp_path / "ema")
    torch.testing.assert_close(outputs(read(exported)), outputs(averaged), atol=1e-5, rtol=0)
    if to != "torch":  # tracing takes long
        exported = export(run, to=to, output=tmp_path / "live", weights="live")
        torch.testing.assert_close(outputs(read(exported)), outputs(live), atol=1e-5, rtol=0)
    card = (exported.path / "README.md").read_text()
    for text in ("| model | DiTModule |", "folder photos", "| fid | 12.35 |", "[0, "):
        assert text in card


def test_safetensors_give_the_whole_module_back(run, tmp_path):
    found = load_run(export(run, to="safetensors", output=tmp_path / "out").path)
    assert torch.equal(found.sample(2), load_run(run).sample(2))
    assert found.clusters.boundaries == load_run(run).clusters.boundaries


def test_the_command_line_writes_into_the_run_and_replaces_only_its_own(run, capsys):
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    folder = run / "exports" / "safetensors"
    assert str(folder) in capsys.readouterr().out
    (folder / "stray").touch()
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "--to", "safetensors"]) == 0
    assert not (folder / "stray").exists()
    (folder / "export.json").unlink()
    before = sorted(folder.iterdir())
    assert main(["export", str(run), "--to", "official", "--output", str(folder)]) == 2
    assert "output: must be a new folder or one that an export wrote" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
    assert main(["export", str(run), "--to", "onnx"]) == 2
    assert "onnx" in capsys.readouterr().err


def test_a_refused_export_leaves_nothing_behind(run, tmp_path):
    with pytest.raises(ConfigError, match=r"first_stage: must be that of the run \(no first stage"):
        export(run, to="diffusers", output=tmp_path / "out", first_stage=str(stage_of(tmp_path)))
    assert not (tmp_path / "out").exists()


def stage_of(folder):
    return save_first_stages(folder) / "kl"


@pytest.fixture(scope="module")
def experts(run, tmp_path_factory):
    """Specialists of both ends of the noise axis, live and averaged."""
    from ant_lightning import DiTModule, TimestepSampling

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
        trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        trainer.strategy.connect(made)
        files.append(str(tmp_path_factory.mktemp("expert") / "last.ckpt"))
        trainer.save_checkpoint(files[-1])
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


class LocalHub:
    """The two calls of the hub that the mixin makes, on a folder."""

    root = None

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **_):
        Exported(folder_path).save_pretrained(self.root / repo_id)
        return f"local/{repo_id}"


def test_an_export_is_pushed_as_the_mixin_does(run, tmp_path, monkeypatch):
    LocalHub.root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", LocalHub)
    exported = export(run, to="safetensors", output=tmp_path / "out")
    assert exported.push_to_hub("me/digits") == "local/me/digits"
    found = Exported.from_pretrained(tmp_path / "hub" / "me" / "digits")
    assert found.to == "safetensors"
    names = {path.name: path.read_bytes() for path in exported.path.iterdir()}
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == names
    assert torch.equal(load_run(found.path).sample(1), load_run(run).sample(1))
