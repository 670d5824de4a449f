"""`ant-lightning app RUN [RUN ...]`: a web page that draws from runs and shows what they wrote."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ant_lightning.callbacks.grid_figure import image_grid
from ant_lightning.cli.load_run import load_run
from ant_lightning.cli.run_arguments import run_arguments
from ant_lightning.data.batch import to_uint8
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.samplers.ddim import DDIM, DDPM
from ant_lightning.diffusion.samplers.edm import EDMSampler
from ant_lightning.diffusion.samplers.ode import ODESampler
from ant_lightning.diffusion.samplers.sde import SDESampler
from ant_lightning.errors import ConfigError, extra_for, message_of
from ant_lightning.runtime.quiet import keep_quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.diffusion.samplers.base import Sampler

_ALL = "all in turn"
_SHOWN = 384  # pixels of the longer side of a grid, at least


def run_app(args: Sequence[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: If an argument is wrong, a folder is not that of a run, or gradio is missing.
    """
    keep_quiet("app")
    chosen = SimpleNamespace(**run_arguments("app", args))
    app = make_app(chosen.runs, device=chosen.device, trust=chosen.trust)
    print(f"app: http://{chosen.host}:{chosen.port} (Ctrl-C ends it)", flush=True)
    try:
        app.launch(server_name=chosen.host, server_port=chosen.port, quiet=True, show_error=True)
    except OSError as error:
        raise ConfigError(f"port: must be free, found {chosen.port} ({error})") from error


def make_app(
    runs: Sequence[str | Path], *, device: str = "cpu", trust: str | Sequence[str] = ()
) -> Any:  # noqa: ANN401 - an extra
    """The page, a `gradio.Blocks`: samples side by side on the same noise, and each run's pictures.

    Args:
        runs: Folders of runs, or checkpoints; all must give images of one shape.
        device: Where the models draw.
        trust: Other packages, modules or classes that the runs' settings may name.

    Raises:
        ConfigError: If a run cannot be loaded, shapes differ, or gradio is missing.
    """
    with extra_for("app", "app"):
        import gradio  # noqa: PLC0415 - an extra
    paths = [Path(each) for each in runs]
    modules: list[Any] = [load_run(path, trust=trust).to(device) for path in paths]
    shapes = [module.image_shape for module in modules]
    if len(set(shapes)) > 1:
        raise ConfigError(
            f"runs: must have noise of one shape, found {' and '.join(map(str, shapes))}"
        )
    classes = min(module.num_classes for module in modules)
    with gradio.Blocks(title="ant_lightning") as app:
        gradio.Markdown("# ant_lightning")
        with gradio.Tab("Samples"):
            with gradio.Row():
                seed = gradio.Number(0, label="seed", precision=0, minimum=0)
                count = gradio.Slider(1, 64, 16, step=1, label="images")
                label = gradio.Dropdown(
                    [_ALL, *map(str, range(classes))],
                    value=_ALL,
                    label="class",
                    visible=classes > 0,
                )
            with gradio.Row():
                guidance = gradio.Slider(
                    1, 8, modules[0].guidance_scale, step=0.25, label="guidance scale"
                )
                sampler = gradio.Dropdown(
                    _names(modules), value=_names(modules)[0], label="sampler"
                )
                steps = gradio.Slider(
                    1, 250, 25, step=1, label="steps of a sampler that you choose"
                )
            button = gradio.Button("Draw", variant="primary")
            pictures = []
            with gradio.Row():
                for i, path in enumerate(paths):
                    with gradio.Column(min_width=240):
                        gradio.Markdown(f"**{path}**")
                        pictures.append(gradio.Image(show_label=False, elem_id=f"run-{i}"))

            def draw(*values: Any) -> Any:  # noqa: ANN401 - what the controls hold
                try:
                    found = [_draw(module, *values) for module in modules]
                except ConfigError as error:
                    raise gradio.Error(message_of(error)) from error
                return found if len(found) > 1 else found[0]

            controls = [seed, count, label, guidance, sampler, steps]
            button.click(draw, controls, pictures, api_name="draw")
        for path in paths:
            folder = path if path.is_dir() else path.parent.parent
            shown = sorted(folder.glob("*.png"))
            with gradio.Tab(f"{folder.parent.name}/{folder.name}"):
                if not shown:
                    gradio.Markdown("This run wrote no pictures: `ant-lightning diagnose` does.")
                for picture in shown:
                    gradio.Image(str(picture), label=picture.stem, show_label=True)
    return app


def _draw(
    module: Any,  # noqa: ANN401 - a DiffusionModule
    seed: float,
    count: float,
    label: str | None,
    guidance: float,
    sampler: str,
    steps: float,
) -> np.ndarray[Any, Any]:
    """A grid of images, enlarged to be seen, `[h, w, 3]` uint8."""
    labels = None if label in (None, _ALL) else int(label or 0)
    chosen = None if sampler == "of the run" else _samplers(module.process)[sampler](int(steps))
    images = module.sample(
        int(count), labels=labels, guidance_scale=guidance, sampler=chosen, seed=int(seed)
    )
    pixels = to_uint8(images).cpu().numpy()
    grid = image_grid(pixels, columns=max(1, round(int(count) ** 0.5)))
    factor = max(1, -(-_SHOWN // max(grid.shape[:2])))
    return np.broadcast_to(grid, (*grid.shape[:2], 3)).repeat(factor, 0).repeat(factor, 1)


def _samplers(process: NoiseProcess) -> dict[str, Callable[[int], Sampler]]:
    """Samplers of a process by name, each made from a number of steps."""
    if isinstance(process, DiscreteDiffusion):
        return {"DDIM": DDIM, "DDPM": DDPM}
    if isinstance(process, EDM):
        return {
            "Heun": EDMSampler,
            "Euler": lambda n: EDMSampler(n, method="euler"),
            "Heun with churn": lambda n: EDMSampler(n, S_churn=40.0, S_min=0.05, S_max=50.0),
        }
    return {
        "ODE, Heun": lambda n: ODESampler(n, method="heun"),
        "ODE, Euler": lambda n: ODESampler(n, method="euler"),
        "SDE, Euler": SDESampler,
    }


def _names(modules: Sequence[Any]) -> list[str]:
    """Names of the samplers that all of the runs have."""
    sets = [_samplers(module.process) for module in modules]
    return ["of the run", *(n for n in sets[0] if all(n in each for each in sets))]
