"""Exports of a run's folder are read back by the programs they are for."""

import json
import re
import shutil

import pytest
import torch
from exported import outputs, read, write_run
from first_stages import save_first_stages

from ant_lightning import (
    export,
    load_run,
)
from ant_lightning.cli.main import main
from ant_lightning.errors import ConfigError
from ant_lightning.exports.exported import Exported


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("to", ["diffusers", "official", "safetensors", "torch"])
def test_every_format_is_read_back_with_equal_outputs(to, run, tmp_path, monkeypatch):
    live, averaged = load_run(run, weights="model").backbone, load_run(run).backbone
    assert (outputs(live) - outputs(averaged)).abs().max() > 1e-2
    exported = export(run, to=to, output=tmp_path / "ema")
    torch.testing.assert_close(outputs(read(exported)), outputs(averaged), atol=1e-5, rtol=0)
    if to != "torch":  # tracing takes long
        exported = export(run, to=to, output=tmp_path / "live", weights="live")
        torch.testing.assert_close(outputs(read(exported)), outputs(live), atol=1e-5, rtol=0)
    card = (exported.path / "README.md").read_text()
    if to in {"safetensors", "torch"}:
        example = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
        monkeypatch.chdir(exported.path)
        exec(example, names := {})
        assert len(names["images" if to == "safetensors" else "output"]) in {2, 4}
    for text in ("| model | DiTModule |", "folder photos", "| fid | 12.35 |", "timesteps 0-"):
        assert text in card


def test_names_of_classes_go_where_diffusers_has_them(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path, names = tmp_path / "run" / "class_map.json", ["cat", "dog", "cow", "hen", "owl"]
    path.write_text(json.dumps({name: i for i, name in enumerate(names)}))
    for known in (True, False):  # one class too few: of other data
        exported = export(tmp_path / "run", to="diffusers").path
        index = json.loads((exported / "model_index.json").read_text())
        assert index.get("id2label") == (
            {str(i): n for i, n in enumerate(names)} if known else None
        )
        path.write_text(json.dumps({name: i for i, name in enumerate(names[:4])}))


def test_safetensors_give_the_whole_module_back(run, tmp_path):
    found = load_run(export(run, to="safetensors", output=tmp_path / "out").path)
    assert torch.equal(found.sample(2), load_run(run).sample(2))
    assert found.clusters.boundaries == load_run(run).clusters.boundaries


def test_the_command_line_writes_into_the_run_and_replaces_only_its_own(run, capsys):
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    folder = run / "exports" / "safetensors"
    assert str(folder) in capsys.readouterr().out
    (folder / "stray").touch()
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {(folder / "stray").stat().st_mode & 0o777}
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "--to", "safetensors"]) == 0
    assert not (folder / "stray").exists()
    (folder / "export.json").unlink()
    before = sorted(folder.iterdir())
    assert main(["export", str(run), "--to", "official", "--output", str(folder)]) == 2
    assert "output: must be a new folder or one that an export wrote" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
    assert main(["export", str(run), "--to", "onnx"]) == 2
    assert capsys.readouterr().err == (
        "ant-lightning: error: to: must be one of 'diffusers', 'official', 'safetensors', "
        "'torch', found onnx\n"
    )


def test_a_refused_export_leaves_nothing_behind(run, tmp_path):
    with pytest.raises(ConfigError, match=r"first_stage: must be that of the run \(no first stage"):
        export(run, to="diffusers", output=tmp_path / "out", first_stage=str(stage_of(tmp_path)))
    assert not (tmp_path / "out").exists()


def stage_of(folder):
    return save_first_stages(folder) / "kl"


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
