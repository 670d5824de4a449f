"""Sampling with diffusers alone; `ant-lightning export` copies this file into the folder.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
pipeline(class_labels=[0, 1, 2]).images
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Part: TypeAlias = Any  # of diffusers, which has no types for them


class ANTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional or unconditional images, of pixels or of latents.

    Args:
        scheduler: DDPM, DDIM, FlowMatchEuler or EDMEuler.
        unet: The network, or else `transformer`.
        transformer: The network, or else `unet`.
        unet_2: The network of little noise, if there are two.
        transformer_2: The same of `transformer`.
        vae: The first stage; without one the images are pixels.
        class_table: Classes to text tokens, for `UNet2DConditionModel`.
        boundary_ratio: The second network serves timesteps below this share of training's.
        process: `discrete`, `edm`, `flow` (the network is told 1000 t, its velocity is noise minus
            data), or `flow_sit` (it is told 1 - t, its velocity is data minus noise).
        num_classes: Classes; 0 without.
        null_class: The class that stands for none; `None` without guidance.
        guidance_scale: 1 is no guidance.
        guided_channels: Channels that guidance changes; `None` for all.
        num_inference_steps: Steps of the scheduler.
        eta: Of DDIM.
        clip_sample: Whether each predicted image is clipped to [-1, 1].
        latent_shape: `(c, h, w)` of what is denoised.
        latent_scale: The first stage decodes `x / latent_scale + latent_shift`.
        latent_shift: See `latent_scale`.
        id2label: Names of the classes, as `DiTPipeline` has them; in a file the numbers are texts.

    Attributes:
        labels: The number of each name, for `get_label_ids`.
    """

    _optional_components: ClassVar = [
        *("unet", "unet_2", "transformer", "transformer_2", "vae", "class_table")
    ]
    model_cpu_offload_seq = "class_table->unet->unet_2->transformer->transformer_2->vae"

    def __init__(
        self,
        scheduler: Part,
        *,
        unet: Part = None,
        transformer: Part = None,
        unet_2: Part = None,
        transformer_2: Part = None,
        vae: Part = None,
        class_table: Part = None,
        boundary_ratio: float | None = None,
        process: str = "discrete",
        num_classes: int = 0,
        null_class: int | None = None,
        guidance_scale: float = 1.0,
        guided_channels: int | None = None,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        clip_sample: bool = True,
        latent_shape: list[int] | None = None,
        latent_scale: float = 1.0,
        latent_shift: float = 0.0,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        parts = {"scheduler": scheduler, "unet": unet, "transformer": transformer, "vae": vae}
        parts |= {"unet_2": unet_2, "transformer_2": transformer_2}
        self.register_modules(**parts, class_table=class_table)
        self.register_to_config(
            boundary_ratio=boundary_ratio,
            process=process,
            num_classes=num_classes,
            null_class=null_class,
            guidance_scale=guidance_scale,
            guided_channels=guided_channels,
            num_inference_steps=num_inference_steps,
            eta=eta,
            clip_sample=clip_sample,
            latent_shape=latent_shape,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            id2label=id2label,
        )
        names = (id2label or {}).items()  # JSON has made texts of the numbers
        self.labels = {name: int(number) for number, name in names}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The numbers of classes, for `class_labels`.

        Raises:
            ValueError: If a class has none of the names of `labels`.
        """
        label = [label] if isinstance(label, str) else label
        unknown = [name for name in label if name not in self.labels]
        if unknown:
            known = ", ".join(self.labels) or "none, as the export knew no names"
            raise ValueError(f"label: must be one of {known}; found {unknown[0]!r}")
        return [self.labels[name] for name in label]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | None = None,
        batch_size: int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Part:
        """Draw images.

        Args:
            class_labels: One class for each image; by default 0, 1, 2, ...
            batch_size: Number of images, if there are no labels or latents that tell.
            guidance_scale: By default that of training's settings.
            num_inference_steps: By default that of training's settings.
            generator: Source of the noise.
            latents: Standard normal noise to start from, `[b, c, h, w]`.
            output_type: `pil`, `np`, `pt` (in [0, 1]), or `latent`.
            return_dict: Whether to return an `ImagePipelineOutput`.

        Raises:
            ValueError: If a class or the guidance does not fit the model.
        """
        config, device = self.config, self._execution_device
        num_images = next(
            (len(each) for each in (class_labels, latents) if each is not None), batch_size or 1
        )
        labels = None
        if config.num_classes:
            chosen = [i % config.num_classes for i in range(num_images)]
            chosen = chosen if class_labels is None else self._checked(class_labels)
            labels = torch.tensor(chosen, device=device)
        elif class_labels is not None:
            raise ValueError(
                f"class_labels: must be left out for a model without classes, found {class_labels}"
            )
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and config.null_class is None:
            raise ValueError(f"guidance_scale: must be 1 without a null class, found {scale}")
        x = latents
        if x is None:
            shape = (num_images, *config.latent_shape)
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = x.to(device) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        for index, t in enumerate(self._timesteps(num_inference_steps, device)):
            output = self._output(x, t, index, labels, scale)
            x = self._step(output, t, x, generator)
        if output_type == "latent":
            return ImagePipelineOutput(images=x) if return_dict else (x,)
        if self.vae is not None:
            z = x / config.latent_scale + config.latent_shift
            x = self.vae.decode(z.to(self.vae.dtype)).sample
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked(self, class_labels: list[int]) -> list[int]:
        most = max(self.config.num_classes - 1, self.config.null_class or 0)
        wrong = [each for each in class_labels if not 0 <= int(each) <= most]
        if wrong:
            raise ValueError(f"class_labels: must be from 0 to {most}, found {wrong[0]}")
        return class_labels

    def _timesteps(self, num_steps: int | None, device: torch.device) -> Part:
        num_steps = num_steps or self.config.num_inference_steps
        if self.config.process.startswith("flow"):
            # Even steps from noise to data. The scheduler's own grid stops short of the data.
            sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        return self.progress_bar(self.scheduler.timesteps)

    def _output(
        self, x: Tensor, t: Tensor, index: int, labels: Tensor | None, scale: float
    ) -> Tensor:
        """What the scheduler takes: the guided and clipped output, in its convention."""
        config, scheduler = self.config, self.scheduler
        x_in, told = x, t
        if config.process == "flow_sit":
            told = 1 - scheduler.sigmas[index]
        elif hasattr(scheduler, "scale_model_input"):
            x_in = scheduler.scale_model_input(x, t)
        told = told.to(x.device).expand(len(x))
        channels = x.shape[1]
        if scale == 1:
            output = self._network(x_in, t, told, labels)
        else:
            assert labels is not None  # without classes there is no null class
            null = torch.full_like(labels, config.null_class)
            both = self._network(
                torch.cat([x_in, x_in]), t, torch.cat([told, told]), torch.cat([labels, null])
            )
            output, weak = both.chunk(2)
            guided = config.guided_channels or channels
            output = output.clone()
            output[:, :guided] = torch.lerp(weak[:, :guided], output[:, :guided], scale)
        if "variance_type" not in scheduler.config:  # only DDPM takes a learned variance
            output = output[:, :channels]
        output = output.float()
        if config.process == "flow_sit":
            output = -output
        if config.clip_sample and "clip_sample" not in scheduler.config:
            return self._clipped(output, x, index)
        return output

    def _clipped(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The output whose predicted image is clipped."""
        sigma = float(self.scheduler.sigmas[index])
        if self.config.process == "edm":
            data = float(self.scheduler.config.sigma_data)
            skip = data**2 / (sigma**2 + data**2)
            out = sigma * data / (sigma**2 + data**2) ** 0.5
        else:
            skip, out = 1.0, -sigma
        clipped: Tensor = ((skip * x + out * output).clamp(-1, 1) - skip * x) / out
        return clipped

    def _network(self, x: Tensor, t: Tensor, told: Tensor, labels: Tensor | None) -> Tensor:
        network = self.transformer if self.unet is None else self.unet
        ratio = self.config.boundary_ratio
        if ratio is not None and float(t) < ratio * self.scheduler.config.num_train_timesteps:
            network = self.transformer_2 if self.unet is None else self.unet_2
        x, given = x.to(network.dtype), {}
        if self.transformer is not None and labels is None:  # its table then has one empty row
            labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if self.class_table is not None:
            given = {"encoder_hidden_states": self.class_table(labels)}
        elif labels is not None:
            given = {"class_labels": labels}
        output: Tensor = network(x, told, **given).sample
        return output

    def _step(self, output: Tensor, t: Tensor, x: Tensor, generator: Part) -> Tensor:
        kind, options = type(self.scheduler).__name__, {}
        if kind in {"DDPMScheduler", "DDIMScheduler"}:
            options["generator"] = generator
        if kind == "DDIMScheduler":
            # The noise must agree with the clipped image.
            options |= {"eta": self.config.eta, "use_clipped_model_output": True}
        stepped: Tensor = self.scheduler.step(output, t, x, **options).prev_sample
        return stepped
