"""FSDP2 through the real Trainer: training, averages, evaluation and checkpoints."""

import pytest
import torch
from rank_processes import needs_unused_shards, run_ranks
from tiny_runs import METHODS, ROUNDING, K, TinyData, largest_difference, module, sgd, trainer

from ant_lightning import (
    EMA,
    Checkpoints,
    ConfigError,
    GradNorm,
    MuonAdamW,
    MuonGroups,
    NamedGroups,
    ShardedStrategy,
)
from ant_lightning.balancing.local_parts import full_tensor, is_sharded


def run(ranks, method, folder=None, *, resume=None, steps=5, sharded=True, **settings):
    """Train and validate; what the run ends with."""
    strategy = ShardedStrategy(**settings.pop("strategy", {})) if sharded else None
    precision = settings.pop("precision", "32-true")
    batch_size = settings.pop("batch_size", 20)
    model = module(method, **settings)
    ema = EMA(decay=0.9, lengths=[0.1], snapshot_every=1)
    callbacks = [ema]
    if folder is not None:
        callbacks.append(
            Checkpoints(dirpath=folder, every_n_train_steps=3, save_last=True, at_steps=[3])
        )
    fit = trainer(
        ranks=ranks,
        steps=steps,
        callbacks=callbacks,
        precision=precision,
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_checkpointing=folder is not None,
        strategy=strategy,
    )
    fit.fit(model, datamodule=TinyData(batch_size=batch_size), ckpt_path=resume)
    parameters = dict(model.backbone.named_parameters())
    assert is_sharded(parameters.values()) == sharded
    assert fit.validate_loop.inference_mode != sharded
    state = ema.state_dict()
    kinds = {"decay": state["averages"], "length": state["powers"][0.1]}
    return {
        "weights": {n: full_tensor(p) for n, p in parameters.items()},
        "averages": {f"{k} {n}": full_tensor(v) for k in kinds for n, v in kinds[k].items()},
        "snapshots": state["snapshots"],
        "balancer": str(model.balancer.state_dict()) if model.balancer else "",
        "grad_norm": float(model.last_report.grad_norm),
        "val/loss": float(fit.callback_metrics["val/loss"]),
        "step": fit.global_step,
        "lr": fit.optimizers[0].param_groups[0]["lr"],
    }


WHOLE = {"accumulate_grad_batches": 1}
# Under DDP all are tried; here one of each way through the step.
TRIED = ["vanilla", "uw", "continuous_uw", "pcgrad", "nash"]
LOW = {"precision": "bf16-mixed", "optimizer": sgd, "batch_size": 8}


def every_method(rank, folder):
    exact = {name: run(2, name, steps=3) for name in TRIED}
    low = {name: run(2, name, accumulate_grad_batches=4, **LOW) for name in ("uw", "pcgrad")}
    whole = run(2, "nash", folder / "whole", steps=6)
    step_3 = folder / "whole" / "step_3.ckpt"
    return {
        "exact": exact,
        "low": low,
        "whole": whole,
        "resumed": run(2, "nash", resume=step_3, steps=6),
        "changed rate": run(2, "nash", resume=step_3, steps=4, optimizer=slow_adamw)["lr"],
        "groups": named_groups(),
    }


def named_groups(ranks=2):
    METHODS["gradnorm"] = lambda: GradNorm(K, initial_steps=1, shared_parameters=["blocks.*"])
    groups = NamedGroups({"*.bias": {"lr": 1e-2}, "late": {"weight_decay": 0.0}})
    try:
        return run(ranks, "gradnorm", sharded=ranks > 1, param_groups=groups)
    finally:
        del METHODS["gradnorm"]


def slow_adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_ranks(every_method, 2, folder / "ranks", folder, limit=180)


def check_equal(ranks, one, limit=ROUNDING):
    for found in ranks:
        assert largest_difference(found["weights"], one["weights"]) < limit
        assert largest_difference(found["averages"], one["averages"]) < limit
        assert found["balancer"] == ranks[0]["balancer"]
        assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert found["val/loss"] == pytest.approx(one["val/loss"], rel=1e-3)


@needs_unused_shards
@pytest.mark.parametrize("method", TRIED)
def test_two_sharded_ranks_train_as_one_process_does(two_ranks, method):
    one = run(1, method, steps=3, sharded=False)
    check_equal([found["exact"][method] for found in two_ranks], one)


@needs_unused_shards
@pytest.mark.parametrize("method", ["uw", "pcgrad"])
def test_in_bf16_mixed(two_ranks, method):
    one = run(1, method, sharded=False, accumulate_grad_batches=8, **LOW)
    # Fewer weights lie between two values of bfloat16 than are rounded: 4e-5 is what all that is
    # rounded makes of a weight.
    check_equal([found["low"][method] for found in two_ranks], one, limit=8e-6)


@needs_unused_shards
def test_a_sharded_run_resumes_with_a_changed_learning_rate(two_ranks):
    assert [found["changed rate"] for found in two_ranks] == [1e-5, 1e-5]


@needs_unused_shards
def test_a_sharded_run_resumes_to_the_last_bit(two_ranks):
    for found in two_ranks:
        whole, resumed = found["whole"], found["resumed"]
        assert resumed["step"] == whole["step"] == 6
        assert resumed["balancer"] == whole["balancer"]
        for name in ("weights", "averages"):
            assert largest_difference(resumed[name], whole[name]) == 0
        # The resumed run has no folder for its own snapshots, but knows those that it went on from.
        assert list(whole["snapshots"]) == [1, 2, 3, 4, 5, 6]
        assert resumed["snapshots"] == {n: whole["snapshots"][n] for n in (1, 2, 3)}


@needs_unused_shards
def test_one_process_goes_on_from_a_sharded_checkpoint(two_ranks, folder):
    step_3 = folder / "whole" / "step_3.ckpt"
    with pytest.warns(UserWarning, match="number of ranks: the checkpoint has 2, this run 1"):
        one = run(1, "nash", folder / "one", resume=step_3, steps=6, sharded=False)
    whole = two_ranks[0]["whole"]
    assert largest_difference(one["weights"], whole["weights"]) < ROUNDING
    assert largest_difference(one["averages"], whole["averages"]) < ROUNDING


@needs_unused_shards
def test_groups_of_parameters_and_names_are_those_of_one_process(two_ranks):
    first, second = (found["groups"] for found in two_ranks)
    one = named_groups(ranks=1)
    # Biases have ten times the rate.
    assert largest_difference(first["weights"], one["weights"]) < 10 * ROUNDING
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert first["balancer"] == second["balancer"]


@pytest.mark.parametrize(
    ("settings", "precision", "words"),
    [
        ({"placement": "sorted"}, "32-true", r"tasks\.placement.*'spread'"),
        (
            {"engine": "one_pass", **WHOLE},
            "32-true",
            r"tasks\.engine.*'auto' or 'loop'.*found 'one_pass'",
        ),
        ({"engine": "low_memory", **WHOLE}, "bf16-mixed", r"tasks\.engine.*found 'low_memory'"),
        (
            {"optimizer": MuonAdamW, "param_groups": MuonGroups()},
            "32-true",
            r"optimization\.optimizer.*Muon needs whole matrices, found some that are sharded",
        ),
        ({}, "bf16-true", r"trainer\.precision.*found bf16-true"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(settings, precision, words):
    fit = trainer(strategy=ShardedStrategy(), precision=precision)
    try:
        with pytest.raises(ConfigError, match=words):
            fit.fit(module("pcgrad", **settings), datamodule=TinyData())
    finally:  # other tests must not see the process group that the strategy made
        torch.distributed.destroy_process_group()
