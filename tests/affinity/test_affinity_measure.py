import math
import tempfile
import warnings

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, task_affinity, timestep_grid
from ant_lightning.affinity.gradient import NonFiniteGradientError
from ant_lightning.affinity.gradient_store import GradientStore
from ant_lightning.affinity.measure import AffinityReliabilityWarning
from ant_lightning.affinity.sketch import HadamardSketch
from ant_lightning.files.safetensors_file import write_tensors

T = 1000
GRID = (0, 40, 90, 200, 350, 500, 640, 800, 930, 999)


class Toy(torch.nn.Module):
    """Predicts noise in 16 numbers; 51,016 parameters at width 1,500."""

    def __init__(self, width=1500, num_images=64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Linear(17, width)
        self.second = torch.nn.Linear(width, 16)
        for each in self.parameters():
            each.data = 0.2 * torch.randn(each.shape, generator=generator)
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        self.images = torch.randn(num_images, 16, generator=generator) + 1
        self.calls = []

    def loss(self, timestep, half):
        self.calls.append((timestep, half))
        x = self.images[half::2]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2 * timestep + half))
        angle = math.pi / 2 * (timestep + 0.5) / T
        x_t = math.cos(angle) * x + math.sin(angle) * noise
        hidden = self.first(torch.cat([x_t, torch.full((len(x), 1), angle)], 1)).tanh()
        return (self.second(hidden) - noise).square().mean()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Products this small are slower on several threads, which then wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def brute_force(toy, grid):
    """Cosine of mean gradients and corrected cosine, one pair at a time in float64 numpy."""
    halves = []
    for t in grid:
        pair = []
        for half in (0, 1):
            toy.zero_grad()
            toy.loss(t, half).backward()
            kept = [p.grad for p in toy.parameters() if p.grad is not None]
            pair.append(np.concatenate([g.double().numpy().ravel() for g in kept]))
        halves.append(pair)
    n = len(grid)
    plain, corrected = np.empty((n, n)), np.empty((n, n))
    for i, (a_i, b_i) in enumerate(halves):
        for j, (a_j, b_j) in enumerate(halves):
            m_i, m_j = (a_i + b_i) / 2, (a_j + b_j) / 2
            plain[i, j] = m_i @ m_j / np.sqrt((m_i @ m_i) * (m_j @ m_j))
            cross = (a_i @ b_j + b_i @ a_j) / 2
            corrected[i, j] = cross / np.sqrt((a_i @ b_i) * (a_j @ b_j))
    r = np.array([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in halves])
    return plain, corrected, 2 * r / (1 + r)


def measure(toy, **settings):
    given = {"num_timesteps": T, "timesteps": GRID, "warn_below": -1.0} | settings
    return task_affinity(toy.loss, parameters=toy.parameters(), **given)


def test_exact_equals_brute_force_on_50k_parameters():
    toy = Toy()
    result = measure(toy)
    plain, corrected, reliability = brute_force(toy, GRID)
    assert result.num_parameters == 51_016
    assert np.abs(result.plain.numpy() - plain).max() < 1e-5
    assert np.abs(result.corrected.numpy() - corrected).max() < 1e-5
    assert np.abs(result.reliability.numpy() - reliability).max() < 1e-5
    assert plain.min() < 0.5  # not a model whose gradients all agree


@pytest.fixture(scope="module")
def small():
    """A small network, and its affinity."""
    toy = Toy(width=40)
    return measure(toy)


def test_result_says_what_was_measured():
    log_snr = torch.linspace(5, -5, T)
    result = measure(Toy(width=8), log_snr=log_snr, seed=7, model="toy", timesteps=None)
    assert result.timesteps == timestep_grid(T)
    assert (result.seed, result.model, result.sketch_dim, result.num_timesteps) == (
        7,
        "toy",
        None,
        T,
    )
    expected = [log_snr[t].double() for t in timestep_grid(T)]
    assert torch.equal(result.grid_log_snr, torch.stack(expected))


@pytest.mark.parametrize(("total", "points"), [(1000, 100), (7, 100), (10, 3), (1, 1), (1000, 2)])
def test_grid_is_even_and_has_both_ends(total, points):
    grid = timestep_grid(total, num_points=points)
    assert len(grid) == min(total, points)
    assert grid[0] == 0
    assert grid[-1] == total - 1 or points == 1
    gaps = np.diff(grid)
    assert len(gaps) == 0 or (gaps.min() > 0 and gaps.max() - gaps.min() <= 1)


def test_micro_batches_equal_the_whole(small):
    toy = Toy(width=40)

    def parts(timestep, half):
        for _ in range(4):
            yield toy.loss(timestep, half) / 4

    result = task_affinity(
        parts, parameters=toy.parameters(), num_timesteps=T, timesteps=GRID, warn_below=-1.0
    )
    torch.testing.assert_close(result.plain, small.plain, rtol=0, atol=1e-6)


