"""Excess risk: 0 for the exact denoiser, whatever it predicts, and the sum of the two parts."""

import json
from dataclasses import replace

import pytest
import tiny_digits
import torch

from ant_lightning import (
    EDM,
    ConfigError,
    DigitsData,
    DigitsMixtureData,
    DiT,
    ExcessRisk,
    FlowMatching,
    MultiTaskDiffusion,
    SNRClustering,
    Tasks,
)


class Exact(torch.nn.Module):
    """The exact denoiser of the digits' mixture, off by a constant."""

    num_classes, in_channels, out_channels, input_size, null_class = 0, 1, 1, 8, None

    def __init__(self, kind, off):
        super().__init__()
        self.kind, self.off, self.process = kind, off, None
        self.mixture = DigitsMixtureData().mixture
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, timesteps, labels=None):
        abar = self.process.alphas_cumprod[timesteps]
        eps = self.mixture.denoise(x_t.flatten(1), a=abar.sqrt(), s=(1 - abar).sqrt())
        eps = eps.view(x_t.shape) + self.off
        if self.kind == "v":
            return self.process.to_v(eps, x_t.double(), timesteps, prediction_type="eps")
        if self.kind == "x0":
            return self.process.to_x_start(eps, x_t.double(), timesteps, prediction_type="eps")
        return eps


class ExactVelocity(Exact):
    """The same under flow matching or EDM, where the network is given its own time and scale."""

    def forward(self, x_in, told, labels=None):
        process = self.process
        if isinstance(process, EDM):
            sigma = (4 * told.double()).exp()
            x_t = x_in.double() / process.preconditioning.c_in(sigma).view(-1, 1, 1, 1)
            times = sigma
        else:
            times, x_t = 1 - told.double(), x_in.double()
        at = process.levels(x_t, times)
        a, s = torch.as_tensor(at.a), at.s
        a = a.double().expand_as(s)
        eps = self.mixture.denoise(x_t.flatten(1), a=a.flatten(), s=s.flatten()).view(x_t.shape)
        eps = eps + self.off
        if not isinstance(process, EDM):
            return -process.to_v(eps, x_t, times, prediction_type="eps")
        denoised = process.to_x_start(eps, x_t, times, prediction_type="eps")
        made = process.preconditioning
        c_skip, c_out = (f(times).view(-1, 1, 1, 1) for f in (made.c_skip, made.c_out))
        return (denoised - c_skip * x_t) / c_out


@pytest.mark.parametrize("process", [FlowMatching(num_timesteps=100), EDM(num_timesteps=100)])
@pytest.mark.parametrize("off", [0.0, 0.1])
def test_it_is_that_distance_under_flow_matching_and_edm(tmp_path, process, off):
    backbone = ExactVelocity("v", off)
    backbone.process = process
    module = MultiTaskDiffusion(
        backbone, process=process, tasks=Tasks(SNRClustering(num_tasks=3)), seed=0
    )
    logged, row = measure(tmp_path, module)
    # float32 outputs, multiplied by up to 1 / sigma or 1 / (1 - t) at the ends.
    assert row["tasks"]["excess"] == pytest.approx([off**2] * 3, abs=1e-4)
    assert logged["val/excess_risk"] == pytest.approx(off**2, abs=1e-4)
    assert row["boundaries"] == list(module.clusters.boundaries)


def measure(folder, module, **settings):
    callback = ExcessRisk(images_per_timestep=10, clustering=SNRClustering(3), **settings)
    data = DigitsMixtureData(num_images=64, num_held_out=8, batch_size=8)
    module.sampling = replace(module.sampling, clip_denoised=False)  # pixels leave [-1, 1]
    trainer = tiny_digits.trainer(folder, callback)
    logged = trainer.validate(module, datamodule=data, verbose=False)[0]
    return logged, json.loads((folder / "excess_risk.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("off", [0.0, 0.1])
def test_it_is_the_distance_to_the_exact_denoiser(tmp_path, kind, off):
    backbone = Exact(kind, off)
    module = tiny_digits.module(backbone, prediction_type=kind, variance_type="fixed_small")
    backbone.process = module.process
    logged, row = measure(tmp_path, module)
    tolerance = 1e-4 if kind == "x0" else 1e-6  # float32 over a small noise level
    assert row["tasks"]["excess"] == pytest.approx([off**2] * 3, abs=tolerance)
    assert logged["val/excess_risk"] == pytest.approx(off**2, abs=tolerance)
    assert logged["val/task_2/excess_risk"] == pytest.approx(off**2, abs=tolerance)
    assert row["bins"] == pytest.approx([off**2] * 25, abs=tolerance)
    assert row["boundaries"] == list(module.clusters.boundaries)


def test_risk_is_excess_plus_bayes_risk_and_the_draws_are_common(tmp_path):
    first = measure(tmp_path, tiny_digits.module(tiny_network(0)))[1]
    # Orthogonality, up to the noise of 2,000 images.
    for excess, risk, bayes in zip(*first["tasks"].values(), strict=True):
        assert risk == pytest.approx(excess + bayes, rel=0.1)
        assert excess > 0.05
    # Another model and another seed of the run: the same images, timesteps and noise.
    second = measure(tmp_path, tiny_digits.module(tiny_network(1)))[1]
    assert second["tasks"]["bayes"] == first["tasks"]["bayes"]
    assert second["tasks"]["excess"] != first["tasks"]["excess"]
    third = measure(tmp_path, tiny_digits.module(tiny_network(1)), seed=1)[1]
    assert third["tasks"]["bayes"] != first["tasks"]["bayes"]


def tiny_network(seed):
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "depth": 1, "num_heads": 1}
    network = DiT(input_size=8, patch_size=4, in_channels=1, num_classes=0, **size)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


def test_data_without_a_known_denoiser_are_refused(tmp_path):
    trainer = tiny_digits.trainer(tmp_path, ExcessRisk())
    with pytest.raises(ConfigError, match=r"data: must be DigitsMixtureData .*, found DigitsData"):
        trainer.validate(tiny_digits.module(), datamodule=DigitsData(), verbose=False)
    with pytest.raises(ConfigError, match="images_per_timestep: must be at least 1, found 0"):
        ExcessRisk(images_per_timestep=0)
