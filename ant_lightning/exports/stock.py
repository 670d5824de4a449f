"""The pipeline class of diffusers that samples as a run does, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.backbones.diffusers import DiffusersBackbone
from ant_lightning.backbones.diffusers_layouts import diffusers_layout
from ant_lightning.backbones.unet import UNet
from ant_lightning.exports.schedulers import scheduler_of
from ant_lightning.models.adapters import adapted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ant_lightning.models.denoiser import DiffusionModule

_DIT_CLASSES = 1000  # `DiTPipeline` has this number as its null class


class Stock(NamedTuple):
    """A pipeline class of diffusers, and how a run is drawn with it.

    Attributes:
        class_name: Its name.
        call: The arguments with which it samples as the run does.
        first_stage: What it calls the first stage.
    """

    class_name: str
    call: dict[str, Any]
    first_stage: str = "vae"

    def example(self) -> str:
        """A call that draws four images."""
        first = "class_labels=[0, 1, 2, 3]" if "guidance_scale" in self.call else "batch_size=4"
        rest = [f"{name}={value!r}" for name, value in self.call.items()]
        return f"pipeline({', '.join([first, *rest])})"


def stock_of(module: DiffusionModule) -> Stock | None:
    """The class of diffusers that draws the run's images; `None` if none does.

    | class | network | sampler |
    |---|---|---|
    | `DDPMPipeline` | unconditional `UNet2DModel` of pixels | `DDPM` |
    | `DDIMPipeline` | the same, without a learned variance | `DDIM` |
    | `LDMPipeline` | the same, of square latents of a `VQModel`, not clipped | `DDIM` |
    | `DiTPipeline` | `DiTTransformer2DModel` of diffusers, 1,000 classes, latents of an \
`AutoencoderKL`, not clipped | `DDIM` with `eta = 0` |

    Raises:
        ConfigError: If the process has no scheduler of diffusers.
    """
    network = _network(module)
    if network is None or getattr(module, "adapter", None) is not None:
        return None
    name, config = network
    found, space = scheduler_of(module), module.latent_space
    scheduler = type(found.scheduler).__name__
    steps: dict[str, Any] = {"num_inference_steps": found.num_steps}
    scale, guided = module.guidance_scale, module.sampling.guided_channels
    stock = None
    if name == "UNet2DModel" and not module.num_classes:
        ddim = scheduler == "DDIMScheduler" and config["out_channels"] == config["in_channels"]
        noisy = {"eta": found.eta} if found.eta else {}
        if scheduler == "DDPMScheduler" and space is None:
            stock = Stock("DDPMPipeline", steps)
        elif ddim and space is None:
            clipped = {"use_clipped_model_output": True} if module.clip_denoised else {}
            stock = Stock("DDIMPipeline", steps | noisy | clipped)
        elif ddim and _decodes_latents(module, "vq"):
            stock = Stock("LDMPipeline", steps | noisy, "vqvae")
    elif (
        name == "DiTTransformer2DModel"
        and module.num_classes == module.null_class == _DIT_CLASSES
        and scheduler == "DDIMScheduler"
        and found.eta == 0
        and scale >= 1
        and guided in {None, config["in_channels"]}
        and _decodes_latents(module, "kl")
    ):
        stock = Stock("DiTPipeline", {"guidance_scale": scale} | steps)
    return stock


def _network(module: DiffusionModule) -> tuple[str, Mapping[str, Any]] | None:
    """Class and config of the network, if it is a plain one of diffusers once it is exported."""
    backbone = module.backbone
    if isinstance(backbone, DiffusersBackbone):
        network: Any = adapted(backbone)
        return type(network).__name__, network.config
    if not isinstance(backbone, UNet):  # our DiT has other time frequencies
        return None
    layout = diffusers_layout(backbone)
    return layout.class_name, layout.config


def _decodes_latents(module: DiffusionModule, kind: str) -> bool:
    """Whether `decode(latents / scaling_factor)`, without more, gives the run's images."""
    space, shape = module.latent_space, module.image_shape
    return (
        space is not None
        and space.kind == kind
        and isinstance(space.scale, float | int)
        and space.shift == 0
        and shape[-2] == shape[-1]
        and not module.clip_denoised
    )
