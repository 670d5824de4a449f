"""Muon for matrices and AdamW for all else, as one optimizer with one state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from ant_lightning.balancing.local_parts import is_sharded
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class MuonAdamW(Optimizer):
    """Muon on the groups with `muon: True`, which hold matrices only, and AdamW on all others.

    Muon moves a matrix along the nearest orthogonal matrix of its momentum, with a length that
    matches AdamW's (`match_rms_adamw`: `0.2 lr sqrt(max(rows, columns))`), so one learning rate,
    one schedule and one weight decay serve both. It is one optimizer: a run has one state, one
    scheduler and one scaler, as with any other. Take `MuonGroups` as `param_groups`.

    The direction of a Muon step does not depend on the size of the gradient. Clipping changes only
    how much a step counts in the momentum.

    Args:
        params: Parameter groups, some of them with `muon: True`.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both.
        momentum: Muon's momentum.
        betas: AdamW's decay rates.
        eps: AdamW's; Muon has its own.

    Raises:
        ConfigError: If no group is Muon's, or its parameters are sharded.

    Reference:
        Jordan et al., "Muon", kellerjordan.github.io/posts/muon, 2024; Liu et al., "Muon is
        Scalable for LLM Training", section 2.2, arXiv 2502.16982.

    Examples:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> groups = MuonGroups()(list(network.named_parameters()))
        >>> optimizer = MuonAdamW(groups, lr=0.01)
        >>> [type(each).__name__ for each in optimizer.parts]
        ['Muon', 'AdamW']
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        if not any(isinstance(group, dict) and group.get("muon") for group in groups):
            raise ConfigError(
                "params: must be groups of which one has muon: True, found none; set param_groups "
                "to ant_lightning.MuonGroups"
            )
        muon = [group for group in groups if group.get("muon")]
        adamw = [group for group in groups if not group.get("muon")]
        if is_sharded(p for group in muon for p in group["params"]):
            raise ConfigError(
                "params: Muon needs whole matrices, found some that are sharded; use AdamW"
            )
        self.parts: list[Optimizer] = [
            Muon(
                muon,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if adamw:
            self.parts.append(AdamW(adamw, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        # The parts have filled in their settings. The groups, and the state, are those of both:
        # what a scheduler or a checkpoint changes here, a part sees.
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Give the parts the groups and the state of this optimizer."""
        for part, is_muon in zip(self.parts, (True, False), strict=False):
            part.param_groups = [g for g in self.param_groups if bool(g.get("muon")) is is_muon]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