def test_rescaled_loss_changes_nothing(small):
    toy = Toy(width=40)
    result = task_affinity(
        lambda t, half: (3.0 + t) * toy.loss(t, half),
        parameters=toy.parameters(),
        num_timesteps=T,
        timesteps=GRID,
        warn_below=-1.0,
    )
    torch.testing.assert_close(result.plain, small.plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.corrected, small.corrected, rtol=0, atol=1e-5)


def test_works_under_inference_mode_and_leaves_no_gradient(small):
    toy = Toy(width=40)
    with torch.inference_mode():
        result = measure(toy)
    assert torch.equal(result.half_dots, small.half_dots)
    assert all(each.grad is None for each in toy.parameters())


def test_streamed_equals_exact_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    toy = Toy()
    most_on_disk = []

    def look(done, total):
        most_on_disk.append(sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")))

    budget = 12 * 51_016 + 100_000
    streamed = measure(toy, memory_budget_mb=budget / 2**20, on_progress=look)
    exact = measure(toy)
    rows = 2 * len(GRID) * 4 * 51_016
    assert rows > 4 * budget  # it could not have been held
    assert most_on_disk[-1] >= rows
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(streamed.half_dots, exact.half_dots, rtol=1e-12, atol=1e-15)


def test_budget_that_holds_the_rows_touches_no_disk(tmp_path, monkeypatch, small):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    result = measure(Toy(width=40), memory_budget_mb=16)
    assert torch.equal(result.half_dots, small.half_dots)


@pytest.mark.parametrize("sketch_dim", [None, 64])
def test_budget_too_small_for_one_gradient_is_refused(sketch_dim):
    with pytest.raises(ConfigError, match=r"memory_budget_mb: must be at least \d+ .*found 0.001"):
        measure(Toy(width=40), memory_budget_mb=0.001, sketch_dim=sketch_dim)


@pytest.mark.parametrize("sketch_dim", [None, 64])
def test_killed_run_goes_on_and_equals_one_never_stopped(tmp_path, sketch_dim):
    toy = Toy(width=40)
    settings = {"sketch_dim": sketch_dim, "model": "toy"}
    whole = measure(Toy(width=40), **settings)

    def killed(timestep, half):
        if (timestep, half) == (500, 1):
            raise KeyboardInterrupt
        return toy.loss(timestep, half)

    with pytest.raises(KeyboardInterrupt):
        task_affinity(
            killed,
            parameters=toy.parameters(),
            num_timesteps=T,
            timesteps=GRID,
            resume_dir=tmp_path,
            **settings,
        )
    (tmp_path / ".gradient_000500_1.safetensors.1.tmp").write_bytes(b"half a file")
    progress = []
    toy.calls.clear()
    resumed = measure(
        toy, resume_dir=tmp_path, on_progress=lambda *counts: progress.append(counts), **settings
    )
    assert toy.calls == [(t, half) for t in GRID[5:] for half in (0, 1)][1:]
    assert progress == [(done, 10) for done in range(11)]
    assert torch.equal(resumed.half_dots, whole.half_dots)


def test_state_of_another_measurement_is_refused_by_name(tmp_path):
    toy = Toy(width=8)
    first = {"model": "one", "resume_dir": tmp_path, "sketch_dim": 16}
    measure(toy, **first)
    changes = [
        ({"model": "two"}, "model one, and this run has two"),
        ({"seed": 5}, "seed 0, and this run has 5"),
        ({"timesteps": GRID[1:]}, "timesteps \\[0, 40, .*this run has \\[40, 90"),
        ({"num_timesteps": 1001}, "num_timesteps 1000, and this run has 1001"),
        ({"sketch_dim": 32}, "sketch_dim 16, and this run has 32"),
    ]
    for change, words in changes:
        with pytest.raises(ConfigError, match=words):
            measure(toy, **(first | change))
    with torch.no_grad():
        toy.second.bias.add_(1e-3)
    with pytest.raises(ConfigError, match=r"resume_dir: .* made with weights"):
        measure(toy, **first)


def test_damaged_row_file_is_named(tmp_path):
    toy = Toy(width=8)
    measure(toy, resume_dir=tmp_path)
    path = tmp_path / "gradient_000350_1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ConfigError, match="gradient_000350_1"):
        measure(toy, resume_dir=tmp_path)
    write_tensors(path, {"gradient": torch.zeros(3)}, {})
    with pytest.raises(ConfigError, match=r"must hold gradient as torch.float32 of shape \[288\]"):
        measure(toy, resume_dir=tmp_path)


def test_resume_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="resume_dir: must be a folder"):
        measure(Toy(width=8), resume_dir=tmp_path / "state")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_names_its_timestep_and_keeps_the_rest(tmp_path, bad):
    toy = Toy(width=8)
    whole = measure(toy)

    def broken(timestep, half):
        factor = bad if (timestep, half) == (640, 1) else 1.0
        return factor * toy.loss(timestep, half)

    with pytest.raises(NonFiniteGradientError, match=r"at timestep 640 \(half 1\)") as caught:
        task_affinity(
            broken,
            parameters=toy.parameters(),
            num_timesteps=T,
            timesteps=GRID,
            resume_dir=tmp_path,
        )
    assert isinstance(caught.value, ConfigError)
    assert (caught.value.timestep, caught.value.half) == (640, 1)
    assert caught.value.partial.timesteps == GRID[:6]
    torch.testing.assert_close(caught.value.partial.plain, whole.plain[:6, :6])
    toy.calls.clear()
    assert torch.equal(measure(toy, resume_dir=tmp_path).half_dots, whole.half_dots)
    assert toy.calls[0] == (640, 1)


