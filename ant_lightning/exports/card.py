"""The model card of an export: what was trained, on what, with which clusters, how good it is."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.exports.schedulers import scheduler_of
from ant_lightning.exports.single_files import official_file
from ant_lightning.exports.stock import stock_of
from ant_lightning.exports.text_pipeline import is_told_text, text_pipeline_of
from ant_lightning.runtime.changed_settings import TRUSTED, flat_settings
from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ant_lightning.exports.pipeline_source import PipelineSource
    from ant_lightning.models.denoiser import DiffusionModule

_LOADING = {
    "diffusers": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(FOLDER{trust})
images = {call}.images""",
    "safetensors": """from ant_lightning import load_run

images = load_run(FOLDER{trust}).sample(4)""",
    "official": """from ant_lightning import load_official_checkpoint

load_official_checkpoint(network, f"{FOLDER}/{file}")  # a {network} of the same sizes""",
    "torch": """import torch

network = torch.export.load(f"{FOLDER}/model.pt2").module()
x = torch.randn({shape})
output = network(x, {inputs})""",
}
_FOLDER = 'FOLDER = "."  # the folder of this file'


def model_card(
    module: DiffusionModule,
    settings: Mapping[str, Any],
    run_folder: Path,
    *,
    about: Mapping[str, Any],
    source: PipelineSource | str = "",
) -> str:
    """The text of `README.md`.

    Args:
        module: The trained model.
        settings: Those of its run.
        run_folder: Where scores of the run may lie (`generation_metrics.jsonl`).
        about: Of the export: `to`, `weights`, `experts`, `merge_weights`, `notes`.
        source: The pipeline whose text encoders the export has, or why it has none.
    """
    to, notes = about["to"], about["notes"]
    flat = flat_settings(dict(settings))
    tasks = getattr(module, "clusters", None)
    boundaries = list(tasks.boundaries) if tasks is not None else []
    count = sum(parameter.numel() for parameter in module.backbone.parameters())
    data = [f"{n.rpartition('.')[2]} {v}" for n, v in flat.items() if _names_data(n, v)]
    rows = {
        "model": flat.get("model") or type(module).__name__,
        "network": f"{type(module.backbone).__name__}, {count:,} parameters",
        "images": f"{' x '.join(map(str, module.image_shape))} ({_space(module)})",
        "data": ", ".join([str(flat.get("data") or "unknown"), *data]),
        "noise": repr_of(module.process),
        "clusters": _clusters(module, boundaries),
        "clustering": flat.get("model.tasks.clustering") or "unknown",
        "balancer": flat.get("model.tasks.balancer") or "none (vanilla)",
        "optimizer steps": module.trained_steps,
        "weights": "moving average" if about["weights"] == "ema" else "live",
        "sampler": str(module.sampler),
        "guidance": f"{module.guidance_scale:g}" if module.guidance_scale != 1 else "none",
        **_experts(about),
        **_scores(run_folder),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    parts = [
        "---\nlibrary_name: "
        + ("diffusers" if to == "diffusers" else "ant-lightning")
        + ("" if module.num_classes else "\npipeline_tag: unconditional-image-generation")
        + "\ntags:\n- diffusion\n- ant-lightning\n---",
        "# A diffusion model trained with ant_lightning",
        f"| | |\n| --- | --- |\n{table}",
    ]
    loading = _loading(module, to, source)
    if loading:
        drawn = "Drawn as in the run" if to == "diffusers" and not notes else "How to load it"
        place = _FOLDER + (", or its name on the Hugging Face hub" if to == "diffusers" else "")
        parts.append(f"{drawn}:\n\n```python\n{place}\n\n{loading}\n```")
    if notes:
        title = "For the official code" if to == "official" else "Differences from the run"
        parts.append(f"{title}:\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _loading(module: DiffusionModule, to: str, source: PipelineSource | str) -> str:
    """How the export is read; empty for an adapter and for parts, which have a note."""
    if to != "diffusers":
        package = type(module.backbone).__module__.partition(".")[0]
        said = {
            "trust": "" if package in TRUSTED else f', trust="{package}"',
            "file": official_file(module),
            "network": type(module.backbone).__name__,
            "shape": ", ".join(map(str, (2, *module.image_shape))),
            "inputs": _inputs(module),
        }
        loading = _LOADING[to]
        for name, value in said.items():
            loading = loading.replace(f"{{{name}}}", value)
        return loading
    if getattr(module, "adapter", None) is not None:
        return ""
    if is_told_text(module.backbone):
        text = text_pipeline_of(module)
        return "" if isinstance(text, str) else text.example(source)
    stock = stock_of(module)
    call = _call(module) if stock is None else stock.example()
    trust = ", trust_remote_code=True" if stock is None else ""
    return _LOADING[to].replace("{trust}", trust).replace("{call}", call)


def _call(module: DiffusionModule) -> str:
    """The call of an `ANTPipeline` with what it would take from its own settings."""
    labels = [i % module.num_classes for i in range(4)] if module.num_classes else None
    given = ["batch_size=4" if labels is None else f"class_labels={labels}"]
    if module.null_class is not None:
        given.append(f"guidance_scale={module.guidance_scale!r}")
    given.append(f"num_inference_steps={scheduler_of(module).num_steps}")
    return f"pipeline({', '.join(given)})"


def _inputs(module: DiffusionModule) -> str:
    """What a network is told of the least and the most noise, and classes, if it has any."""
    cells = torch.tensor([0, module.process.num_timesteps - 1])
    x = torch.zeros(2, *module.image_shape)
    _, told = module.process.network_inputs(x, module.process.times(cells))
    times = f"torch.tensor({told.tolist()}, dtype={told.dtype})"
    return f"{times}, torch.tensor([0, 1])" if module.num_classes else times


def _clusters(module: DiffusionModule, boundaries: list[int]) -> str:
    """The intervals of the tasks, in cells of the noise axis and in the time of the process."""
    time = TimeAxis.of(module.process)
    found = (time.words(a, b) for a, b in pairwise(boundaries))
    return f"{time.unit} {', '.join(found)}" if boundaries else ""


def _experts(about: Mapping[str, Any]) -> dict[str, str]:
    """How many specialists of intervals went into the model, if any."""
    count, merged = len(about["experts"]), about["merge_weights"]
    if not count:
        return {}
    how = "switched by the noise level" if merged is None else f"merged with weights {merged}"
    return {"experts": f"{count} specialists of intervals, {how}"}


def repr_of(process: Any) -> str:  # noqa: ANN401 - a process
    """Class of a process, and what its network predicts."""
    found = ", ".join(f"{name} {value}" for name, value in process.identity().items())
    unit = "timesteps" if process.time_label == "timestep" else "cells of the noise axis"
    return f"{type(process).__name__}({found}), {process.num_timesteps} {unit}"


def _names_data(name: str, value: object) -> bool:
    """Whether a setting says which data: a path, a name, a size."""
    last = name.rpartition(".")[2]
    known = {"folder", "path", "name", "root", "dataset", "cache", "image_size", "size"}
    return name.startswith("data.") and last in known and value is not None


def _space(module: DiffusionModule) -> str:
    space = module.latent_space
    return "pixels" if space is None else f"latents of {space.source}"


def _scores(folder: Path) -> dict[str, str]:
    """The last scores that the run measured."""
    path = folder / "generation_metrics.jsonl"
    if not path.is_file():
        return {"FID": "not measured"}
    try:
        last = json.loads(path.read_text(encoding="utf8").splitlines()[-1])
        scores = {str(name): f"{value:.4g}" for name, value in last["scores"].items()}
    except (ValueError, IndexError, KeyError, AttributeError, TypeError):
        return {"FID": "not measured"}
    about = ", ".join(f"{n} {v}" for n, v in last.items() if isinstance(v, str | int | float))
    return {**scores, "scores measured with": about}


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
