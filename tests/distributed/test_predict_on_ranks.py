"""Two ranks draw into one place: they go on together, or refuse together."""

import numpy as np
import pytest
from rank_processes import run_ranks
from tiny_runs import TinyData, module, trainer

from ant_lightning import DDIM, SampleWriter
from ant_lightning.errors import FileError


def predict(ranks, num_images, *, seed=7, limit=None, **where):
    settings = {} if limit is None else {"limit_predict_batches": limit}
    writer = SampleWriter(num_images=num_images, batch_size=1, **where)
    model = module("vanilla", sampler=DDIM(num_steps=2), seed=seed)
    run = trainer(ranks=ranks, callbacks=[writer], **settings)
    run.predict(model, TinyData(), return_predictions=False)


def drawn(rank, folder, ranks):
    """What becomes of a place that is begun, left, finished, and asked for with another seed."""
    refused = []
    places = {"folder": str(folder / "images"), "npz": str(folder / "all.npz")}
    for kind, path in places.items():
        where = {kind: path}
        predict(ranks, 7, limit=3 if ranks == 2 else 6, **where)  # image 6 is missing
        for _ in range(2):  # unfinished, then finished; rank 1 has nothing to draw
            with pytest.raises(FileError) as error:
                predict(ranks, 7, seed=8, **where)
            refused.append(str(error.value))
            predict(ranks, 7, **where)
    return refused


def test_two_ranks_go_on_or_refuse_as_one_does(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        folder.mkdir()
    for refused in [drawn(0, one, 1), *run_ranks(drawn, 2, tmp_path / "ranks", two, 2)]:
        assert len(refused) == 4
        assert all("made with seed 7, and this run has 8" in line for line in refused)
    assert np.array_equal(np.load(one / "all.npz")["arr_0"], np.load(two / "all.npz")["arr_0"])
    names = sorted(p.name for p in (one / "images").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(7)), "identity.json"]
    for name in names:
        assert (one / "images" / name).read_bytes() == (two / "images" / name).read_bytes()
