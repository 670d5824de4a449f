"""Draws of training times by importance: baselines beside clusters and balancers."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, check_above, check_at_least, check_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ant_lightning.diffusion.process import NoiseProcess


class CellProposal(nn.Module):
    """Shares q by which cells are drawn in place of the process' own density p.

    Attributes:
        corrected: Whether the loss of a sample is multiplied by p / q, which keeps its mean.
    """

    corrected: bool = True

    @abstractmethod
    def shares(self, process: NoiseProcess) -> Float[Tensor, " T"]:
        """q, float64 on the CPU with the sum 1."""

    def record(self, cells: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Take note of the losses of a step, of all ranks; by default nothing is kept."""


class LossSecondMoment(CellProposal):
    """`q ~ p sqrt(E[L²])` from the last losses of each cell, the loss divided by q / p.

    Until every cell has `history` losses, q is p. Each step waits for the losses of the one before:
    this is a baseline, and it costs one wait of the host a step on a GPU.

    Args:
        history: Losses that are kept of each cell.
        own_share: Share of draws that stay with p.

    Raises:
        ConfigError: If `history` is below 1, or `own_share` is not in [0, 1].

    Reference:
        Nichol and Dhariwal, "Improved DDPM", section 3.3, arXiv 2102.09672. There p is uniform.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching, LossSecondMoment
        >>> process = FlowMatching(num_timesteps=2)
        >>> proposal = LossSecondMoment(history=1, own_share=0)
        >>> proposal.shares(process).tolist()
        [0.5, 0.5]
        >>> proposal.record(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        >>> proposal.shares(process).tolist()
        [0.25, 0.75]
    """

    def __init__(self, *, history: int = 10, own_share: float = 0.001) -> None:
        super().__init__()
        check_at_least(1, history=history)
        check_range(0, 1, own_share=own_share)
        self.history = history
        self.own_share = own_share
        # Not buffers: draws are made on the CPU, in float64, whatever the module is cast to.
        self._losses = torch.zeros(0, history, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.int64)

    def get_extra_state(self) -> dict[str, Any]:
        """Copies of the losses and their numbers."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue with stored losses.

        Raises:
            ConfigError: If they are of another history.
        """
        if state["losses"].shape[1:] != (self.history,):
            raise ConfigError(
                f"history: must be that of the checkpoint, {state['losses'].shape[-1]}, found "
                f"{self.history}"
            )
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()

    def shares(self, process: NoiseProcess) -> Float[Tensor, " T"]:
        """q, float64 on the CPU with the sum 1."""
        p = process.density
        self._grow(len(p))
        if int(self._counts.min()) < self.history:
            return p
        q = p * self._losses.square().mean(1).sqrt()
        if not float(q.sum()) > 0:
            return p
        return (1 - self.own_share) * q / q.sum() + self.own_share * p

    def record(self, cells: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Append each loss to those of its cell; the oldest one goes."""
        self._grow(int(cells.max()) + 1)
        for cell, loss in zip(cells.tolist(), losses.tolist(), strict=True):
            # A ring: the order inside the history does not matter.
            self._losses[cell, self._counts[cell] % self.history] = loss
            self._counts[cell] += 1

    def _grow(self, num_timesteps: int) -> None:
        more = num_timesteps - len(self._counts)
        if more > 0:
            self._losses = torch.cat([self._losses, self._losses.new_zeros(more, self.history)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])


class SpeeD(CellProposal):
    """Cells where the noise level hardly grows any more are drawn `suppression` times less often.

    These are the cells with `d sqrt(1 - abar) / dt < threshold`; the loss is not corrected, so they
    also count less. The paper combines this with a weighting: `loss_weighting: P2` in its code.

    Args:
        suppression: k of the paper, at least 1.
        threshold: For one of 1,000 cells; scaled with the number of cells.

    Raises:
        ConfigError: If `suppression` is below 1 or `threshold` is not above 0.

    Reference:
        Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model
        Training", section 2.2, arXiv 2405.17403. Its code also mirrors half of the draws.

    Examples:
        >>> from ant_lightning import DiscreteDiffusion, SpeeD
        >>> shares = SpeeD().shares(DiscreteDiffusion())
        >>> round((shares[0] / shares[-1]).item(), 3)
        5.0
    """

    corrected = False

    def __init__(self, *, suppression: float = 5.0, threshold: float = 1e-4) -> None:
        super().__init__()
        check_at_least(1, suppression=suppression)
        check_above(0, threshold=threshold)
        self.suppression = suppression
        self.threshold = threshold

    def shares(self, process: NoiseProcess) -> Float[Tensor, " T"]:
        """q, float64 on the CPU with the sum 1."""
        # sqrt(1 - abar) of the variance-preserving form: 1 - abar = 1 / (1 + snr).
        level = torch.sigmoid(-process.log_snr).sqrt()
        (growth,) = torch.gradient(level) if len(level) > 1 else (torch.ones_like(level),)
        converged = growth * len(level) / 1000 < self.threshold
        q = process.density / torch.where(converged, self.suppression, 1.0)
        return q / q.sum()
