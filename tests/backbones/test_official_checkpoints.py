"""Files of every published kind, written at small size: loaded whole, or refused whole."""

import argparse
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ant_lightning import ConfigError, DiT, UNet, load_official_checkpoint
from ant_lightning.backbones.checkpoint_layouts import find_weights

MANIFESTS = Path(__file__).parents[1] / "golden" / "A_manifests"


def dit(**settings):
    defaults = {"input_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return DiT(**{**defaults, **settings})


def unet(**settings):
    defaults = {"input_size": 8, "model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1}
    return UNet(**{**defaults, **settings})


def latent_unet():
    return unet(use_spatial_transformer=True, context_dim=8, num_classes=3, class_dropout_prob=0.1)


def weights_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


def assert_holds(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_refused(model, path, *patterns, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_official_checkpoint(model, path, **options)
    for pattern in patterns:
        assert pattern in str(caught.value)
    assert_holds(model, before)


def ldm_content(model, live, averages, *, class_table=None):
    """A latent-diffusion checkpoint: prefixes, EMA without dots, the other stages, schedules."""
    skip = "class_embedder."
    state = {f"model.diffusion_model.{n}": v for n, v in live.items() if not n.startswith(skip)}
    state["betas"] = torch.zeros(4)
    for name, value in averages.items():
        if not name.startswith(skip):
            state["model_ema.diffusion_model" + name.replace(".", "")] = value
    if averages:
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)
    state["first_stage_model.encoder.conv_in.weight"] = torch.ones(2, 3)
    state["first_stage_model.quantize.embedding.weight"] = torch.ones(5, 3)
    if class_table is not None:
        state["cond_stage_model.embedding.weight"] = class_table
    return {"epoch": 3, "global_step": 10, "state_dict": state, "optimizer_states": []}


@pytest.mark.parametrize("make", [dit, unet, latent_unet])
@pytest.mark.parametrize("kind", ["torch.save", "legacy torch.save", "safetensors"])
def test_raw_state_dicts(make, kind, tmp_path):
    model = make()
    expected = weights_of(model, 0)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "ema_0.9999_500000.pt")
    if kind == "safetensors":
        save_file(expected, path)
    else:
        torch.save(expected, path, _use_new_zipfile_serialization=kind == "torch.save")
    report = load_official_checkpoint(model, str(path))
    assert_holds(model, expected)
    assert (report.layout, report.weights, report.ignored) == ("state dict", None, {})
    assert report.num_tensors == len(expected)
    assert report.num_parameters == sum(value.numel() for value in expected.values())


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_training_files_of_dit_and_ant(weights, tmp_path):
    model = dit()
    content = {
        "model": weights_of(model, 0),
        "ema": weights_of(model, 1),
        "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/2", image_size=256, use_wandb=False),
    }
    torch.save(content, tmp_path / "0400000.pt")
    report = load_official_checkpoint(model, tmp_path / "0400000.pt", weights=weights)
    assert_holds(model, content[weights])
    assert (report.layout, report.weights) == ("training file", weights)
    assert set(report.ignored) == {"model", "ema", "opt", "args"} - {weights}
    assert f"{weights} weights" in str(report)
    assert "args (1)" in str(report)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_latent_diffusion_files(weights, tmp_path):
    model = unet()
    sets = {"model": weights_of(model, 0), "ema": weights_of(model, 1)}
    torch.save(ldm_content(model, sets["model"], sets["ema"]), tmp_path / "model.ckpt")
    report = load_official_checkpoint(model, tmp_path / "model.ckpt", weights=weights)
    assert_holds(model, sets[weights])
    assert (report.layout, report.weights) == ("latent-diffusion", weights)
    assert report.ignored["first_stage_model"] == 2
    assert report.ignored["betas"] == 1


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_latent_diffusion_keeps_the_class_table_beside_the_unet(weights, tmp_path):
    model = latent_unet()
    sets = {"model": weights_of(model, 0), "ema": weights_of(model, 1)}
    table = torch.randn(4, 8)
    content = ldm_content(model, sets["model"], sets["ema"], class_table=table)
    torch.save(content, tmp_path / "cin.ckpt")
    load_official_checkpoint(model, tmp_path / "cin.ckpt", weights=weights)
    assert_holds(model, {**sets[weights], "class_embedder.embedding.weight": table})


def test_old_lightning_files_may_name_their_callback_class(tmp_path, monkeypatch):
    model = unet()
    live = weights_of(model, 0)
    module = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[module].ModelCheckpoint = callback
    content = ldm_content(model, live, live)
    content["callbacks"] = {callback: {"best_model_path": "x.ckpt"}}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    load_official_checkpoint(model, tmp_path / "last.ckpt")
    assert_holds(model, live)


@pytest.mark.parametrize("name", ["ldm_ffhq256", "ldm_celeba256", "ldm_cin256_v2"])
def test_names_without_dots_stay_distinct_in_the_full_models(name):
    names = list(json.loads((MANIFESTS / f"{name}.json").read_text())["state_dict"])
    state = {f"model.diffusion_model.{n}": torch.zeros(0) for n in names}
    values = {n: torch.tensor(i) for i, n in enumerate(names)}
    state |= {"model_ema.diffusion_model" + n.replace(".", ""): v for n, v in values.items()}
    found, _ = find_weights({"state_dict": state}, names, weights="ema", path=Path("x.ckpt"))
    assert found == values


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_own_lightning_checkpoints(weights, tmp_path):
    model = dit()
    live, averages = weights_of(model, 0), weights_of(model, 1)
    del averages["pos_embed"]  # frozen: no average is kept
    content = {
        "state_dict": {**{f"backbone.{n}": v for n, v in live.items()}, "log_vars": torch.ones(5)},
        "callbacks": {"Other": {"best": 1}, "EMA": {"averages": averages, "num_updates": 3}},
    }
    torch.save(content, tmp_path / "last.ckpt")
    report = load_official_checkpoint(model, tmp_path / "last.ckpt", weights=weights)
    assert_holds(model, live if weights == "model" else {**live, **averages})
    assert (report.layout, report.ignored) == ("lightning", {"log_vars": 1})


def test_values_take_the_dtype_of_the_network(tmp_path):
    model = dit().double()
    half = {name: value.half() for name, value in weights_of(model, 0).items()}
    torch.save(half, tmp_path / "half.pt")
    load_official_checkpoint(model, tmp_path / "half.pt")
    assert_holds(model, {name: value.double() for name, value in half.items()})


def test_weights_that_the_file_does_not_hold(tmp_path):
    model, other = dit(), unet()
    live = weights_of(model, 0)
    torch.save({"model": live, "opt": {}}, tmp_path / "dit.pt")
    assert_refused(model, tmp_path / "dit.pt", "which holds model, found ema")
    torch.save(ldm_content(other, weights_of(other, 0), {}), tmp_path / "ldm.ckpt")
    assert_refused(other, tmp_path / "ldm.ckpt", "which holds model, found ema")
    content = {"state_dict": {f"backbone.{n}": v for n, v in live.items()}, "callbacks": {}}
    torch.save(content, tmp_path / "own.ckpt")
    assert_refused(model, tmp_path / "own.ckpt", "which holds model, found ema")
    load_official_checkpoint(model, tmp_path / "own.ckpt", weights="model")
    assert_holds(model, live)


def test_missing_extra_and_misshapen_entries_are_listed_and_nothing_is_loaded(tmp_path):
    model = dit()
    wrong = weights_of(model, 0)
    del wrong["blocks.0.attn.qkv.bias"]
    wrong["surplus.weight"] = torch.zeros(1)
    wrong["blocks.0.mlp.fc1.weight"] = torch.zeros(8, 32)
    torch.save(wrong, tmp_path / "w.pt")
    assert_refused(
        model,
        tmp_path / "w.pt",
        "w.pt: must fit the network, found ",
        "1 missing: blocks.0.attn.qkv.bias",
        "1 extra: surplus.weight",
        "1 misshapen: blocks.0.mlp.fc1.weight [8, 32] instead of [32, 8]",
    )


def test_the_eleventh_entry_is_counted_and_not_named(tmp_path):
    model = dit()
    wrong = weights_of(model, 0) | {f"x{i:02}": torch.zeros(1) for i in range(12)}
    torch.save(wrong, tmp_path / "w.pt")
    assert_refused(model, tmp_path / "w.pt", "12 extra: x00, ", "x09, ..")
    with pytest.raises(ConfigError, match="extra") as caught:
        load_official_checkpoint(model, tmp_path / "w.pt")
    assert "x10" not in str(caught.value)


def test_an_unknown_average_is_an_extra_entry(tmp_path):
    model = unet()
    live = weights_of(model, 0)
    content = ldm_content(model, live, live)
    content["state_dict"]["model_ema.diffusion_modelsurplus"] = torch.zeros(1)
    torch.save(content, tmp_path / "m.ckpt")
    assert_refused(model, tmp_path / "m.ckpt", "1 extra: model_ema.diffusion_modelsurplus")


@pytest.mark.parametrize(
    ("saved", "loaded", "rows"),
    [
        (lambda: dit(num_classes=10), dit, "has 11 rows, the network's 4"),
        (lambda: dit(num_classes=0), dit, "has 0 rows, the network's 4"),
        (lambda: unet(num_classes=10), unet, "has 10 rows, the network's 0"),
    ],
)
def test_another_class_count_is_named(saved, loaded, rows, tmp_path):
    torch.save(weights_of(saved(), 0), tmp_path / "w.pt")
    assert_refused(loaded(), tmp_path / "w.pt", "num_classes: the file's class table", rows)


class Command:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_with_the_way_out(zipped, tmp_path):
    model = dit()
    content = {"ema": weights_of(model, 0), "extra": Command(tmp_path / "ran")}
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_refused(model, path, "evil.pt: refused", "posix.system", "trust", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_the_command_of_the_refusal_makes_a_file_that_loads(tmp_path, monkeypatch):
    model = dit()
    expected = weights_of(model, 0)
    torch.save({"ema": expected, "extra": Command(tmp_path / "ran")}, tmp_path / "theirs.pt")
    with pytest.raises(ConfigError) as caught:
        load_official_checkpoint(model, tmp_path / "theirs.pt")
    program = str(caught.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    load_official_checkpoint(model, "weights.pt")
    assert_holds(model, expected)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_file_is_named(kind, share, tmp_path):
    model = dit()
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pt")
    if kind == "safetensors":
        save_file(weights_of(model, 0), path)
    else:
        torch.save(weights_of(model, 0), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(model, path, path.name, "truncated")


def test_a_single_damaged_byte_is_found(tmp_path):
    model = dit()
    path = tmp_path / "w.pt"
    expected = weights_of(model, 0)
    torch.save(expected, path)
    content = bytearray(path.read_bytes())
    # A value in the middle of the largest weight.
    position = content.find(expected["blocks.0.mlp.fc1.weight"].numpy().tobytes()) + 100
    content[position] ^= 1
    path.write_bytes(content)
    assert_refused(model, path, "w.pt: damaged, the checksum of its record")


def test_files_without_checksums_still_load(tmp_path):
    model = dit()
    expected = weights_of(model, 0)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(expected, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    load_official_checkpoint(model, tmp_path / "w.pt")
    assert_holds(model, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "must hold a dictionary, found list"),
        ({"epoch": 3, "note": "x"}, "must hold weights under"),
        ({"state_dict": {}}, "must hold weights under"),
    ],
)
def test_files_without_weights(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    assert_refused(dit(), tmp_path / "w.pt", message)


def test_no_file_at_all_and_text_files(tmp_path):
    assert_refused(dit(), tmp_path / "none.pt", "no such file", "none.pt")
    assert_refused(dit(), tmp_path, "found no config.json")
    (tmp_path / "page.pt").write_text("<html>quota exceeded</html>" * 9)
    assert_refused(dit(), tmp_path / "page.pt", "page.pt: truncated, damaged, or not written by")


def test_a_network_without_memory_is_refused(tmp_path):
    torch.save(weights_of(dit(), 0), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="found the meta device"):
        load_official_checkpoint(dit().to("meta"), tmp_path / "w.pt")
