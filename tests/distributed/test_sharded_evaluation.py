"""Evaluation and sampling of a backbone that stays sharded while ranks have unequal work."""

import lightning as L
import numpy as np
import pytest
import torch
from rank_processes import needs_unused_shards, run_ranks
from test_callbacks_on_ranks import Projection
from tiny_runs import TinyData, module, trainer

from ant_lightning import (
    DDIM,
    EDM,
    EMA,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    DiT,
    FlowMatching,
    GenerationMetrics,
    MultiTaskDiffusion,
    NegativeTransferGap,
    SampleGrid,
    SampleWriter,
    ShardedStrategy,
    SNRClustering,
    TaskAffinity,
    Tasks,
    TransferMatrix,
)
from ant_lightning.balancing.local_parts import is_sharded
from ant_lightning.data.dataset import TensorImages

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "num_heads": 2}


class Uneven(TinyData):
    """19 held-out images: of 2 ranks that take 9 at once, one needs two batches."""

    def __init__(self):
        super().__init__(batch_size=18)

    def prepare(self):
        train, held_out = super().prepare()
        return train, TensorImages(held_out.images[:19], held_out.labels[:19])


def network():
    torch.manual_seed(0)
    net = DiT(**SIZES, depth=3, num_classes=3)
    with torch.no_grad():  # adaLN-Zero starts with an output of 0
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return net


class Gathered(L.Callback):
    """The largest share of the backbone that this rank holds while a block or the head runs."""

    def __init__(self):
        self.largest = 0

    def setup(self, trainer, pl_module, stage):
        backbone = pl_module.backbone
        for unit in [*backbone.blocks, backbone.final_layer]:
            unit.register_forward_pre_hook(lambda *_: self.look(backbone))

    def look(self, backbone):
        whole = sum(p.numel() for p in backbone.parameters() if not is_sharded([p]))
        self.largest = max(self.largest, whole / sum(p.numel() for p in backbone.parameters()))


def evaluated(rank, folder, ranks):
    """Losses of the averages in validations while training, scores in a test, and drawn images."""
    gathered = Gathered()
    cache = str(folder / f"cache_{ranks}")
    metrics = GenerationMetrics(
        Projection(), num_images=21, batch_size=5, cache_dir=cache, every_n_epochs=9
    )
    ema = EMA(decay=0.5, warmup=False)
    sharded = ranks > 1
    settings = {"ranks": ranks, "default_root_dir": folder / str(ranks)}

    def strategy():
        return ShardedStrategy() if sharded else None

    model = module("pcgrad", backbone=network(), sampler=DDIM(num_steps=2))
    run = trainer(
        steps=2,
        callbacks=[ema, gathered, metrics, SampleGrid(num_images=3)],
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        strategy=strategy(),
        **settings,
    )
    run.fit(model, Uneven())
    assert is_sharded(model.backbone.parameters()) == sharded
    fitted = float(run.callback_metrics["val/loss"])
    run.test(model, Uneven(), verbose=False)
    writer = SampleWriter(num_images=9, batch_size=2, npz=str(folder / f"{ranks}.npz"))
    drawing = trainer(callbacks=[ema, writer], strategy=strategy(), **settings)
    drawing.predict(model, Uneven(), return_predictions=False)
    # The ranks ask for unequal numbers of images, and one for none.
    with model.uneven_calls():
        drawn = [model.sample([i]) for i in range(rank)] if sharded else [model.sample(1)]
    # An error inside the context leaves nothing behind that the next pass would wait for.
    with pytest.raises(ZeroDivisionError), model.uneven_calls():
        raise ZeroDivisionError
    assert not model.uneven_calls.begun
    assert model.sample(rank + 1).isfinite().all()
    return {
        "fit": {"val/loss": fitted},
        "test": {name: float(v) for name, v in run.callback_metrics.items()},
        "gathered": gathered.largest,
        "images": np.load(folder / f"{ranks}.npz")["arr_0"],
        "drawn": torch.cat(drawn) if drawn else torch.empty(0, 1, 4, 4),
    }


@needs_unused_shards
def test_evaluation_never_gathers_the_backbone_and_equals_that_of_one_process(tmp_path):
    one = evaluated(0, tmp_path, 1)
    every = run_ranks(evaluated, 2, tmp_path / "two", tmp_path, 2, limit=180)
    sizes = [sum(p.numel() for p in block.parameters()) for block in network().blocks]
    total = sum(p.numel() for p in network().parameters())
    for rank, found in enumerate(every):
        # The rest of the network and one block of three.
        assert 0 < found["gathered"] <= 1 - 2 * sizes[0] / total
        for name in ("fit", "test"):
            assert found[name].keys() == one[name].keys()
            for key, value in one[name].items():
                np.testing.assert_allclose(found[name][key], value, rtol=1e-3, err_msg=key)
        # A pixel that lies between two of 256 values may be rounded to either.
        difference = found["images"].astype(int) - one["images"].astype(int)
        assert np.abs(difference).max() <= 1
        torch.testing.assert_close(found["drawn"], one["drawn"][:rank], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "process", [DiscreteDiffusion(CosineSchedule()), FlowMatching(), EDM()], ids=type
)
def test_a_padding_pass_is_one_valid_call_of_the_backbone(process):
    """Of any process: at a noise level that it has."""
    backbone, calls = DiT(**SIZES, depth=1, num_classes=3, learn_sigma=False), []
    backbone.register_forward_hook(lambda *call: calls.append(call))
    MultiTaskDiffusion(backbone, process=process, tasks=Tasks(SNRClustering(3)))._padding()
    ((_, (x, times, labels), output),) = calls
    assert [len(each) for each in (x, times, labels)] == [1, 1, 1]
    assert output.isfinite().all()
    assert times.isfinite().all()


@pytest.mark.parametrize(
    "callback",
    [
        TaskAffinity(num_points=2, num_images=2),
        TransferMatrix(num_images=2),
        NegativeTransferGap(by_samples=["a.ckpt"]),
    ],
)
def test_what_needs_whole_weights_is_refused(callback):
    run = trainer(strategy=ShardedStrategy(), callbacks=[callback], limit_val_batches=1)
    words = f"trainer.strategy: must not shard the backbone for {type(callback).__name__}"
    try:
        with pytest.raises(ConfigError, match=words):
            run.validate(module("vanilla"), TinyData())
    finally:  # other tests must not see the process group that the strategy made
        torch.distributed.destroy_process_group()
