"""What a reader of TensorBoard finds: charts in order, and a sentence for each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tiny_digits import module, trainer

from ant_lightning import ConflictMonitor, Dashboard, DigitsData, SampleGrid, TaskAffinity


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder)
    run = trainer(
        folder,
        ConflictMonitor(log_every_n_steps=1, probe_every_n_steps=1),
        SampleGrid(num_images=10),
        Dashboard(),
        steps=2,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=2,
        limit_val_batches=1,
    )
    run.fit(module(), DigitsData(batch_size=30))
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    return found


def test_the_layout_asks_the_questions_in_order(events):
    content = events.SummaryMetadata("custom_scalars__config__")
    assert content.plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "1 samples",
        "2 quality",
        "3 tasks",
        "4 conflict",
    ]
    # Each chart has its sentence, which the page shows above it.
    assert [chart.title.split(": ")[0] for chart in layout.category[2].chart] == [
        "training loss of each task",
        "held-out loss of each task",
        "effective weight of each task",
    ]
    assert layout.category[2].chart[2].title.endswith("Equal lines are plain averaging.")
    tags = {t.strip("^$") for t in layout.category[2].chart[2].multiline.tag}
    assert tags == {f"train/task_{i}/weight" for i in range(3)}
    # Charts but those of quality name scalars that are really logged.
    logged = set(events.Tags()["scalars"])
    for category in (layout.category[0], *layout.category[2:]):
        for chart in category.chart:
            assert {t.strip("^$") for t in chart.multiline.tag} <= logged, chart.title


def test_the_guide_has_a_sentence_for_everything(events):
    text = events.Tensors("0_how_to_read/text_summary")[0].tensor_proto.string_val[0].decode()
    order = [
        "1_samples/grid",
        "*FID*",
        "*training loss of each task*",
        "*effective weight",
        "4_conflict/",
    ]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert "vanilla" in text
    assert "task 2 = " in text


def test_one_page_has_the_pictures_in_order(events):
    assert "0_page/overview" in events.Tags()["images"]
    assert min(events.Tags()["images"]) == "0_page/overview"
    folder = Path(events.path)
    with Image.open(folder / "0_page_overview.png") as file:
        page = np.asarray(file)
    drawn = ["1_samples_grid", "3_tasks_losses_and_weights", "4_conflict_gradient_cosines"]
    top = 28  # losses and scores
    assert (page[4:top] < 100).any()
    for name in drawn:
        with Image.open(folder / f"{name}.png") as file:
            width = min(file.width, 866)  # wider ones are scaled down
            size = (width, round(file.height * width / file.width))
            shown = file.convert("RGB")
            picture = np.asarray(
                shown if file.width == width else shown.resize(size, Image.Resampling.LANCZOS)
            )
        height = len(picture)
        top += 44  # its heading
        left = (page.shape[1] - width) // 2
        assert np.array_equal(page[top : top + height, left : left + width], picture), name
        assert (page[top - 44 : top] < 100).any(), name
        top += height
    assert top == len(page)
    assert page.shape[1] <= 890  # TensorBoard shows no more in a window of 1280 pixels


def test_an_evaluation_draws_the_cosines_of_a_training_without_one(tmp_path):
    before = ConflictMonitor(log_every_n_steps=1, probe_every_n_steps=1)
    run = trainer(tmp_path, before, steps=2, limit_val_batches=0)
    run.fit(module(), DigitsData(batch_size=30))
    run.save_checkpoint(tmp_path / "last.ckpt")
    picture = tmp_path / "4_conflict_gradient_cosines.png"
    assert not picture.exists()
    run = trainer(tmp_path, ConflictMonitor(), limit_val_batches=1)
    run.validate(module(), DigitsData(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert picture.exists()


def test_the_page_of_an_evaluation_has_what_the_run_drew_before(tmp_path):
    Image.new("RGB", (100, 20), "red").save(tmp_path / "4_conflict_gradient_cosines.png")
    run = trainer(tmp_path, SampleGrid(num_images=10), Dashboard(), limit_val_batches=1)
    run.validate(module(), DigitsData(), verbose=False)
    with Image.open(tmp_path / "0_page_overview.png") as page:
        assert page.getpixel((page.width // 2, page.height - 10)) == (255, 0, 0)
        assert page.height > 2 * 44 + 20 + 100  # below the grid of this command


def test_pictures_that_are_not_on_the_page_make_none(tmp_path):
    measure = TaskAffinity(num_points=3, num_images=4)
    run = trainer(tmp_path, measure, Dashboard(), limit_val_batches=1)
    run.validate(module(), DigitsData(), verbose=False)
    assert list(tmp_path.glob("*affinity*.png"))
    assert not (tmp_path / "0_page_overview.png").exists()


def test_the_curves_in_a_checkpoint_are_three_tensors_and_early_ones_a_list(tmp_path):
    before, after = ConflictMonitor(log_every_n_steps=1), ConflictMonitor()
    run = trainer(tmp_path, before, steps=3, limit_val_batches=0)
    run.fit(module(), DigitsData(batch_size=30))
    curves = before.state_dict()["history"]
    assert curves["steps"].tolist() == [1, 2, 3]
    assert curves["losses"].shape == curves["weights"].shape == (3, 3)
    early = [(i + 1, curves["losses"][i], curves["weights"][i]) for i in range(3)]
    for given in (curves, early):
        after.load_state_dict({"history": given})
        again = after.state_dict()["history"]
        assert all(torch.equal(again[name], curves[name]) for name in curves)
    after.load_state_dict(ConflictMonitor().state_dict())
    assert len(after.state_dict()["history"]["steps"]) == 0
