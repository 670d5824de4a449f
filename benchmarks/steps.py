"""Training steps to be timed: every method and every engine on the same network and batch.

`official` is the method of the authors' code: k backward passes over the batch with a retained
graph. Of TorchJD's two engines, `autojac` differentiates the mean losses of the tasks together;
`autogram` makes the Gramian of the samples' losses, from which that of the tasks follows, and then
one ordinary backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torchjd import aggregation, autojac
from torchjd.autogram import Engine as Autogram

from ant_lightning import (
    Balancer,
    ContinuousUncertainty,
    CosineSchedule,
    DiscreteDiffusion,
    DiT,
    GradientBalancer,
    LinearScalarization,
    MultiTaskStep,
    NashMTL,
    PCGrad,
    SNRClustering,
    UncertaintyWeighting,
    UNet,
    adm_p2_light,
    denoising_loss,
    dit_b_2,
    dit_s_2,
    ldm_ffhq256,
)
from ant_lightning.balancing.auto import Auto
from ant_lightning.cli.configs import config_names

__all__ = ["ENGINES", "METHODS", "TORCHJD", "Cell", "K", "Stepper"]

K = 5
_SIZES: dict[str, dict[str, Any]] = {
    "0.3M": {"hidden_size": 64, "depth": 4, "num_heads": 4},
    "3M": {"hidden_size": 192, "depth": 6, "num_heads": 6},
    "33M": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
_SIDES = {16: 8, 64: 16, 256: 32}


def _of_config(name: str) -> nn.Module:
    """The UNet of a shipped config."""
    content = yaml.safe_load(config_names()[name].read_text())
    return UNet(**content["model"]["init_args"]["backbone"]["init_args"])


_LATENTS = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DiT-S/2": lambda: dit_s_2(**_LATENTS),
    "DiT-B/2": lambda: dit_b_2(**_LATENTS),
    "LDM digits": lambda: _of_config("digits/ldm"),
    "LDM FFHQ": ldm_ffhq256,
    "ADM light, 256 px": lambda: adm_p2_light(input_size=256),
    "ADM light, 32 px": lambda: adm_p2_light(input_size=32),
}

METHODS: dict[str, Callable[[], Balancer | None]] = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(K),
    "uw": lambda: UncertaintyWeighting(K),
    "continuous uw": lambda: ContinuousUncertainty(K),
    "pcgrad": lambda: PCGrad(K),
    "nash": lambda: NashMTL(K, update_every=25),
    "nash every step": lambda: NashMTL(K, update_every=1),
    "official": lambda: PCGrad(K),
}
# Engines, and methods outside `MultiTaskStep`; all with PCGrad on every step.
ENGINES = ("loop", "one_pass", "low_memory")
TORCHJD = ("torchjd autogram", "torchjd autojac")


@dataclass(frozen=True)
class Cell:
    """What is trained: `3M/64` is a DiT of 3M parameters at 64 tokens; others have names."""

    network: str
    batch_size: int
    device: str = "cpu"
    bf16: bool = False
    compiled: str = ""  # the mode of torch.compile, or nothing for an eager network

    def __str__(self) -> str:
        modes = {"default": ", compiled", "reduce-overhead": ", CUDA graphs"}
        extras = [", bf16" * self.bf16, modes.get(self.compiled, "")]
        return "".join([self.network, *extras])

    def build(self) -> nn.Module:
        """The network, with random weights everywhere."""
        torch.manual_seed(0)
        size, _, tokens = self.network.partition("/")
        with torch.device(self.device):
            if size in _SIZES:
                side = _SIDES[int(tokens)]
                model: nn.Module = DiT(
                    input_size=side, patch_size=2, in_channels=4, num_classes=10, **_SIZES[size]
                )
            else:
                model = _NETWORKS[self.network]()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        if self.compiled:
            model.compile(mode=self.compiled)
        return model.to(self.device)


class Stepper:
    """One method or engine in one cell, stepped by hand.

    Args:
        name: Name of the method or engine.
        cell: What is trained.
        model: The cell's network if several share one, as on a GPU; a new one by default.
    """

    def __init__(self, name: str, cell: Cell, model: nn.Module | None = None) -> None:
        self.name, self.cell = name, cell
        self.model = model if model is not None else cell.build()
        self.balancer = METHODS.get(name, METHODS["pcgrad"])()
        if self.balancer is not None:
            self.balancer.to(cell.device)
        self.shared = [p for p in self.model.parameters() if p.requires_grad]
        own = list(self.balancer.parameters()) if self.balancer else []
        self.optimizer = torch.optim.AdamW([*self.shared, *own], lr=1e-5)
        self.foreign = name == "official" or name in TORCHJD
        self.autogram = Autogram(self.model, batch_dim=0) if name == TORCHJD[0] else None
        self.multitask = MultiTaskStep(
            self.model,
            self.balancer,
            num_tasks=K,
            engine=name if name in ENGINES else "auto",  # type: ignore[arg-type]
        )
        network: Any = self.model
        learned = network.out_channels == 2 * network.in_channels
        self.process = DiscreteDiffusion(
            CosineSchedule(), variance_type="learned_range" if learned else "fixed_small"
        )
        self.clusters = SNRClustering(K)(self.process.log_snr)
        shape = (cell.batch_size, network.in_channels, network.input_size, network.input_size)
        self.x = torch.randn(shape, device=cell.device)
        self.labels = torch.arange(cell.batch_size, device=cell.device) % 10
        self.has_classes = network.num_classes > 0

    @property
    def num_parameters(self) -> int:
        """`p`."""
        return sum(p.numel() for p in self.shared)

    @property
    def engine_name(self) -> str:
        """The engine that made the task gradients, if any."""
        if self.foreign:
            return self.name
        if not isinstance(self.balancer, GradientBalancer):
            return ""
        engine = self.multitask.engine
        used = engine.used if isinstance(engine, Auto) else engine
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(used).__name__).lower()

    def step(self) -> None:
        """One optimization step."""
        t, tasks = self.clusters.sample(self.cell.batch_size)
        noise = torch.randn_like(self.x)
        t_device = t.to(self.cell.device)
        x_t = self.process.q_sample(self.x, t_device, noise)

        def losses(rows: Tensor) -> Tensor:
            rows = rows.to(self.cell.device, non_blocking=True)
            labels = self.labels[rows] if self.has_classes else None
            output = self.model(x_t[rows], t_device[rows], labels)
            args = (self.x[rows], x_t[rows], t_device[rows], noise[rows])
            return denoising_loss(self.process, output, *args).loss

        with torch.autocast(self.cell.device, torch.bfloat16, enabled=self.cell.bf16):
            if self.foreign:
                norm = self._foreign(losses, tasks)
            else:
                norm = self.multitask.backward(
                    losses, tasks, log_snr=self.process.log_snr[t]
                ).grad_norm
        factor = (1.0 / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([p.grad for p in self.shared if p.grad is not None], factor)
        self.optimizer.step()
        self.multitask.update()
        if self.cell.device != "cpu":
            torch.cuda.synchronize()

    def _foreign(self, losses: Callable[[Tensor], Tensor], tasks: Tensor) -> Tensor:
        """Gradients from one graph of the whole batch; returns the norm of their combination."""
        values = losses(torch.arange(self.cell.batch_size))
        means = (tasks == torch.arange(K)[:, None]).to(values)
        means /= means.sum(1, keepdim=True)
        task_losses = means @ values
        for p in self.shared:
            p.grad = None
        if self.autogram is not None:
            # For the samples: with the five means it takes 1.4 times as long.
            gramian = means @ self.autogram.compute_gramian(values) @ means.T
            task_losses.backward(aggregation.PCGradWeighting()(gramian) / K)
        elif self.name in TORCHJD:
            autojac.backward(task_losses, inputs=self.shared)
            autojac.jac_to_grad(self.shared, aggregation.PCGrad())
        else:
            self._official(task_losses)
        return torch.nn.utils.get_total_norm([p.grad for p in self.shared if p.grad is not None])

    def _official(self, task_losses: Tensor) -> None:
        """k backward passes, concatenated rows, and their products."""
        assert self.balancer is not None
        rows = []
        for loss in task_losses:
            grads = torch.autograd.grad(
                loss, self.shared, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([g.flatten() for g in grads]))
        matrix = torch.stack(rows)
        with torch.autocast(self.cell.device, enabled=False):
            combined = self.balancer(matrix @ matrix.T).to(matrix) @ matrix
        for p, part in zip(
            self.shared, combined.split([p.numel() for p in self.shared]), strict=True
        ):
            p.grad = part.view_as(p)
