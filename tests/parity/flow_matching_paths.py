"""The paths of flow_matching by its names: three are ours, the others are written here."""

import torch

from ant_lightning import FlowMatching
from ant_lightning.diffusion.prediction import Levels


class Polynomial(FlowMatching):
    """`a = (1 - t)^n`, `s = 1 - (1 - t)^n`: a path of flow_matching that we have not."""

    def __init__(self, n=2.0):
        self.n = n  # before the base class asks for the levels
        super().__init__()

    def levels(self, x, times):
        r = (1 - times).view(-1, *[1] * (x.ndim - 1))
        a, rate = r**self.n, self.n * r ** (self.n - 1)
        return Levels(a, 1 - a, -rate, rate, rate)

    def log_snr_at(self, times):
        a = (1 - times) ** self.n
        return 2 * (a.log() - (1 - a).log())

    def times_at(self, log_snr):
        return 1 - torch.sigmoid(log_snr / 2) ** (1 / self.n)


class LinearVP(FlowMatching):
    """`a = 1 - t`, `s = sqrt(1 - a²)`: another one."""

    def levels(self, x, times):
        a = (1 - times).view(-1, *[1] * (x.ndim - 1))
        s = (1 - a * a).sqrt()
        return Levels(a, s, torch.full_like(a, -1), a / s, 1 / s)

    def log_snr_at(self, times):
        a = 1 - times
        return 2 * a.log() - torch.log1p(-a * a)

    def times_at(self, log_snr):
        return 1 - torch.sigmoid(log_snr).sqrt()


PATHS = {
    "condot": FlowMatching,
    "cosine": lambda: FlowMatching("gvp"),
    "vp": lambda: FlowMatching("vp"),
    "poly2": Polynomial,
    "linvp": LinearVP,
    "poly1": lambda: Polynomial(1.0),
    "poly3.5": lambda: Polynomial(3.5),
}
