"""The digits under flow matching and EDM: every method trains, resumes and is measured alike."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import tiny_digits
import torch
from tiny_fit import BALANCERS, SIZE

from ant_lightning import (
    EDM,
    Batch,
    ConfigError,
    DigitsData,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    FlowMatching,
    LogitNormal,
    LogNormal,
    SizeShifted,
    SNRClustering,
    Table,
    Tasks,
    TimestepClustering,
    TimestepSampling,
    Uniform,
)
from ant_lightning.cli.parser import run
from ant_lightning.data.digits_mixture import digits_mixture
from ant_lightning.models.draws import sample_shares

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROCESSES = {
    "flow": lambda: FlowMatching(density=LogitNormal(), num_timesteps=100),
    "edm": lambda: EDM(num_timesteps=100),
}


def module(process, method="pcgrad", clustering=SNRClustering, **settings):
    torch.manual_seed(0)
    return DiTModule(
        DiT(**SIZE, depth=1, num_heads=1, num_classes=10, learn_sigma=False),
        process=process,
        tasks=Tasks(clustering(num_tasks=3), balancer=BALANCERS[method]()),
        seed=0,
        **settings,
    )


def trainer(folder, steps):
    return tiny_digits.trainer(folder, steps=steps, limit_val_batches=0)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.backbone.parameters()])


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", BALANCERS)
def test_every_balancer_trains_and_resumes_bit_for_bit(name, method, tmp_path):
    data = {"batch_size": 12, "seed": 0}
    whole = module(PROCESSES[name](), method)
    before = weights_of(whole).clone()
    trainer(tmp_path, 4).fit(whole, datamodule=DigitsData(**data))
    assert not torch.equal(weights_of(whole), before)
    assert bool(weights_of(whole).isfinite().all())
    half = trainer(tmp_path, 2)
    half.fit(module(PROCESSES[name](), method), datamodule=DigitsData(**data))
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(PROCESSES[name](), method)
    again = trainer(tmp_path, 4)
    again.fit(resumed, datamodule=DigitsData(**data), ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_a_checkpoint_of_another_process_or_convention_is_refused(tmp_path):
    first = trainer(tmp_path, 1)
    first.fit(module(FlowMatching(num_timesteps=100)), datamodule=DigitsData(batch_size=12))
    first.save_checkpoint(tmp_path / "flow.ckpt")
    for process, message in (
        (
            EDM(num_timesteps=100),
            r"process: must be that .*, FlowMatching\(path=linear, conv",
        ),
        (FlowMatching("gvp", num_timesteps=100), r"process: .*found FlowMatching\(path=gvp"),
        (
            FlowMatching(convention="diffusers", num_timesteps=100),
            "process: .*convention=sit.*convention=diffusers",
        ),
        (DiscreteDiffusion(), "process: .* checkpoint, FlowMatching.*found DiscreteDiffusion"),
        (
            FlowMatching(prediction_type="x0", num_timesteps=100),
            "prediction_type: .* v, found x0",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, 2).fit(
                module(process),
                datamodule=DigitsData(batch_size=12),
                ckpt_path=str(tmp_path / "flow.ckpt"),
            )


def validation_losses(process):
    model = module(process)
    with torch.no_grad():  # adaLN-Zero outputs 0 before training
        for index, p in enumerate(model.backbone.parameters()):
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p) * (1 + index % 3))
    validation = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        limit_val_batches=2,
    )
    return validation.validate(model, datamodule=DigitsData(batch_size=32), verbose=False)[0]


def test_val_loss_does_not_depend_on_the_density():
    densities = (Uniform(), LogitNormal(1.0, 0.7), Table(list(range(1, 101))))
    losses = [
        validation_losses(FlowMatching(density=each, num_timesteps=100)) for each in densities
    ]
    assert losses[0] == losses[1] == losses[2]
    losses = [
        validation_losses(EDM(density=each, num_timesteps=100))
        for each in (LogNormal(-1.2, 1.2), LogNormal(0.5, 2.0), Uniform())
    ]
    assert losses[0] == losses[1] == losses[2]


def test_train_loss_is_the_loss_under_the_density_whatever_the_allocation():
    """The mean over many steps of what is logged, for weights that do not move."""
    process = FlowMatching(density=LogitNormal(1.0, 0.7), num_timesteps=100)
    found = {}
    for allocation, method in (
        ("equal", "stratified"),
        ("proportional", "stratified"),
        ("equal", "uniform"),
    ):
        model = module(
            process,
            "linear",
            timesteps=TimestepSampling(method, allocation=allocation),
        )
        data = DigitsData(batch_size=64, seed=0)
        data.setup("fit")
        # The loss of cell c is c: only how often cells are drawn matters.
        values = []
        for step in range(200):
            indices = torch.arange(64)
            batch = Batch(torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.long), indices)
            draws = model.draws(batch, model.clusters, step=step, rank=0, world_size=1)
            losses = draws.timesteps.double()
            if method == "uniform":
                values.append(losses.mean())
                continue
            counts = draws.tasks.bincount(minlength=3).double()
            masses = model.clusters.masses(model.draws.density)
            shares = sample_shares(masses, counts, allocation)
            values.append((losses * shares[draws.tasks]).sum())
        values = torch.stack(values)
        found[allocation, method] = (values.mean(), values.std() / 200**0.5)
    wanted = (process.density * torch.arange(100)).sum()
    for mean, error in found.values():
        assert abs(float(mean - wanted)) < 5 * float(error)


def test_times_lie_in_the_cells_whose_tasks_they_have():
    for process in (PROCESSES["flow"](), PROCESSES["edm"]()):
        for clustering in (SNRClustering, TimestepClustering):
            model = module(process, clustering=clustering)
            batch = Batch(torch.zeros(30, 1, 8, 8), torch.zeros(30).long(), torch.arange(30))
            draws = model.draws(batch, model.clusters, step=3, rank=0, world_size=1)
            edges = process.edges
            inner = (draws.timesteps > 0) & (draws.timesteps < 99)
            slack = 1 + 1e-12
            assert bool((draws.times * slack >= edges[draws.timesteps])[inner].all())
            assert bool((draws.times <= edges[draws.timesteps + 1] * slack)[inner].all())
            assert torch.equal(model.clusters.task_of(draws.timesteps), draws.tasks)
            # Two ranks draw the same global batch.
            half = Batch(*(each[:15] for each in (batch.images, batch.labels, batch.indices)))
            parts = [
                model.draws(half, model.clusters, step=3, rank=r, world_size=2) for r in (0, 1)
            ]
            assert torch.equal(torch.cat([p.times for p in parts]), draws.times)


def test_a_shift_by_size_takes_the_size_of_the_backbone_and_refuses_others():
    process = FlowMatching(density=SizeShifted(LogitNormal(), base_size=4), num_timesteps=100)
    model = module(process)
    assert model.process.sampling_density.shift == 2.0
    batch = Batch(torch.zeros(4, 1, 16, 16), torch.zeros(4).long(), torch.arange(4))
    draws = model.draws(batch, model.clusters, step=0, rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"batch.images: must be \[1, 8, 8\] each"):
        model.losses(batch.images, draws)


@pytest.mark.parametrize(
    ("name", "clustering"),
    [
        *(("sit", clustering) for clustering in ("snr", "timestep", "shuffled")),
        ("edm", "snr"),
        pytest.param("edm", "timestep", marks=pytest.mark.slow),
        pytest.param("edm", "shuffled", marks=pytest.mark.slow),
    ],
)
def test_the_configs_train_and_sample_with_every_clustering(name, clustering, tmp_path):
    files = (f"digits/{name}", "balancer/uw", f"clustering/{clustering}")
    args = [each for file in files for each in ("--config", str(CONFIGS / f"{file}.yaml"))]
    args += [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.batch_size=20",
        f"--trainer.logger.save_dir={tmp_path}",
    ]
    cli = run(["fit", *args])
    assert cli.trainer.global_step == 2
    images = cli.model.sample(3)
    assert images.shape == (3, 1, 8, 8)
    assert bool(images.isfinite().all())


def test_the_exact_denoiser_of_the_digits_is_one_field_in_all_its_types():
    mixture = digits_mixture(1)
    for process in (*(make() for make in PROCESSES.values()), FlowMatching("vp")):
        times = process.times(torch.arange(0, process.num_timesteps, 10))
        generator = torch.Generator().manual_seed(0)
        x_start, _ = mixture.draw(len(times), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
        x_t = process.noised(x_start, noise, times)
        at = process.levels(x_t, times)
        exact = mixture.denoise(x_t, a=at.a[:, 0], s=at.s[:, 0])
        for kind in ("x0", "v", "score", "eps"):
            prediction = process.convert(kind, exact, x_t, times, prediction_type="eps")
            back = process.to_eps(prediction, x_t, times, prediction_type=kind)
            torch.testing.assert_close(back, exact, rtol=1e-7, atol=1e-9)


def rare_warnings(balancer, tmp_path, **timesteps):
    """Warnings of three steps with 12 images, on clusters of which the first has little mass."""
    process = FlowMatching(density=LogitNormal(1.0, 0.5), num_timesteps=100)
    model = module(process, balancer, timesteps=TimestepSampling(**timesteps))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, 3).fit(model, datamodule=DigitsData(batch_size=12, seed=0))
    return model, [str(each.message) for each in found if "tasks: the expected" in str(each)]


def test_a_task_that_is_rarer_than_one_image_a_step_warns_once(tmp_path):
    model, found = rare_warnings("uw", tmp_path, allocation="proportional")
    assert len(found) == 1
    masses = model.clusters.masses(model.process.density)
    assert 12 * float(masses[0]) < 1 <= 12 * float(masses[1])
    words = f"task 0 (mass {float(masses[0]):.2g}, {12 * float(masses[0]):.2g} a step) in batches"
    assert words in found[0]
    assert "\n" not in found[0]
    # Without shares, tasks are drawn by their mass as well.
    assert len(rare_warnings("uw", tmp_path, method="uniform")[1]) == 1
    for balancer, settings in (("uw", {}), ("vanilla", {}), ("vanilla", {"method": "uniform"})):
        assert rare_warnings(balancer, tmp_path, **settings)[1] == []
