"""The conditions that a backbone takes: which, from where, and what stands for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.diffusion.condition import (
    Condition,
    NullCondition,
    map_condition,
    null_like,
)
from ant_lightning.errors import ConfigError
from ant_lightning.models.backbone import backbone_name
from ant_lightning.models.requests import as_labels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ant_lightning.data.batch import Batch
    from ant_lightning.data.dataset import ImageDataset

# Captions of images to draw, by their indices.
Prompts = Callable[[list[int]], Mapping[str, "Tensor"]]


class Conditions:
    """What a backbone is conditioned on.

    A network with `null_condition` gets a mapping of named tensors, any other network its labels.

    Args:
        backbone: The network.

    Attributes:
        num_classes: Classes of the entry `labels`; 0 for none.
        names: The other entries.
        null: The null values; those of the data replace the network's own.
        prompts: Entries for images that are drawn without being given any; set by the data.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone_name(backbone)
        null: Any = getattr(backbone, "null_condition", None)
        self.is_named = null is not None
        self.num_classes = int(getattr(backbone, "num_classes", 0) or 0)
        self.names = tuple(name for name in null or {} if name != "labels")
        self.null: NullCondition = getattr(backbone, "null_class", None)
        if self.is_named:
            self.null = {
                name: None if value is None else torch.as_tensor(value)
                for name, value in null.items()
            }
        self.prompts: Prompts | None = None
        self._seen: Mapping[str, Tensor] = {}  # entries of one image

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class; `None` if there is none."""
        if isinstance(self.null, Mapping):
            value = self.null.get("labels")
            return None if value is None else int(value)
        return self.null

    @property
    def without_null(self) -> str | None:
        """Why nothing can be dropped or guided, for a message; `None` if it can."""
        if not isinstance(self.null, Mapping):
            return None if self.null is not None else "no null class"
        missing = [name for name, value in self.null.items() if value is None]
        if missing:
            return f"no null for {', '.join(missing)} in null_condition"
        return None if self.null else "no condition"

    def check_null(self, name: str, value: float, *, neutral: int) -> None:
        """Check a setting that needs null values, unless it is `neutral`.

        Raises:
            ConfigError: If the backbone has no null for a condition.
        """
        if value != neutral and self.without_null:
            raise ConfigError(
                f"{name}: must be {neutral} because {self._backbone} has {self.without_null} (a "
                "DiT or UNet has a null class with num_classes above 1 and class_dropout_prob "
                f"above 0, a network of your own by its null_condition), found {value}"
            )

    def check_classes(self, data: Any) -> None:  # noqa: ANN401 - any image data module
        """Compare the classes of the data with those of the network.

        Raises:
            ConfigError: If the network needs labels that the data lack, or has other classes.
        """
        # Without labels every image is of class 0, which is what a network of one class expects.
        if self.num_classes > 1 and not data.num_classes:
            raise ConfigError(
                "data: must have labels for a backbone with num_classes = "
                f"{self.num_classes}, found 0 classes"
            )
        if self.num_classes and max(1, data.num_classes) != self.num_classes:
            raise ConfigError(
                f"backbone.num_classes: must be the {data.num_classes} classes of the data "
                f"(or 0 to ignore labels), found {self.num_classes}"
            )

    def take_null(self, found: Mapping[str, Tensor]) -> None:
        """Replace null values by those that the data say, such as the embedding of no text."""
        if isinstance(self.null, Mapping):
            self.null = {name: found.get(name, value) for name, value in self.null.items()}

    def null_state(self) -> dict[str, Tensor]:
        """The null values for a checkpoint."""
        null = self.null if isinstance(self.null, Mapping) else {}
        return {name: value for name, value in null.items() if value is not None}

    def of_batch(self, batch: Batch) -> Condition:
        """The condition of the images of a batch.

        Raises:
            ConfigError: If the batch lacks an entry, or it is not one for each image.
        """
        if not self.is_named:
            return batch.labels if self.num_classes else None
        given = batch.condition
        self._check(given, where="batch.condition", num_images=len(batch.images))
        named = {name: given[name] for name in self.names}
        self._seen = {name: each[:1] for name, each in named.items()}
        return {**named, **({"labels": batch.labels} if self.num_classes else {})}

    def of_images(
        self,
        indices: list[int],
        labels: int | Iterable[int] | Tensor | None,
        given: Mapping[str, Tensor] | None,
    ) -> Condition:
        """The condition of images to draw.

        Args:
            indices: Which images.
            labels: Their classes, or one for all; by default index modulo the number of classes.
            given: The other entries; by default those of held-out images of the data.

        Raises:
            ConfigError: If an entry is missing, or is not one for each image, or the network lacks
                one of the classes.
        """
        classes = self.num_classes
        if labels is None and classes:
            labels = [index % classes for index in indices]
        if labels is not None:
            labels = as_labels(
                labels, len(indices), num_classes=classes, null_class=self.null_class
            )
        if not self.is_named:
            if given:
                raise ConfigError(
                    f"condition: must be left out for {self._backbone}, which takes labels alone, "
                    f"found {', '.join(given)}"
                )
            return labels
        if given is None and self.names and self.prompts is not None:
            given = self.prompts(indices)
        self._check(given or {}, where="condition", num_images=len(indices))
        named = {name: (given or {})[name] for name in self.names}
        return {**named, **({} if labels is None else {"labels": labels})}

    def of_padding(self, labels: Tensor | None, device: torch.device) -> Condition:
        """A condition for one image that nobody sees; shapes are those seen last."""
        if not self.is_named:
            return labels
        named = {name: each.to(device) for name, each in self._seen.items()}
        return {**named, **({} if labels is None else {"labels": labels})}

    def bind(self, data: Any) -> None:  # noqa: ANN401 - attributes that only some data have
        """Take null values and default prompts from a data module.

        Raises:
            ConfigError: If the data do not give a condition.
        """
        if not self.names:
            return
        self.take_null(getattr(data, "null_condition", None) or {})
        images = data.held_out_images
        found = images.conditions([0])
        self._check(found, where="data", num_images=1)
        self._seen = {name: found[name] for name in self.names}
        self.prompts = partial(_prompts, images)

    def dropped(self, condition: Condition, drop: Tensor) -> Condition:
        """The condition, with the null of every entry where `drop [b]` is true."""

        def one(each: Tensor, null: Tensor) -> Tensor:
            return torch.where(drop.view(-1, *[1] * (each.ndim - 1)), null, each)

        return map_condition(one, condition, null_like(condition, self.null))

    def _check(self, given: Mapping[str, Tensor], *, where: str, num_images: int) -> None:
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ConfigError(
                f"{where}: must have {', '.join(missing)} for {self._backbone}, found "
                f"{_listed(given)}"
            )
        for name in self.names:
            if len(given[name]) != num_images:
                raise ConfigError(
                    f"{where}: {name} must have one entry for each of the {num_images} images, "
                    f"found shape {list(given[name].shape)}"
                )
            null = self.null[name] if isinstance(self.null, Mapping) else None
            shape = given[name].shape[1:]
            if null is not None and not _broadcasts(null.shape, shape):
                raise ConfigError(
                    f"null_condition: {name} must broadcast to the shape {list(shape)} of an "
                    f"image's entry, found {list(null.shape)}"
                )


def _prompts(images: ImageDataset, indices: list[int]) -> Mapping[str, Tensor]:
    return images.conditions([index % len(images) for index in indices])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(shape, to) == to)
    except RuntimeError:
        return False
