"""Checkpoints for other classes, another size, and folders of diffusers fill our networks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ant_lightning import (
    ConfigError,
    DiscreteDiffusion,
    DiT,
    MultiTaskDiffusion,
    SNRClustering,
    Tasks,
    UNet,
    load_official_checkpoint,
)
from ant_lightning.errors import FileError
from ant_lightning.exports.networks import diffusers_network
from ant_lightning.exports.pipeline_folder import write_pipeline

SMALL = {"patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}


def dit(seed=None, *, input_size=8, num_classes=3, **settings):
    return filled(DiT(input_size=input_size, num_classes=num_classes, **SMALL | settings), seed)


def unet(seed=None, **settings):
    sizes = {"input_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1}
    return filled(UNet(**sizes | settings), seed)


def filled(network, seed):
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def same_but(ours, theirs, names):
    other = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if name not in names:
            assert torch.equal(value, other[name]), name


def test_classes_and_positions_are_made_anew_and_said(tmp_path):
    file, fresh = tmp_path / "w.pt", dit(num_classes=7, input_size=(4, 12))
    torch.save(dit(0).state_dict(), file)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ConfigError, match=r"num_classes: .* has 4 rows, the network's 8"):
        load_official_checkpoint(fresh, file)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    report = load_official_checkpoint(fresh, file, adapt=True)
    assert str(report).endswith(
        "; class table made anew (4 rows in the file, 8 here); positions computed anew (16 in the "
        "file, 12 here)"
    )
    own = {"y_embedder.embedding_table.weight", "pos_embed"}
    same_but(fresh, dit(0), own)
    for name in own:
        assert torch.equal(fresh.state_dict()[name], before[name])


def test_learned_positions_are_interpolated(tmp_path):
    source = dit(0, input_size=8)
    rows = torch.linspace(0, 1, 4)[:, None].expand(4, 4).flatten()  # the row of each patch
    with torch.no_grad():
        source.pos_embed.copy_(rows[None, :, None].expand(1, 16, 16))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    wide = dit(input_size=(8, 16))
    report = load_official_checkpoint(wide, tmp_path / "w.pt", adapt=True)
    assert report.adapted == ("positions interpolated (16 in the file, 32 here)",)
    expected = rows.view(4, 4)[:, :1].expand(4, 8).flatten()
    torch.testing.assert_close(wide.pos_embed[0, :, 3], expected, atol=1e-5, rtol=0)


def test_a_conditional_network_starts_from_an_unconditional_one_and_back(tmp_path):
    torch.save(unet(0).state_dict(), tmp_path / "plain.pt")
    torch.save(unet(1, num_classes=4).state_dict(), tmp_path / "classes.pt")
    conditional, plain = unet(num_classes=5), unet()
    report = load_official_checkpoint(conditional, tmp_path / "plain.pt", adapt=True)
    assert report.adapted == ("class table made anew (0 rows in the file, 5 here)",)
    same_but(conditional, unet(0), {"label_emb.weight"})
    report = load_official_checkpoint(plain, tmp_path / "classes.pt", adapt=True)
    assert report.adapted == ("class table made anew (4 rows in the file, 0 here)",)
    same_but(plain, unet(1, num_classes=4), ())


def test_other_weights_that_differ_are_still_refused(tmp_path):
    torch.save(dit(0, depth=2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"extra: blocks\.1"):
        load_official_checkpoint(dit(), tmp_path / "w.pt", adapt=True)


@pytest.mark.parametrize("of", ["dit", "dit_without_null", "adm", "ldm"])
def test_a_folder_of_diffusers_is_read_back_bit_for_bit(of, tmp_path):
    spatial = {"use_spatial_transformer": True, "context_dim": 8, "num_classes": 3}
    make = {
        "dit": dit,
        "dit_without_null": lambda seed=None: dit(seed, class_dropout_prob=0.0),
        "adm": lambda seed=None: unet(seed, resblock_updown=True, num_classes=3),
        "ldm": lambda seed=None: unet(seed, **spatial),
    }[of]
    source = make(0)
    outputs = {"variance_type": "learned_range"} if of.startswith("dit") else {}
    module = MultiTaskDiffusion(
        source, process=DiscreteDiffusion(**outputs), tasks=Tasks(SNRClustering(2)), seed=0
    )
    write_pipeline(module, tmp_path)
    fresh = make()
    report = load_official_checkpoint(fresh, tmp_path)
    same_but(fresh, source, ())
    assert report.num_tensors == len(source.state_dict())


def test_a_folder_for_other_classes_starts_a_run(tmp_path, capsys):
    network = diffusers_network(dit(0, num_classes=5))
    network.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    module = MultiTaskDiffusion(
        dit(),
        process=DiscreteDiffusion(variance_type="learned_range"),
        tasks=Tasks(SNRClustering(2)),
        init_from=str(tmp_path),
    )
    assert "class table made anew (6 rows in the file, 4 here)" in capsys.readouterr().out
    same_but(module.backbone, dit(0, num_classes=5), {"y_embedder.embedding_table.weight"})


def test_a_folder_of_another_network_is_refused(tmp_path):
    network = diffusers_network(dit(0))
    network.save_pretrained(tmp_path / "dit")
    with pytest.raises(ConfigError, match="num_attention_heads 4 as the backbone, found 2"):
        load_official_checkpoint(dit(num_heads=4), tmp_path / "dit")
    with pytest.raises(ConfigError, match="_class_name UNet2DModel as the backbone, found DiT"):
        load_official_checkpoint(unet(), tmp_path / "dit")
    with pytest.raises(FileError, match=r"must be a folder of diffusers, found no config.json"):
        load_official_checkpoint(dit(), tmp_path)
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "empty" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"21 missing: x_embedder"):
        load_official_checkpoint(dit(), tmp_path / "empty")
