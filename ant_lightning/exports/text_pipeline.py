"""The pipeline of diffusers for a network that is told text, and its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.backbones.diffusers import MASK, DiffusersBackbone
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.samplers.ddim import DDIM
from ant_lightning.exports.networks import first_network
from ant_lightning.exports.schedulers import Scheduling, scheduler_of
from ant_lightning.models.adapters import adapted
from ant_lightning.transfer.experts import IntervalExperts

if TYPE_CHECKING:
    from torch import nn

    from ant_lightning.exports.pipeline_source import PipelineSource
    from ant_lightning.models.denoiser import DiffusionModule

_SANA = "SanaPipeline"
_SHIFTED = frozenset({"StableDiffusion3Pipeline", "FluxPipeline"})  # latents may have a shift
_FLOW = _SHIFTED | {_SANA}
_POOLED = _SHIFTED | {"StableDiffusionXLPipeline"}
MASKED = frozenset({"PixArtAlphaPipeline", "PixArtSigmaPipeline", _SANA})
_PIXELS = 8  # what `DiffusersBackbone` takes for the side of a latent


class TextPipeline(NamedTuple):
    """A pipeline class of diffusers, and how a run is drawn with it.

    Attributes:
        class_name: Its name.
        call: The arguments with which it samples as the run does.
        notes: What it does otherwise than the run, a line each.
        scheduling: Its scheduler.
        switched: Whether its network is several of intervals, of a class whose code is in the
            folder.
    """

    class_name: str
    call: dict[str, Any]
    notes: list[str]
    scheduling: Scheduling
    switched: bool = False

    def modules(self) -> tuple[set[str], set[str]]:
        """Names of its parts, and of those that `from_pretrained` must be told are missing."""
        import diffusers  # noqa: PLC0415 - 5 s of imports

        kind = getattr(diffusers, self.class_name)
        expected, _ = kind._get_signature_keys(kind)
        text = {name for name in expected if name.startswith(("text_encoder", "tokenizer"))}
        return set(expected), text - set(kind._optional_components)

    def example(self, source: PipelineSource | str) -> str:
        """Code that draws images; from embeddings if no text encoders are there."""
        call, missing = self.call, ", trust_remote_code=True" if self.switched else ""
        scale = call.get("true_cfg_scale", call["guidance_scale"])
        names = ["prompt"]
        if isinstance(source, str):
            missing += "".join(f", {name}=None" for name in sorted(self.modules()[1]))
            names = ["prompt_embeds"]
            names += ["pooled_prompt_embeds"] * (self.class_name in _POOLED)
            names += ["prompt_attention_mask"] * (self.class_name in MASKED)
            names += [f"negative_{name}" for name in names] * (scale > 1)
        elif source.max_length is not None and self.class_name in _FLOW | MASKED:
            call = call | {"max_sequence_length": source.max_length}
        n = call["num_inference_steps"]
        grid = f"[i / {n} for i in range({n}, 0, -1)]"
        given = [f"{name}={name}" for name in names]
        if isinstance(source, str) and self.class_name in MASKED:
            given.append("negative_prompt=None")
        elif self.class_name == "FluxPipeline" and scale > 1:
            given.append("negative_prompt=''")
        given += [f"{k}={grid if k == 'sigmas' else repr(v)}" for k, v in call.items()]
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained(FOLDER{missing})\n"
            f"images = pipeline({', '.join(given)}).images"
        )


def is_told_text(backbone: nn.Module) -> bool:
    """Whether it is a network of diffusers that is told more than labels."""
    backbone = first_network(backbone)
    if not isinstance(backbone, DiffusersBackbone):
        return False
    return type(adapted(backbone)).__name__ not in {"UNet2DModel", "DiTTransformer2DModel"}


def pipeline_class(backbone: nn.Module) -> str | None:
    """The class of pipelines for a network that is told text; `None` if there is none."""
    network: Any = adapted(first_network(backbone))
    names = [each.__name__ for each in type(network).__mro__]
    if "UNet2DConditionModel" in names:
        is_xl = network.config.get("addition_embed_type") == "text_time"
        return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    if "PixArtTransformer2DModel" in names:
        told_sizes = network.use_additional_conditions
        return "PixArtAlphaPipeline" if told_sizes else "PixArtSigmaPipeline"
    known = {
        "SD3Transformer2DModel": "StableDiffusion3Pipeline",
        "FluxTransformer2DModel": "FluxPipeline",
    }
    if not network.config.get("guidance_embeds"):
        known["SanaTransformer2DModel"] = _SANA
    return next((known[name] for name in names if name in known), None)


def text_pipeline_of(module: DiffusionModule) -> TextPipeline | str:
    """The pipeline for a module whose network is told text, or the reason why there is none.

    | network | pipeline | process |
    |---|---|---|
    | `UNet2DConditionModel` | `StableDiffusionPipeline`, `StableDiffusionXLPipeline` | discrete |
    | `PixArtTransformer2DModel` | `PixArtAlphaPipeline`, `PixArtSigmaPipeline` | discrete |
    | `SD3Transformer2DModel` | `StableDiffusion3Pipeline` | flow matching |
    | `FluxTransformer2DModel` | `FluxPipeline` | flow matching |
    | `SanaTransformer2DModel` | `SanaPipeline` | flow matching |

    Raises:
        ConfigError: If the process has no scheduler.
    """
    name = pipeline_class(module.backbone)
    sprint = "the pipeline of a Sana with embedded guidance has a sampler of its own"
    reason = sprint if name is None else _refusal(module, name)
    if name is None or reason is not None:
        return reason or ""
    found = scheduler_of(module)
    if _learns_variance(module) and name in MASKED and not _is_ddim(module):
        found.scheduler.register_to_config(variance_type="fixed_small")
        found.notes.append(f"{name} drops the predicted variance: it is fixed_small")
    if name == "StableDiffusionPipeline" and not _is_leading(found):
        found.scheduler.register_to_config(steps_offset=1)  # unused, and expected by the pipeline
    call = _call(module, name, found)
    notes = [*found.notes, *_differences(module, name, found)]
    switched = isinstance(module.backbone, IntervalExperts)
    return TextPipeline(name, call, notes, found, switched)


def _refusal(module: DiffusionModule, name: str) -> str | None:
    """Why the pipeline cannot draw from a module; `None` if it can."""
    space, process = module.latent_space, FlowMatching if name in _FLOW else DiscreteDiffusion
    if space is None:
        return f"{name} decodes latents, and the run has none"
    if module.first_stage is None:
        return "the first stage of the cached latents is not given (--first_stage)"
    scalar = all(isinstance(each, float | int) for each in (space.scale, space.shift))
    kind = "dc" if name == _SANA else "kl"
    if space.kind != kind or not scalar or (space.shift and name not in _SHIFTED):
        shift = "" if name in _SHIFTED else " and no shift"
        return f"{name} takes an Autoencoder{kind.upper()} with one scale for all channels{shift}"
    if not isinstance(module.process, process):
        return f"{name} is for {process.__name__}"
    refusal = None
    if name == _SANA and any(module.first_stage.factor * s % 32 for s in module.image_shape[1:]):
        refusal = f"{name} draws images whose sides are multiples of 32"
    elif _learns_variance(module) and name not in MASKED and _is_ddim(module):
        refusal = f"{name} takes no predicted variance with DDIM"
    return refusal


def _learns_variance(module: DiffusionModule) -> bool:
    return str(getattr(module.process, "variance_type", "")).startswith("learned")


def _is_leading(found: Scheduling) -> bool:
    return bool(found.scheduler.config.get("timestep_spacing") == "leading")


def _is_ddim(module: DiffusionModule) -> bool:
    return isinstance(module.sampler, DDIM)


def _call(module: DiffusionModule, name: str, found: Scheduling) -> dict[str, Any]:
    """The arguments with which the pipeline samples as the run does."""
    scale = module.guidance_scale
    assert module.first_stage is not None
    height, width = (module.first_stage.factor * side for side in module.image_shape[1:])
    call: dict[str, Any] = {"height": height, "width": width}
    call |= {"num_inference_steps": found.num_steps, "guidance_scale": scale}
    if name == "FluxPipeline":
        told = first_network(module.backbone).embedded_guidance
        call |= {"guidance_scale": told, "true_cfg_scale": scale}
    if name in _FLOW:
        # The scheduler's own grid ends with a small step, and shifts it twice.
        n = found.num_steps
        call["sigmas"] = [i / n for i in range(n, 0, -1)]
    if found.eta:
        call["eta"] = found.eta
    if name in MASKED:
        call["use_resolution_binning"] = False
    if name == _SANA:
        call["complex_human_instruction"] = None  # it would stand before each prompt
    if name == "StableDiffusionXLPipeline":
        sizes = tuple(_PIXELS * side for side in module.image_shape[1:])
        if sizes != (height, width):
            call |= {"original_size": sizes, "target_size": sizes}
    return call


def _differences(module: DiffusionModule, name: str, found: Scheduling) -> list[str]:
    """What the pipeline does otherwise than the run, a line each."""
    network: Any = adapted(first_network(module.backbone))
    notes: list[str] = []
    assert module.first_stage is not None
    clips = type(found.scheduler).__name__ == "DDPMScheduler" and name != "StableDiffusionPipeline"
    if module.clip_denoised and not clips:
        notes.append(f"{name} does not clip as the run does (clip_denoised)")
    if module.sampling.guided_channels not in {None, network.config["in_channels"]}:
        notes.append(f"{name} guides all channels")
    if module.guidance_scale < 1:
        notes.append(f"{name} has no guidance below 1")
    offset = found.scheduler.config.get("steps_offset")
    if name == "StableDiffusionPipeline" and _is_leading(found) and offset == 0:
        notes.append(
            "StableDiffusionPipeline moves the timesteps by 1, as DDIM(spacing='ldm') of a run does"
        )
    if MASK in module.conditions.names and name not in MASKED:
        notes.append(f"{name} does not tell the network which tokens are padding")
    if name == "PixArtAlphaPipeline" and module.first_stage.factor != _PIXELS:
        notes.append(f"{name} tells the network another size of the image")
    return notes
