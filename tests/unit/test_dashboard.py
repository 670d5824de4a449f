"""What a reader of TensorBoard finds: charts in order, and a sentence for each."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tiny_digits import module, trainer

from ant_lightning.callbacks import ConflictMonitor, Dashboard
from ant_lightning.data import DigitsData


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder)
    run = trainer(
        folder,
        Dashboard(),
        ConflictMonitor(log_every_n_steps=1, probe_every_n_steps=1),
        steps=1,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=1,
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
        "2 quality",
        "3 tasks",
        "4 conflict",
    ]
    assert [chart.title for chart in layout.category[1].chart] == [
        "loss of each task",
        "effective weight of each task",
    ]
    tags = {t.strip("^$") for t in layout.category[1].chart[1].multiline.tag}
    assert tags == {f"train/task_{i}/weight" for i in range(3)}
    # Charts of tasks and conflict name scalars that are really logged.
    logged = set(events.Tags()["scalars"])
    for category in layout.category[1:]:
        for chart in category.chart:
            assert {t.strip("^$") for t in chart.multiline.tag} <= logged, chart.title


def test_the_guide_has_a_sentence_for_everything(events):
    text = events.Tensors("0_how_to_read/text_summary")[0].tensor_proto.string_val[0].decode()
    order = ["1_samples/grid", "*FID*", "*loss of each task*", "*effective weight", "4_conflict/"]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert "vanilla" in text
    assert "task 2 = " in text
