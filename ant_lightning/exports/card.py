"""The model card of an export: what was trained, on what, with which clusters, how good it is."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.exports.stock import stock_of
from ant_lightning.exports.text_pipeline import is_told_text, text_pipeline_of
from ant_lightning.runtime.changed_settings import TRUSTED, flat_settings

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

load_official_checkpoint(network, "FOLDER/FILE")""",
    "torch": """import torch

network = torch.export.load("FOLDER/model.pt2").module()
output = network({inputs})""",
}


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
        "clusters": ", ".join(f"[{a}, {b})" for a, b in pairwise(boundaries)),
        "clustering": flat.get("model.tasks.clustering") or "unknown",
        "balancer": flat.get("model.tasks.balancer") or "none (vanilla)",
        "optimizer steps": module.trained_steps,
        "weights": "moving average" if about["weights"] == "ema" else "live",
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
        parts.append(f"```python\n{loading}\n```")
    if notes:
        parts.append("Differences from the run:\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _loading(module: DiffusionModule, to: str, source: PipelineSource | str) -> str:
    """How the export is read; empty for an adapter and for parts, which have a note."""
    if to != "diffusers":
        inputs = "x, timesteps, labels" if module.num_classes else "x, timesteps"
        package = type(module.backbone).__module__.partition(".")[0]
        trust = "" if package in TRUSTED else f', trust="{package}"'
        return _LOADING[to].replace("{inputs}", inputs).replace("{trust}", trust)
    if getattr(module, "adapter", None) is not None:
        return ""
    if is_told_text(module.backbone):
        text = text_pipeline_of(module)
        return "" if isinstance(text, str) else text.example(source)
    stock = stock_of(module)
    call = "pipeline(batch_size=4)" if stock is None else stock.example()
    trust = ", trust_remote_code=True" if stock is None else ""
    return _LOADING[to].replace("{trust}", trust).replace("{call}", call)


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
    return f"{type(process).__name__}({found}), {process.num_timesteps} cells"


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
