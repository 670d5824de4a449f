"""LoRA and text conditions on two ranks, under DDP and FSDP2, against one process."""

import pytest
import torch
from diffusers_networks import SHAPES, backbone
from rank_processes import needs_unused_shards, run_ranks
from tiny_runs import METHODS, ROUNDING, TinyData, largest_difference, module, trainer

from ant_lightning import (
    EMA,
    Batch,
    Checkpoints,
    FlowMatching,
    ImageDataset,
    LoRA,
    MultiTaskDiffusion,
    ShardedStrategy,
    SNRClustering,
    Tasks,
)
from ant_lightning.balancing.local_parts import full_tensor, is_sharded

ADAPTER = LoRA(r=2, alpha=6)


class Told(ImageDataset):
    """Latents of noise with embeddings of captions."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(n)
        self.images = torch.randn(n, 4, 4, 4, generator=generator).tanh()
        self.told = {k: torch.randn(n, *s, generator=generator) for k, s in SHAPES.items()}

    def __len__(self):
        return len(self.images)

    def conditions(self, indices):
        return {name: each[list(indices)] for name, each in self.told.items()}

    def load(self, indices, *, epoch):
        rows = torch.tensor(indices)
        return Batch(self.images[rows], torch.zeros_like(rows), rows, self.conditions(indices))


class ToldData(TinyData):
    image_shape = (4, 4, 4)
    num_classes = 0

    @property
    def null_condition(self):
        return {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}

    def prepare(self):
        return Told(60), Told(4)


def run(ranks, method, folder=None, *, strategy=None, steps=3, resume=None, engine="auto"):
    made = module(
        method,
        kind=MultiTaskDiffusion,
        backbone=backbone("SD3Transformer2DModel"),
        process=FlowMatching(),
        tasks=Tasks(SNRClustering(3), balancer=METHODS[method](), engine=engine),
        adapter=ADAPTER,
        class_dropout=0.4,
        accumulate_grad_batches=1,
    )
    rows = []

    def keep(network, args):
        _, t, told = args
        if torch.is_grad_enabled():  # an evaluation drops nothing
            parts = (t[:, None], *(each.flatten(1) for each in told.values()))
            rows.append(torch.cat([part.double() for part in parts], 1))

    made.backbone.register_forward_pre_hook(keep)
    ema = EMA(decay=0.5)
    saves = [Checkpoints(dirpath=folder, at_steps=[2], save_last=True)] if folder else []
    fit = trainer(
        ranks=ranks,
        steps=steps,
        callbacks=[ema, *saves],
        strategy=strategy and ShardedStrategy(),
        enable_checkpointing=folder is not None,
    )
    base = {n: p.detach().clone() for n, p in made.backbone.named_parameters()}
    fit.fit(made, datamodule=ToldData(batch_size=8), ckpt_path=resume)
    now = dict(made.backbone.named_parameters())
    assert is_sharded(now.values()) == (strategy is not None)
    now = {name: full_tensor(p.detach()) for name, p in now.items()}
    averages = ema.state_dict()["averages"]
    trained = {n: p for n, p in now.items() if "lora_" in n}
    assert trained.keys() == averages.keys()
    assert all(torch.equal(now[name], base[name]) for name in now.keys() - trained.keys())
    return {
        "weights": trained,
        "averages": {name: full_tensor(each) for name, each in averages.items()},
        "rows": set(map(tuple, torch.cat(rows).tolist())),
        "stored": [n for n in made.state_dict() if n.startswith("backbone.")],
    }


RUNS = {"pcgrad": {"engine": "one_pass"}, "nash": {"engine": "loop"}}
NO_SHARDS = needs_unused_shards.args[0]


def every_run(rank, folder):
    """All runs of this file, as importing diffusers takes longer than they do."""
    whole = {name: run(2, name, folder / name, **settings) for name, settings in RUNS.items()}
    ddp = whole, run(2, "pcgrad", resume=folder / "pcgrad" / "step_2.ckpt", **RUNS["pcgrad"])
    if NO_SHARDS:
        return ddp, None
    whole = run(2, "pcgrad", folder / "fsdp2", strategy="fsdp2")
    step_2 = folder / "fsdp2" / "step_2.ckpt"
    return ddp, (whole, run(2, "pcgrad", resume=step_2, strategy="fsdp2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_ranks(every_run, 2, folder / "ranks", folder, limit=180)


def check_equal(ranks, one):
    for found in ranks:
        for kind in ("weights", "averages"):
            assert largest_difference(found[kind], one[kind]) < ROUNDING
            assert largest_difference(found[kind], ranks[0][kind]) == 0
    assert largest_difference(one["averages"], one["weights"]) > 10 * ROUNDING


@pytest.mark.parametrize("method", RUNS)
def test_two_ranks_train_an_adapter_and_drop_captions_as_one_process_does(two_ranks, method):
    ranks, one = [ddp[0][method] for ddp, _ in two_ranks], run(1, method, **RUNS[method])
    check_equal(ranks, one)
    # Each image has the same time and text, or the null of no text, on whichever rank it is.
    seen = {row for found in ranks for row in found["rows"]}
    assert seen == one["rows"]
    dropped = [row for row in seen if set(row[1:]) == {0.5}]
    assert len(seen) == 3 * 8
    assert 0 < len(dropped) < len(seen)


def test_checkpoints_of_two_ranks_hold_the_adapter_and_resume_to_the_last_bit(two_ranks):
    for (whole, resumed), _ in two_ranks:
        stored = set(whole["pcgrad"]["stored"])
        assert stored == {f"backbone.{name}" for name in whole["pcgrad"]["weights"]}
        for kind in ("weights", "averages"):
            assert largest_difference(resumed[kind], whole["pcgrad"][kind]) == 0


@needs_unused_shards
def test_two_sharded_ranks_train_an_adapter_as_one_process_does(two_ranks, folder):
    whole = [sharded[0] for _, sharded in two_ranks]
    check_equal(whole, run(1, "pcgrad"))
    for _, (exact, resumed) in two_ranks:
        for kind in ("weights", "averages"):
            assert largest_difference(resumed[kind], exact[kind]) == 0
    with pytest.warns(UserWarning, match="number of ranks: the checkpoint has 2, this run 1"):
        one = run(1, "pcgrad", folder / "one", resume=folder / "fsdp2" / "step_2.ckpt")
    check_equal([one], whole[0])
