"""The digits under flow matching and EDM, with an auxiliary term too: two ranks against one."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from rank_processes import needs_unused_shards, run_ranks
from tiny_fit import everything
from tiny_runs import trainer
from torch.distributed.fsdp import FSDPModule

from ant_lightning import EMA, Checkpoints, DigitsData, FeatureAlignment, ShardedStrategy
from ant_lightning.balancing.local_parts import full_tensor

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CASES = [
    ("sit", "uw", False),
    ("sit", "pcgrad", True),  # with an auxiliary term
    ("edm", "pcgrad", False),
]


def shipped(config, balancer, momentum=0.0):
    """The module of a shipped config at reduced width, with SGD."""
    model = yaml.safe_load((CONFIGS / f"digits/{config}.yaml").read_text())["model"]
    init = model["init_args"]
    init["seed"] = 3
    init["backbone"]["init_args"] |= {"hidden_size": 16, "depth": 1, "num_heads": 2}
    # Adam divides gradients that are 0 up to rounding by their size.
    sgd = {"lr": 0.05, "momentum": momentum}
    init["optimization"] = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": sgd}}
    part = yaml.safe_load((CONFIGS / f"balancer/{balancer}.yaml").read_text())["model"]
    init["tasks"] |= part["init_args"]["tasks"]
    init |= {name: each for name, each in part["init_args"].items() if name != "tasks"}
    if init["tasks"]["balancer"] is not None:
        init["tasks"]["balancer"].setdefault("init_args", {})["num_tasks"] = 5
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    settings = parser.parse_object({"model": model})
    torch.manual_seed(0)
    return parser.instantiate_classes(settings).model


def fit(config, balancer, aligned, ranks, strategy=None):
    """Three steps; the weights, and those of the head."""
    module = shipped(config, balancer)
    if aligned:
        sizes = {"width": 16, "feature_width": 3, "hidden_size": 8}
        patches = torch.nn.Conv2d(1, 3, 2, stride=2)
        module.auxiliary = FeatureAlignment(block="blocks.0", features=patches, **sizes)
        module.auxiliary.attach(module.backbone)
    run = trainer(ranks=ranks, steps=3, strategy=strategy)
    run.fit(module, datamodule=DigitsData(batch_size=20, seed=0))
    return {name: full_tensor(p.detach()).clone() for name, p in module.named_parameters()}


def fit_and_save(folder, config, balancer, *, ranks, resume=None):
    """Four steps of SGD with momentum; checkpoints after two and at the end."""
    checkpoints = Checkpoints(dirpath=folder, at_steps=[2], save_last=True)
    run = trainer(
        ranks=ranks,
        steps=4,
        callbacks=[EMA(decay=0.9), checkpoints],
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    module = shipped(config, balancer, momentum=0.9)
    run.fit(module, datamodule=DigitsData(batch_size=20, seed=0), ckpt_path=resume)


def fit_and_resume(folder, config, balancer):
    """The whole run on two ranks, and one that goes on from its second step."""
    fit_and_save(folder, config, balancer, ranks=2)
    resume = folder / "step_2.ckpt"
    fit_and_save(folder / "resumed", config, balancer, ranks=2, resume=resume)


def check_resumed(folder):
    """The checkpoints of both are equal to the last bit."""
    whole, resumed = (everything(folder / each / "last.ckpt") for each in ("", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):  # NaN where a balancer has no history yet
            message = f"{name}: {value}, resumed {resumed[name]}"
            torch.testing.assert_close(
                resumed[name], value, rtol=0, atol=0, equal_nan=True, msg=message
            )
        else:
            assert resumed[name] == value, name


def every_case(rank, folder):
    found = {case: fit(*case, ranks=2) for case in CASES}
    fit_and_resume(folder / "resume", "sit", "pcgrad")
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # torch >= 2.14
        found["sharded"] = fit(*CASES[1], ranks=2, strategy=ShardedStrategy())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_ranks(every_case, 2, folder, folder)


def check_equal(two_ranks, key, case):
    first, second = (found[key] for found in two_ranks)
    one = fit(*case, ranks=1)
    assert first.keys() == one.keys()
    assert any("head" in name for name in one) == case[2]
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        # Three steps of length 0.05 and a clipped norm of 1, with float32 sums in another order.
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=3 * 0.05 * 100 * 2**-24)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_train_as_one_process_does(two_ranks, case):
    check_equal(two_ranks, case, case)


@needs_unused_shards
def test_two_shards_train_as_one_process_does_with_an_auxiliary_term(two_ranks):
    check_equal(two_ranks, "sharded", CASES[1])


def test_sums_are_rounded_alike_in_a_resumed_run(two_ranks, folder):
    # From the second step on gradients travel in the order in which they have arrived.
    check_resumed(folder / "resume")
