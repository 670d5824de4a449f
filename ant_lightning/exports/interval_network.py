"""Networks of intervals of the noise axis as one; `ant-lightning export` copies this file.

Each call goes to the network of its timestep, as in pipelines with two transformers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import diffusers
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor, nn

Output: TypeAlias = Any  # that of a network of diffusers


class IntervalNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Networks of one class, from the least noise to the most.

    Args:
        class_name: Their class in diffusers.
        network: Its arguments.
        borders: The timesteps between two intervals.
        rising: Whether timesteps rise with the noise.
        served_by: Which network serves each interval.
        official_frequencies: Whether the time of a `DiTTransformer2DModel` has the frequencies of
            the official DiT.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        class_name: str,
        network: dict[str, Any],
        borders: list[float],
        rising: bool,
        served_by: list[int],
        official_frequencies: bool = False,
    ) -> None:
        super().__init__()
        kind = getattr(diffusers, class_name)
        self.networks = nn.ModuleList(kind(**network) for _ in range(max(served_by) + 1))
        if official_frequencies:
            for name, part in self.networks.named_modules():
                if name.endswith("norm1.emb.time_proj"):
                    part.downscale_freq_shift = 0  # type: ignore[assignment]

    @property
    def config(self) -> FrozenDict:
        """The settings, and those of the networks, which pipelines ask for."""
        own = self._internal_dict
        return FrozenDict({**own["network"], **own})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # What a pipeline asks of its network is the same of all.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "networks" not in self._modules:
                raise
            return getattr(self._modules["networks"][0], name)  # type: ignore[index]

    def forward(self, *inputs: Tensor, **named: Any) -> Output:
        """Call the network of this timestep, which is one for the whole batch.

        Pipelines give it by name, or after the sample.
        """
        timestep = named["timestep"] if "timestep" in named else inputs[1]
        told, rising = float(timestep.flatten()[0]), self.config.rising
        above = [told >= each if rising else told <= each for each in self.config.borders]
        chosen = self.networks[self.config.served_by[sum(above)]]
        return chosen(*inputs, **named)
