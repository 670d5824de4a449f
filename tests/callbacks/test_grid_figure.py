"""The grid of generated and real images: its shape, size and places; axes that can be read."""

import io

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from grouped import grouped
from lightning import Trainer
from matplotlib.figure import Figure
from PIL import Image

from ant_lightning import (
    DDIM,
    CosineSchedule,
    DiffusersSampler,
    DiT,
    DiTModule,
    ODESampler,
    SampleGrid,
    ShapesData,
    TimestepClustering,
)
from ant_lightning.callbacks.axes_style import plain_log_axis, task_colors
from ant_lightning.callbacks.grid_figure import grid_columns, image_grid, sample_grid
from ant_lightning.callbacks.page_figure import stacked_page


def noise(n, c, *size):
    return np.random.default_rng(n).integers(0, 255, (n, c, *size), dtype=np.uint8)


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file)
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    ("num_images", "num_classes", "columns"),
    [(100, 10, 10), (100, 3, 9), (100, 2, 10), (100, 1, 10), (64, 1000, 8), (50, 0, 10), (1, 0, 1)],
)
def test_columns_make_about_a_square(num_images, num_classes, columns):
    assert grid_columns(num_images, num_classes) == columns
    rows = -(-num_images // columns)
    assert max(rows, columns) <= 2 * min(rows, columns)


@pytest.mark.parametrize(
    ("channels", "size", "num_classes"),
    [
        *((1, (8, 8), n) for n in (0, 1, 3, 10, 16, 20, 1000)),
        *((3, (32, 32), n) for n in (0, 10)),
        (3, (300, 200), 10),
    ],
)
def test_both_panels_are_legible_and_of_one_shape(channels, size, num_classes):
    generated, real = noise(60, channels, *size), noise(41, channels, *size)
    columns = grid_columns(60, num_classes)
    figure = sample_grid(generated, real, columns=columns, caption="step 3, DDIM")
    shapes = [axis.images[0].get_array().shape for axis in figure.axes]
    assert shapes[0] == shapes[1]
    stamp = shapes[0][1] // columns - 1
    assert 48 <= stamp <= 128
    # Each pixel of a panel is one of the picture, and no place of a missing image is coloured.
    picture = drawn(figure)
    for axis, images in zip(figure.axes, (generated, real), strict=True):
        left, bottom, _, height = axis.get_position().bounds
        x, y = round(left * picture.shape[1]), round((1 - bottom - height) * picture.shape[0])
        panel = picture[y : y + round(height * picture.shape[0]), x : x + shapes[0][1]]
        shown = axis.images[0].get_array().reshape(*shapes[0][:2], -1)  # matplotlib drops grey's 1
        expected = np.broadcast_to(shown, (*shapes[0][:2], 3))
        assert panel.shape == expected.shape
        assert np.abs(panel.astype(int) - expected).max() <= 1
        if max(size) <= 48:
            factor = stamp // size[1]
            assert np.array_equal(
                expected[: size[0] * factor : factor, 0][:, 0], images[0, 0, :, 0]
            )


def test_a_long_caption_stays_inside():
    caption = "step 1000, averaged weights, " + ", ".join(f"setting_{i}={i}" for i in range(20))
    figure = sample_grid(noise(1, 1, 8, 8), noise(1, 1, 8, 8), columns=1, caption=caption)
    picture = drawn(figure)
    assert (picture[:, :3] == 255).all()
    assert (picture[:, -3:] == 255).all()
    assert (picture[:3] == 255).all()


def test_missing_images_are_white():
    grid = image_grid(np.zeros((3, 1, 2, 2), np.uint8), columns=2, rows=3)
    assert grid.shape == (9, 6, 1)
    assert (grid[3:5, 3:5] == 255).all()
    assert (grid[6:] == 255).all()


@pytest.mark.parametrize(
    "values", [[0.19, 0.21], [0.2, 0.2], [0.02, 0.3], [1e-6, 10.0], [0.20175, 0.2018], [3e4, 2e5]]
)
def test_ticks_are_plain_numbers(values):
    figure = Figure()
    axis = figure.subplots()
    axis.plot(values)
    plain_log_axis(axis, [*values, 0.0, float("nan")])
    figure.draw_without_rendering()
    low, high = sorted(axis.get_ylim())
    shown = [t for t in axis.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    texts = [tick.label1.get_text() for tick in shown]
    assert len(texts) >= 2
    assert len(set(texts)) == len(texts)
    assert all("$" not in text and len(text) <= 7 for text in texts), texts
    assert not any(tick.label1.get_text() for tick in axis.yaxis.get_minor_ticks())


@pytest.mark.parametrize("num_tasks", [1, 5, 10, 16, 20, 30])
def test_colours_of_tasks_are_distinct(num_tasks):
    colors = np.array(task_colors(num_tasks))[:, :3]
    assert len(colors) == num_tasks
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 9 * np.eye(num_tasks)
    assert distances.min() > (0.14 if num_tasks <= 20 else 0.05)


def test_headings_of_a_page_are_numbered_and_whole(tmp_path):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "a.png")
    pictures = dict.fromkeys(
        ("How near are they, and are they copies?", "Second"), tmp_path / "a.png"
    )
    page = stacked_page(pictures)
    assert page.shape[1] > 300
    assert (page[:30, -8:] > 200).all()  # nothing is written into the margin
    assert not np.array_equal(page[:44], page[64:108])


def test_a_long_line_of_numbers_does_not_widen_the_page(tmp_path):
    Image.new("RGB", (800, 20), "red").save(tmp_path / "a.png")
    line = "step 120000:  FID (ShapesFeatures) 339.5"
    widths = [
        stacked_page({"A": tmp_path / "a.png"}, numbers=line + more).shape[1]
        for more in (",", ",  precision 0.7333" * 4, ",  precision 0.7333" * 5)
    ]
    assert widths[0] == 824
    assert max(widths[1:]) <= 890


def test_the_caption_says_what_was_chosen_of_a_sampler():
    assert DDIM(num_steps=25).brief() == "DDIM(num_steps=25)"
    chosen = ODESampler(num_steps=4, method="euler")
    assert chosen.brief() == "ODESampler(num_steps=4, method=euler)"
    wrapped = DiffusersSampler(EulerDiscreteScheduler(), num_steps=7)
    assert wrapped.brief() == "DiffusersSampler(scheduler=EulerDiscreteScheduler, num_steps=7)"


@pytest.mark.parametrize(("labelled", "side"), [(False, 9), (True, 8)])
def test_as_many_are_generated_as_are_held_out_in_whole_rows(labelled, side, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ant_lightning.callbacks.sample_grid.sample_grid",
        lambda generated, real, **_: drawn.append((len(generated), len(real))) or Figure(),
    )
    data = ShapesData(image_size=8, num_images=12, num_held_out=10, num_classes=4, batch_size=4)
    network = DiT(input_size=8, patch_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=1,
                  num_classes=4 * labelled)  # fmt: skip
    settings = grouped(
        schedule=CosineSchedule(100),
        variance_type="learned_range",
        clustering=TimestepClustering(num_tasks=2),
        sampler=DDIM(num_steps=2),
    )
    Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[SampleGrid()],
        enable_progress_bar=False, limit_val_batches=1,
    ).validate(DiTModule(network, **settings), data, verbose=False)  # fmt: skip
    assert drawn == [(side, side)]
