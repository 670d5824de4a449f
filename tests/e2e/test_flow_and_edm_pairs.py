"""Every balancer and every clustering on the configs of flow matching and EDM."""

from pathlib import Path

import pytest
import torch
from test_cli import BALANCERS, CLUSTERINGS, CONFIGS, TINY, affinity_file

from ant_lightning.cli.parser import run

PAIRS = [(each, CONFIGS / "clustering" / "snr.yaml") for each in BALANCERS]
PAIRS += [(CONFIGS / "balancer" / "pcgrad.yaml", each) for each in CLUSTERINGS]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sit", "edm"])
@pytest.mark.parametrize(("balancer", "clustering"), PAIRS, ids=lambda path: Path(path).stem)
def test_it_trains_and_resumes_to_the_last_bit(tmp_path, base, balancer, clustering):
    files = [CONFIGS / "digits" / f"{base}.yaml", balancer, clustering]
    args = ["fit", *(x for file in files for x in ("--config", str(file))), *TINY]
    args += ["--trainer.limit_val_batches=0", "--trainer.callbacks=[]"]
    if clustering.stem == "gradient":
        args += [f"--model.tasks.clustering.affinity={affinity_file(tmp_path)}"]

    def trained(name, steps, *more):
        folder = f"--trainer.logger.init_args.save_dir={tmp_path / name}"
        return run([*args, folder, f"--trainer.max_steps={steps}", *more]).model.state_dict()

    whole = trained("whole", 4)
    trained("parts", 2)
    last = next((tmp_path / "parts").rglob("last.ckpt"))
    resumed = trained("parts", 4, f"--ckpt_path={last}")
    for name, value in whole.items():  # NaN where a balancer has no history yet
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, equal_nan=True)