def test_memory_of_a_sketch_is_that_of_n_times_m_floats():
    toy = Toy()
    store = GradientStore(
        GRID,
        num_parameters=51_016,
        sketch=HadamardSketch(51_016, sketch_dim=256, seed=0),
        device=torch.device("cpu"),
        folder=None,
        identity={},
        memory_budget_mb=None,
        sharded=False,
    )
    for timestep in GRID:
        for half in (0, 1):
            (gradient,) = torch.autograd.grad(toy.loss(timestep, half), toy.first.weight)
            store.put(timestep, half, torch.nn.functional.pad(gradient.flatten(), (0, 25_516)))
    assert sum(each.nbytes for each in store.gradients.values()) == len(GRID) * 256 * 4


def test_sketch_is_within_its_error_of_exact():
    toy, m = Toy(), 256
    exact, sketched = measure(toy), measure(toy, sketch_dim=m, seed=1)
    error = (sketched.plain - exact.plain).abs()
    assert 0 < error.max() <= 4 / m**0.5
    off = ~torch.eye(len(GRID), dtype=torch.bool)
    in_units = (error / sketched.sketch_standard_error)[off]
    assert 0.3 < in_units.square().mean().sqrt() < 2
    assert torch.equal(exact.sketch_standard_error, torch.zeros_like(exact.plain))


def test_unreliable_gradients_are_warned_about():
    toy = Toy(width=8, num_images=2)
    with pytest.warns(AffinityReliabilityWarning, match=r"below 0.8 at \d+ of 10 .* timestep"):
        measure(toy, warn_below=0.8)

    def same_halves(timestep, half):
        return toy.loss(timestep, 0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task_affinity(same_halves, parameters=toy.parameters(), num_timesteps=T, timesteps=GRID)


def test_gradient_of_zero_has_cosine_zero_with_others():
    toy = Toy(width=8)
    result = task_affinity(
        lambda t, half: toy.loss(t, half) * (t != 90),
        parameters=toy.parameters(),
        num_timesteps=T,
        timesteps=GRID,
        warn_below=-1.0,
    )
    assert result.plain[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert result.reliability[2] == 0
    assert result.corrected[2].isnan().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timesteps": (5, 5)}, r"timesteps: must increase within 0 .. 999, found \[5, 5\]"),
        ({"timesteps": (-1, 5)}, "timesteps"),
        ({"timesteps": (0, 1000)}, "timesteps"),
        ({"timesteps": ()}, "timesteps"),
        ({"num_timesteps": 0, "timesteps": None}, "num_timesteps"),
        ({"sketch_dim": 100}, "sketch_dim: must be a power of two, 2 or more, found 100"),
        ({"sketch_dim": 1}, "sketch_dim"),
        ({"log_snr": torch.zeros(10)}, r"log_snr: .* 1000 timesteps, found shape \(10,\)"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        measure(Toy(width=8), **settings)


def test_bad_losses_are_named():
    toy = Toy(width=8)

    def run(loss, parameters):
        return task_affinity(loss, parameters=parameters, num_timesteps=T, timesteps=GRID)

    with pytest.raises(ConfigError, match="parameters: must have at least one"):
        run(toy.loss, [toy.frozen])
    with pytest.raises(ConfigError, match=r"scalar .* found shape \(3,\)"):
        run(lambda t, half: toy.loss(t, half).expand(3), toy.parameters())
    with pytest.raises(ConfigError, match="requires_grad=False"):
        run(lambda t, half: toy.loss(t, half).detach(), toy.parameters())
    with pytest.raises(ConfigError, match="no term"):
        run(lambda t, half: [], toy.parameters())


def test_a_disk_too_small_for_the_gradients_is_refused_before_any_is_computed(tmp_path):
    with pytest.raises(ConfigError, match=r"resume_dir: must have \d+\.0 GiB .* GiB free"):
        GradientStore(
            (0, 5),
            num_parameters=2**50,  # four gradients of 4 PiB
            sketch=None,
            device=torch.device("cpu"),
            folder=tmp_path,
            identity={"network": "large"},
            memory_budget_mb=None,
            sharded=False,
        )
