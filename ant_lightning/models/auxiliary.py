"""An auxiliary loss from inside the network: alignment of its features with another network's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ant_lightning.balancing.gradients import assign_gradients, reduce_gradients_
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.diffusion.process import at_least_float32
from ant_lightning.errors import ConfigError, check_at_least, check_positive
from ant_lightning.models.loss_scaling import clip_gradients_

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from ant_lightning.balancing.reduction import Reduction
    from ant_lightning.balancing.task_batch import Losses


class FeatureAlignment(nn.Module):
    """Pulls the output of a block towards the features of another network, as REPA does.

    Adds to the loss of each sample `weight * (1 + a_s)`, where

        a_s = -mean over patches n of cos(head(h_sn), f(x_s)_n),

    `h` is the output of the block, `x` the clean images, `f` the features, which are not trained,
    and `head` three linear layers with SiLU between them. The paper has no 1, which changes no
    gradient: with it no loss is negative, of which `UncertaintyWeighting` and others take the
    logarithm.

    **What gradient each part gets.** The term is part of its sample's loss, so the network gets it
    with the weight of the sample's task, and the Gramian of the tasks holds it. The parameters of
    the head belong to no task. They are outside the Gramian and outside what a balancer combines,
    and get the gradient of `weight * mean_s a_s`, the plain mean over the samples of all ranks.
    Without a balancer this is REPA. The head is optimised with the settings of the backbone, and
    clipped by its own norm. Checkpoints hold it; averages of weights (`EMA`), affinity and
    `train/loss` leave it out.

    Args:
        block: Name of a part of the network, such as `blocks.7`. Its output is `[b, n, width]`, or
            `[b, width, *dims]` of a UNet.
        features: Makes `[b, n, feature_width]` or `[b, feature_width, *dims]` of images in [-1, 1],
            with as many patches as the block. No checkpoint holds it.
        width: Channels of the block's output; `hidden_size` of a DiT.
        feature_width: Channels of the features.
        hidden_size: Width of the head.
        weight: Weight of the term; 0.5 in the paper.

    Raises:
        ConfigError: If a number is out of range; in use, if block or features do not fit.

    Reference:
        Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is
        Easier Than You Think", arXiv 2410.06940, equation 8.

    Examples:
        >>> from ant_lightning import DiT, FeatureAlignment, MultiTaskStep
        >>> network = DiT(
        ...     input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=2, num_heads=1,
        ...     num_classes=0, learn_sigma=False,
        ... )
        >>> patches = torch.nn.Conv2d(1, 6, 4, stride=4)
        >>> alignment = FeatureAlignment(
        ...     block="blocks.0", features=patches, width=8, feature_width=6, hidden_size=16
        ... )
        >>> alignment.attach(network)
        >>> step, x, t = MultiTaskStep(network), torch.randn(4, 1, 8, 8), torch.arange(4)
        >>> def losses(rows):
        ...     return network(x[rows], t[rows]).square().mean((1, 2, 3))
        >>> report = step.backward(alignment.added(losses, x), tasks=torch.tensor([0, 0, 1, 1]))
        >>> alignment.backward()  # fills the gradients of the head; one optimizer may step both
        >>> loss = 0.5 * (1 + float(alignment.value))  # the network itself still outputs 0
        >>> abs(float(report.objective) - loss) < 1e-6
        True
    """

    def __init__(
        self,
        *,
        block: str,
        features: nn.Module,
        width: int,
        feature_width: int,
        hidden_size: int = 2048,
        weight: float = 0.5,
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, feature_width=feature_width, hidden_size=hidden_size)
        check_positive(weight=weight)
        self.path = ""  # of this object among the settings, for messages
        self.block = block
        self.width = width
        self.feature_width = feature_width
        self.weight = weight
        self.head = nn.Sequential(
            nn.Linear(width, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, feature_width),
        )
        # In a tuple: no part of the model, as a guide is not; it is never trained or stored.
        self._features = (features.eval().requires_grad_(False),)
        self._tap = _Tap()
        # Of the step: outputs of the block [b, n, width], features, factors of the samples.
        self._inputs: list[Tensor] = []
        self._targets: Tensor | None = None
        self._factors: Tensor | None = None
        self.value: Tensor | None = None  # mean of `a_s` over the samples of all ranks

    def attach(self, network: nn.Module) -> None:
        """Watch the block of `network`; once, and before the first call if it is compiled.

        Raises:
            ConfigError: If the network has no part of that name.
        """
        try:
            part = network.get_submodule(self.block)
        except AttributeError:
            names = [name for name, _ in network.named_modules() if name.count(".") == 1][:8]
            raise ConfigError(
                f"{self.path}block: must be a part of the network, such as {', '.join(names)}, "
                f"found {self.block!r}"
            ) from None
        part.register_forward_hook(self._tap)

    def added(self, losses: Losses, images: Tensor, *, factors: Tensor | None = None) -> Losses:
        """`losses` with the term of each sample.

        Args:
            losses: Calls the network; see `MultiTaskStep.backward`.
            images: Clean images of the batch, `[b, c, h, w]` in [-1, 1].
            factors: Of the terms, `[b]`, such as the importance of draws; 1 by default.

        Raises:
            ConfigError: If the features do not have `feature_width` channels.
        """
        with torch.no_grad():
            targets = self._tokens(self._features[0](images), self.feature_width, "feature_width")
            targets = F.normalize(at_least_float32(targets), dim=-1)
        self._inputs, self._targets, self._factors = [], targets, factors
        for p in self.head.parameters():
            p.grad = None

        def losses_of(rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            with self._tap:
                found = losses(rows)
            inputs = self._tokens(self._tap.output, self.width, "width")
            if inputs.shape[1] != targets.shape[1]:
                raise ConfigError(
                    f"{self.path}features: must give the {inputs.shape[1]} patches of "
                    f"{self.block}, found {targets.shape[1]}"
                )
            here = rows.to(inputs.device, non_blocking=True)
            if torch.is_grad_enabled():
                self._keep(here, inputs.detach(), len(targets))
            terms = self.weight * (1 + self._alignment(inputs, targets[here]))
            if factors is not None:
                terms = terms * factors[here]
            if isinstance(found, tuple):
                return found[0] + terms.to(found[0].dtype), found[1]
            return found + terms.to(found.dtype)

        return losses_of

    def backward(
        self,
        *,
        loss_scale: Tensor | float = 1.0,
        max_norm: float | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """Fill the gradients of the head, after the backward pass of the network.

        Args:
            loss_scale: `.grad` is left multiplied by this.
            max_norm: Largest norm of the gradient; `None` for no limit.
            reduction: Sums over ranks; by default over all of `torch.distributed`.
        """
        reduction = reduction or default_reduction()
        assert self._targets is not None, "added was not called"
        (inputs,), parameters = self._inputs, list(self.head.parameters())
        aligned = self._alignment(inputs, self._targets)
        if self._factors is not None:
            aligned = aligned * self._factors
        count = reduction.all_reduce_(aligned.new_full((), len(aligned), dtype=torch.float64))
        mean = aligned.sum() / count.to(aligned.dtype)
        # The scale is in the backward pass, where it protects float16.
        found = torch.autograd.grad(mean * self.weight * loss_scale, parameters)
        assign_gradients(parameters, found)
        reduce_gradients_(parameters, reduction=reduction)
        self.value = reduction.all_reduce_(mean.detach())
        self._inputs, self._targets = [], None
        if max_norm is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) / loss_scale
            clip_gradients_(parameters, norm, max_norm)

    def _alignment(self, inputs: Float[Tensor, "b n d"], targets: Tensor) -> Float[Tensor, " b"]:
        """`-mean_n cos(head(inputs_n), targets_n)`; the targets have length 1."""
        projected = at_least_float32(self.head(inputs.to(next(self.head.parameters()).dtype)))
        return -(F.normalize(projected, dim=-1) * targets).sum(-1).mean(-1)

    def _keep(self, rows: Tensor, inputs: Tensor, num_samples: int) -> None:
        """Keep the block's outputs; engines that ask twice for a sample overwrite them."""
        if not self._inputs:
            self._inputs = [inputs.new_zeros(num_samples, *inputs.shape[1:])]
        self._inputs[0][rows] = inputs

    def _tokens(self, output: Tensor | None, width: int, name: str) -> Float[Tensor, "b n d"]:
        """Features `[b, n, d]` of an output `[b, n, d]` or `[b, d, *dims]`."""
        who = self.block if name == "width" else "features"
        if not isinstance(output, Tensor) or output.ndim < 3:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"{self.path}{'block' if name == 'width' else 'features'}: must give a tensor "
                f"[b, n, {width}] or [b, {width}, *dims] in each call, found {shape}"
            )
        tokens = output if output.ndim == 3 else output.flatten(2).transpose(1, 2)
        if tokens.shape[-1] != width:
            raise ConfigError(
                f"{self.path}{name}: must be the {tokens.shape[-1]} channels of {who}, "
                f"found {width}"
            )
        return tokens

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureAlignment:
        # The features follow the head to its device and dtype.
        self._features[0]._apply(fn)
        super()._apply(fn, recurse)
        return self


class _Tap:
    """A forward hook that keeps a block's output inside a `with` block, and is idle outside.

    It is registered once and for all, as a compiled network does not see later changes of hooks.
    """

    def __init__(self) -> None:
        self.active = False
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.active:
            self.output = output

    def __enter__(self) -> None:
        self.active, self.output = True, None

    def __exit__(self, *error: object) -> None:
        self.active = False
