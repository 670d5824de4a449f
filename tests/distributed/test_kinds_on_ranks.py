"""Unusual parameters, freezing and batch norm on two ranks: as in one process, or refused."""

import warnings

import lightning as L
import torch
from kinds_of_parameters import (
    BALANCERS,
    REFUSED,
    RIGHT,
    TASKS,
    B,
    K,
    assert_right,
    batch,
    losses_of,
)
from rank_processes import needs_unused_shards, run_ranks
from tiny_runs import PartlyUsed, TinyData, module, trainer
from torch import nn

from ant_lightning import ConfigError, ShardedStrategy, multitask_backward
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.local_parts import full_tensor
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients
from ant_lightning.balancing.reduction import default_reduction

METHODS = {
    "none": ("none", Loop, None),
    "uw": ("uw", Loop, None),
    "loop": ("pcgrad", Loop, ReducedTaskGradients),
    "low memory": ("pcgrad", LowMemory, None),
    "placed": ("pcgrad", OnePass, PlacedTaskGradients),
}
# Those that are laid out, cast or summed in another way than ordinary ones.
KINDS = (
    "stem cut to 3 channels",
    "last, every second column",
    "scale of every third number",
    "float32 among float64",
    "sparse gradient",
    "frozen",
)


class OnHalf:
    """A network whose tasks' samples are spread over two ranks, 5 and 7 of them."""

    def __init__(self, rank, network, name):
        self.method, self.engine, kind = METHODS[name]
        self.network, self.made = network, self.engine()
        mine = slice(0, 5) if rank == 0 else slice(5, B)
        self.tasks = TASKS[mine]
        self.losses = losses_of(network, batch()[mine], self.tasks)
        parameters = [p for p in network.parameters() if p.requires_grad]
        reduction = default_reduction()
        self.rows = kind and kind(K, parameters, reduction=reduction)

    def step(self):
        report = multitask_backward(
            self.losses,
            self.tasks,
            self.network.parameters(),
            BALANCERS[self.method](),
            num_tasks=K,
            engine=self.made,
            gradients=self.rows,
        )
        assert_right(self.network, report, tolerance=1e-6 if self.method == "uw" else 1e-12)


def every_kind(rank):
    for kind in KINDS:
        for name in METHODS:
            half = OnHalf(rank, RIGHT[kind](), name)
            try:
                half.step()
            except Exception as error:
                error.add_note(f"{kind}, {name}")
                raise


def every_refusal(rank):
    messages = []
    for make, _ in REFUSED.values():
        for name in METHODS:
            try:
                OnHalf(rank, make(), name).step()
            except ConfigError as error:
                messages.append(str(error))
    return messages


def freezing(rank):
    for name in METHODS:
        half = OnHalf(rank, RIGHT["ordinary"](), name)
        for frozen in ("conv", None, "linear"):
            for part, layer in half.network.named_children():
                layer.requires_grad_(part != frozen)
            half.step()


def on_two_ranks(rank):
    every_kind(rank)
    freezing(rank)
    return every_refusal(rank)


def test_two_ranks_are_right_or_both_refuse(tmp_path):
    first, second = run_ranks(on_two_ranks, 2, tmp_path)
    assert first == second
    words = [words for _, words in REFUSED.values() for _ in METHODS]
    assert len(first) == len(words)
    assert all(each in message for each, message in zip(words, first, strict=True))


class Switch(L.Callback):
    """Before step 2 freezes or thaws the blocks."""

    def __init__(self, thaw):
        self.thaw = thaw

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            pl_module.backbone.blocks.requires_grad_(self.thaw)


def switched(name, thaw, *, ranks=1, strategy=None):
    model = module(name)
    model.backbone.blocks.requires_grad_(not thaw)
    run = trainer(ranks=ranks, steps=4, strategy=strategy, callbacks=[Switch(thaw)])
    run.fit(model, datamodule=TinyData())
    return {n: full_tensor(p) for n, p in model.backbone.named_parameters()}


CASES = [
    (m, s, thaw)
    for m, s in (("uw", "ddp"), ("pcgrad", "ddp"), ("pcgrad", "fsdp2"))
    for thaw in (True, False)
]


def every_switch(rank):
    strategies = {"ddp": lambda: "ddp", "fsdp2": ShardedStrategy}
    return [switched(m, thaw, ranks=2, strategy=strategies[s]()) for m, s, thaw in CASES]


@needs_unused_shards
def test_freezing_on_two_ranks_is_as_in_one_process(tmp_path):
    ranks = run_ranks(every_switch, 2, tmp_path)
    for (method, strategy, thaw), *found in zip(CASES, *ranks, strict=True):
        one = switched(method, thaw)
        for weights in found:
            worst = max(float((weights[n] - one[n]).abs().max()) for n in one)
            assert worst < 1e-6, (method, strategy, thaw)


class Normed(PartlyUsed):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x, timesteps, labels=None):
        return super().forward(self.norm(x), timesteps, labels)


def batch_norm(rank, folder):
    found = {}
    for name in ("vanilla", "pcgrad"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "model.backbone: batch norm")
            model = module(name, backbone=Normed())
        run = trainer(ranks=2)
        run.fit(model, datamodule=TinyData())
        run.save_checkpoint(folder / f"{name}.ckpt")  # if the ranks agree
        found[name] = model.backbone.norm.state_dict()
    return found


def test_running_statistics_are_those_of_all_ranks(tmp_path):
    first, second = run_ranks(batch_norm, 2, tmp_path / "ranks", tmp_path)
    for name, state in first.items():
        assert int(state["num_batches_tracked"]) == 5, name
        for key, value in state.items():
            assert torch.equal(value, second[name][key])
            assert value.isfinite().all()
