"""Wrong configs made of a good one, and what the command line makes of them."""

import inspect
import io
import shutil
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lightning as L
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st
from mutations import EDITS, edited, replaced

from ant_lightning.cli.main import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"
# No large number that could be allocated or trained for: they are 0 to 7, or beyond any memory.
_VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 2**62, -(2**62), 10**30, 0.5, -0.5, 1e-30, 1e30]
_VALUES += [float("nan"), float("-inf"), "", "x", "auto", "1", "null", "..", "\0", "a: b", "[", "é"]
_VALUES += [[], {}, [[]], [0, 1], {"x": 1}, {"class_path": "x"}, {"init_args": {}}]
_VALUES += [{"class_path": name} for name in ("torch.nn.Linear", "os.system", "DiT", "Balancer")]
_VALUES += [{"class_path": f"ant_lightning.balancing.{n}"} for n in ("PCGrad", "NashMTL", "Engine")]
_VALUES += [
    {"class_path": "ant_lightning.LinearSchedule", "init_args": {"num_timesteps": 3}},
    {"class_path": "SNRClustering", "init_args": {"num_tasks": 7}},
]
CHANGES = st.one_of(
    st.tuples(st.just("value"), st.floats(0, 1), st.sampled_from(_VALUES)),
    st.tuples(st.just("value"), st.floats(0, 1), st.sampled_from(_VALUES)),
    st.tuples(st.just("name"), st.floats(0, 1), st.sampled_from("bcx")),
    st.tuples(st.just("text"), st.floats(0, 1), EDITS),
)
# What decides how long a run is, on how many processes, and where it writes, stays as it is.
_FIXED = {
    "accelerator": "cpu",
    "callbacks": [],
    "check_val_every_n_epoch": None,
    "default_root_dir": None,
    "devices": 1,
    "enable_checkpointing": True,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "logger": False,
    "max_steps": 1,
    "num_nodes": 1,
    "strategy": "auto",
}
_GONE = {"self", "fast_dev_run", "max_time", "model_registry", "profiler", "val_check_interval"}


def good_config(folder):
    """Every setting of the Trainer, and a small model."""
    content = yaml.safe_load(CONFIGS.read_text())
    flags = inspect.signature(L.Trainer).parameters
    trainer = {name: each.default for name, each in flags.items() if name not in _GONE}
    content["trainer"] = {**trainer, **_FIXED, "default_root_dir": str(folder)}
    content["data"]["init_args"]["batch_size"] = 20
    content["model"]["init_args"]["backbone"]["init_args"] |= {"hidden_size": 8, "num_heads": 1}
    content["model"]["init_args"]["backbone"]["init_args"] |= {"depth": 1, "patch_size": 4}
    content["checkpoint"] = {"keep_last": 2, "at_steps": [1], "save_top_k": 1, "monitor": None}
    content["samples"] = {"num_images": 3, "batch_size": 2, "folder": None, "npz": None}
    return {**content, "ckpt_path": None, "weights_only": True}


def run_arguments(folder):
    """A run of one step of `c.yaml`, on one process and in this folder whatever that says."""
    fixed = [f"--trainer.{name}={_FIXED[name]}" for name in ("max_steps", "devices", "num_nodes")]
    fixed += ["--trainer.strategy=auto", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    return ["fit", f"--config={folder / 'c.yaml'}", *fixed, f"--trainer.default_root_dir={folder}"]


def fuzz_configs(folder, count, *, derandomize):
    """Run `count` wrong configs for a step; returns how many ended with each exit code.

    Each starts in a folder that holds nothing else, since a run may leave much.
    """
    good, path = good_config(folder), folder / "c.yaml"
    seen = Counter()

    @settings(
        max_examples=count,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(CHANGES)
    def check(change):
        text = wrong_config(good, *change)
        assume(not has_default_sizes(text))
        path.write_bytes(text)
        seen[exit_code(run_arguments(folder))] += 1
        for each in folder.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()

    check()
    return seen


def has_default_sizes(text):
    """Whether a network is left without its sizes: it would be DiT-XL, 675 million parameters."""
    try:
        backbone = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeError, ValueError, OverflowError, RecursionError):
        return False
    for key in ("model", "init_args", "backbone"):
        if not isinstance(backbone, dict):
            return False
        backbone = backbone.get(key)
    if isinstance(backbone, dict):
        sizes = backbone.get("init_args")
        return not isinstance(sizes, dict) or not {"hidden_size", "depth"} <= sizes.keys()
    return isinstance(backbone, str)


def exit_code(args):
    """That of a command which may be refused with one line, and may not raise."""
    errors = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(errors), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        code = main(args)
    lines = [x for x in errors.getvalue().splitlines() if x.startswith("ant-lightning: error: ")]
    assert code in {0, 1, 2}
    assert len(lines) == (code != 0), errors.getvalue()
    return code


def wrong_config(good, way, share, what):
    """The bytes of a config with one change."""
    if way == "value":
        return yaml.safe_dump(replaced(good, share, what), allow_unicode=True).encode()
    text = yaml.safe_dump(good).encode()
    if way == "name":
        colons = [i for i, byte in enumerate(text) if byte == ord(":")]
        at = colons[min(int(share * len(colons)), len(colons) - 1)]
        return text[:at] + what.encode() + text[at:]
    return edited(text, what)
