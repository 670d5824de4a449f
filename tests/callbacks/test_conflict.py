"""What `ConflictMonitor` logs of each task: like names mean like things."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_digits import module, trainer

from ant_lightning import ConflictMonitor, DigitsData, DiT, MinSNR
from ant_lightning.balancing.backward import BackwardReport
from ant_lightning.callbacks.conflict import _Step

STEPS, K = 3, 3


class Rows(CSVLogger):
    """Keeps what is logged, by step."""

    def __init__(self, folder):
        super().__init__(folder)
        self.kept = {}

    def log_metrics(self, metrics, step=None):
        self.kept.setdefault(step, {}).update(metrics)


class Counting(ConflictMonitor):
    """Keeps the numbers of images of the tasks in each step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.counts.append(pl_module.last_report.num_samples)
        super().on_train_batch_end(trainer, pl_module, *args)


def logged(folder, *, every=1, **settings):
    rows = Rows(folder)
    monitor = Counting(log_every_n_steps=every, probe_every_n_steps=0)
    log = {"logger": rows, "log_every_n_steps": 1}
    run = trainer(folder, monitor, steps=STEPS, limit_val_batches=0, **log)
    run.fit(module(**settings), DigitsData(batch_size=30))
    return rows.kept, torch.stack(monitor.counts)


def of_tasks(row, name):
    values = torch.tensor([row[f"train/task_{task}/{name}"] for task in range(K)])
    return values.double().nan_to_num()  # NaN of a task without an image


@pytest.mark.parametrize("weighting", [None, MinSNR()])
@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_a_task_has_the_parts_of_loss_and_of_objective(tmp_path, variance_type, weighting):
    learned = variance_type == "learned_range"
    network = DiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1,
        num_classes=10, learn_sigma=learned,
    )  # fmt: skip
    settings = {"variance_type": variance_type, "loss_weighting": weighting}
    rows, counts = logged(tmp_path, backbone=network, **settings)
    assert sorted(rows) == [1, 2, 3]
    for row, count in zip(rows.values(), counts, strict=True):
        losses, objectives = of_tasks(row, "loss"), of_tasks(row, "objective")
        share = count / count.sum()
        # Vanilla training: the mean over images is that over tasks, each by its images.
        assert float(losses @ share) == pytest.approx(float(row["train/loss"]), rel=1e-5)
        assert float(objectives @ share) == pytest.approx(float(row["train/objective"]), rel=1e-5)
        same = torch.allclose(losses, objectives, rtol=1e-5)
        assert same is (weighting is None and not learned)


def test_means_are_over_the_images_since_the_last_log(tmp_path):
    each, counts = logged(tmp_path / "each")
    at_end, _ = logged(tmp_path / "end", every=STEPS)
    losses = torch.stack([of_tasks(row, "loss") for row in each.values()])
    mean = (losses * counts).sum(0) / counts.sum(0)
    torch.testing.assert_close(of_tasks(at_end[STEPS], "loss"), mean, rtol=1e-5, atol=0)
    assert not any("task" in name for step in (1, 2) for name in at_end[step])


def test_draws_by_importance_count_by_their_importance():
    """The mean over the density's own draws, from others: `sum(w e) / sum(w)` of each task."""
    tasks, importance = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 3.0, 1.0, 1.0])
    errors, whole = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([7.0, 8.0]).double()
    report = BackwardReport(
        finite=True, objective=whole.sum(), task_losses=whole, task_weights=whole,
        num_samples=torch.tensor([2.0, 2.0]).double(), grad_norm=whole[0], aux=errors,
    )  # fmt: skip
    monitor = ConflictMonitor()
    monitor._window.append(_Step(report, tasks, importance))
    means = monitor._means()
    assert means["loss"].tolist() == [1.75, 4.0]
    assert means["objective"].tolist() == [7.0, 8.0]
