"""Modules of three papers: `MultiTaskDiffusion` with the defaults of each."""

from __future__ import annotations

from typing import Literal

from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.unet import UNet
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.errors import ConfigError
from ant_lightning.models.adapters import Adapter
from ant_lightning.models.auxiliary import FeatureAlignment
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.module import MultiTaskDiffusion
from ant_lightning.models.settings import Optimization, Sampling, Tasks, TimestepSampling


class ADMModule(MultiTaskDiffusion):
    """A UNet on pixels with learned variance, as in ADM and in P2 weighting.

    Args:
        backbone: The network.
        tasks: See `MultiTaskDiffusion` for this and all arguments below.
        process: By default the linear schedule of 1,000 timesteps with learned variance.
        timesteps: How timesteps are drawn in training.
        optimization: How the weights are optimised.
        sampling: How images are drawn from noise.
        class_dropout: Share of labels replaced by the null class; by default 0.1, or 0 for a
            backbone without a null class.
        first_stage: Autoencoder whose latents are denoised; `None` for pixels.
        auxiliary: A term of the loss from inside the network.
        adapter: Trains an adapter of PEFT in place of the backbone's own weights.
        init_from: Official checkpoint that the backbone starts from.
        init_weights: Which weights of that file, if it has both.
        seed: Seed of timesteps, noise and dropout.

    Reference:
        Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233.

    Examples:
        >>> from ant_lightning import ADMModule, SNRClustering, Tasks, UNet
        >>> network = UNet(
        ...     input_size=8, in_channels=1, out_channels=2, model_channels=32,
        ...     channel_mult=[1], num_res_blocks=1, attention_resolutions=[],
        ... )
        >>> module = ADMModule(network, tasks=Tasks(SNRClustering(num_tasks=5)))
        >>> module.process.variance_type, module.num_tasks
        ('learned_range', 5)
    """

    def __init__(
        self,
        backbone: UNet,
        *,
        tasks: Tasks,
        process: NoiseProcess = DiscreteDiffusion(variance_type="learned_range"),
        timesteps: TimestepSampling = TimestepSampling(),
        optimization: Optimization = Optimization(),
        sampling: Sampling = Sampling(),
        class_dropout: float | None = None,
        first_stage: FirstStage | None = None,
        auxiliary: FeatureAlignment | None = None,
        adapter: Adapter | None = None,
        init_from: str | None = None,
        init_weights: Literal["ema", "model"] = "ema",
        seed: int | None = None,
    ) -> None:
        # As in `DiTModule`.
        if class_dropout is None:
            class_dropout = 0.0 if backbone.null_class is None else 0.1
        super().__init__(
            backbone,
            process=process,
            tasks=tasks,
            timesteps=timesteps,
            optimization=optimization,
            sampling=sampling,
            class_dropout=class_dropout,
            first_stage=first_stage,
            auxiliary=auxiliary,
            adapter=adapter,
            init_from=init_from,
            init_weights=init_weights,
            seed=seed,
        )


class DiTModule(MultiTaskDiffusion):
    """A diffusion transformer on latents or pixels, with learned variance and class dropout.

    Args:
        backbone: The transformer.
        tasks: See `MultiTaskDiffusion` for this and all arguments below.
        process: By default the linear schedule of 1,000 timesteps with learned variance.
        timesteps: How timesteps are drawn in training.
        optimization: How the weights are optimised.
        sampling: How images are drawn from noise.
        class_dropout: Share of labels replaced by the null class; by default 0.1, or 0 for a
            backbone without a null class.
        first_stage: Autoencoder whose latents are denoised; `None` for pixels.
        auxiliary: A term of the loss from inside the network.
        adapter: Trains an adapter of PEFT in place of the backbone's own weights.
        init_from: Official checkpoint that the backbone starts from.
        init_weights: Which weights of that file, if it has both.
        seed: Seed of timesteps, noise and dropout.

    Reference:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.

    Examples:
        >>> from ant_lightning import DDIM, DiT, DiTModule, Sampling, SNRClustering, Tasks
        >>> network = DiT(
        ...     input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1,
        ...     num_classes=10,
        ... )
        >>> sampling = Sampling(DDIM(num_steps=2))
        >>> module = DiTModule(network, tasks=Tasks(SNRClustering(num_tasks=5)), sampling=sampling)
        >>> module.class_dropout, module.sample(3).shape
        (0.1, torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        backbone: DiT,
        *,
        tasks: Tasks,
        process: NoiseProcess = DiscreteDiffusion(variance_type="learned_range"),
        timesteps: TimestepSampling = TimestepSampling(),
        optimization: Optimization = Optimization(),
        sampling: Sampling = Sampling(),
        class_dropout: float | None = None,
        first_stage: FirstStage | None = None,
        auxiliary: FeatureAlignment | None = None,
        adapter: Adapter | None = None,
        init_from: str | None = None,
        init_weights: Literal["ema", "model"] = "ema",
        seed: int | None = None,
    ) -> None:
        # 0.1 as in DiT; a network without a null class has nothing to replace labels by.
        if class_dropout is None:
            class_dropout = 0.0 if backbone.null_class is None else 0.1
        super().__init__(
            backbone,
            process=process,
            tasks=tasks,
            timesteps=timesteps,
            optimization=optimization,
            sampling=sampling,
            class_dropout=class_dropout,
            first_stage=first_stage,
            auxiliary=auxiliary,
            adapter=adapter,
            init_from=init_from,
            init_weights=init_weights,
            seed=seed,
        )


class LDMModule(MultiTaskDiffusion):
    """A network on latents, as in latent diffusion; takes the arguments of `MultiTaskDiffusion`.

    Without `first_stage` the data must be cached latents (`LatentsData`), and `sample` returns
    latents.

    Raises:
        ConfigError: When a run starts without a first stage on data that are not latents.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv 2112.10752.

    Examples:
        >>> from ant_lightning import LDMModule, ScaledLinearSchedule, SNRClustering, Tasks, UNet
        >>> from ant_lightning import DiscreteDiffusion
        >>> network = UNet(
        ...     input_size=4, in_channels=4, out_channels=4, model_channels=32,
        ...     channel_mult=[1], num_res_blocks=1, attention_resolutions=[],
        ... )
        >>> module = LDMModule(
        ...     network,
        ...     process=DiscreteDiffusion(ScaledLinearSchedule()),
        ...     tasks=Tasks(SNRClustering(num_tasks=5)),
        ... )
        >>> module.image_shape
        (4, 4, 4)
    """

    def setup(self, stage: str) -> None:
        """Refuse data that are pixels."""
        super().setup(stage)  # takes `latent_space` from the data
        if stage != "predict" and self.latent_space is None:
            raise ConfigError(
                "first_stage: must be set, or the data be LatentsData, found None and "
                f"{type(getattr(self.trainer, 'datamodule', None)).__name__}"
            )
