"""Training in children of this process, as in a notebook, leaves what training here leaves."""

import os

import torch
from rank_processes import _CONTEXT
from tiny_runs import TinyData, module, trainer

from ant_lightning import EMA, FeatureExtractor, GenerationMetrics, Reclustering
from ant_lightning.generation.extractor import Features


class Corner(FeatureExtractor):
    """Four pixels as they are."""

    def __init__(self):
        super().__init__(num_features=4, name="corner")

    def extract(self, images):
        return Features(images[:, 0, :2, :2].flatten(1).float() / 255)


def trained(strategy, ranks):
    """What the caller of `fit` holds afterwards, and what a validation of it says."""
    ema, model = EMA(decay=0.5), module("uw")
    metrics = GenerationMetrics(Corner(), num_images=8, with_train=False)
    callbacks = [ema, metrics, Reclustering(recluster_every=2, num_points=9, num_images=4)]
    settings = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
    run = trainer(ranks=ranks, steps=3, strategy=strategy, callbacks=callbacks, **settings)
    run.fit(model, TinyData())
    after = trainer(callbacks=[ema], limit_val_batches=1.0)
    (logged,) = after.validate(model, TinyData(), verbose=False)
    return {
        "num_updates": ema.num_updates,
        "averages": ema.state_dict()["averages"],
        "history": metrics.state_dict()["history"],
        "clusters": model.cluster_history,
        "steps": model.trained_steps,
        "validated": logged["val/loss"],
    }


def notebook(path):
    """A process of its own: to fork the one that runs the tests would copy its threads."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(path.parent)
    torch.save([trained("ddp_fork", 2), trained("auto", 1)], path)


def test_children_hand_back_averages_clusters_and_results(tmp_path):
    process = _CONTEXT.Process(target=notebook, args=(tmp_path / "found.pt",))
    process.start()
    process.join(60)
    process.kill()
    children, here = torch.load(tmp_path / "found.pt", weights_only=True)
    assert children["num_updates"] == here["num_updates"] == 3
    assert children["steps"] == here["steps"] == 3
    assert len(here["clusters"]) == 2
    assert children["clusters"] == here["clusters"]
    for name, average in here["averages"].items():
        torch.testing.assert_close(children["averages"][name], average, rtol=1e-4, atol=1e-6)
    assert children["history"].keys() == here["history"].keys() == {3}
    torch.testing.assert_close(children["validated"], here["validated"], rtol=1e-4, atol=1e-6)
