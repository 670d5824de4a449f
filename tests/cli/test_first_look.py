"""Mistakes that need no import are answered without one, and nothing else is refused there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from wrong_settings import CONFIGS, DIT, SETTINGS, arguments, callback, looked

from ant_lightning.cli.bounds import checks_of
from ant_lightning.cli.first_look import top_settings
from ant_lightning.cli.main import main
from ant_lightning.cli.messages import one_line
from ant_lightning.cli.parser import AntCLI
from ant_lightning.cli.source_names import arguments_of

# Rows of the table of wrong settings that can be seen without an import.
SEEN = [
    "misspelt option",
    "option without a value",
    "part of a step",
    "no group",
    "choice",
    "word without an option",
    "config without a name",
    "option cut short",
    "learning rate in words",
    "steps in words",
    "tasks 2.5",
    "balancer's rate",
    "least loss",
    "learning rate below 0",
    "weight decay",
    "max steps",
    "no depth",
    "no width",
    "no timesteps",
    "warm-up",
    "batch 0",
    "kept checkpoints",
    "unknown weighting",
    "unknown callback",
    "option of a callback",
    "optimizer beside the model",
    "seed below 0",
    "seed too large",
    "log never",
    "sanity steps",
    "epochs of checks",
    "interval of checks",
    "clip by the Trainer",
    "accumulation by the Trainer",
    "accumulation by a callback",
    "averages twice",
    "averages of Lightning",
    "search for a rate",
    "no checkpoint",
    "folder as checkpoint",
    "a word as checkpoint",
    "checkpoint that runs code",
    "no data",
    "no folder of images",
    "no latents",
    "no initial weights",
    "config that is not there",
    "folder as config",
]
MORE = {
    "unknown command": (["train"], ["command: must be one of fit", "'train'"]),
    "misspelt command": (["predcit"], ["found 'predcit'; did you mean 'predict'?"]),
    "group": (["fit", "--trainr.max_steps=3"], ["trainr: the command", "'trainer'"]),
    "flag": (["fit", "--trainer.max_stepz", "3"], ["trainer.max_stepz: ", "'trainer.max_steps'"]),
    "flag without its group": (["fit", "--max_steps=3"], ["max_steps: ", "'trainer.max_steps'"]),
    "images of fit": (["fit", "--images=x"], ["found images for ant-lightning score --images"]),
    "balancer": (
        ["fit", "--model.tasks.balancer=PCGrat"],
        ["model.tasks.balancer", "did you mean 'PCGrad'"],
    ),
    "balancer by its module": (
        ["fit", "--model.tasks.balancer.class_path=ant_lightning.balancing.Nash"],
        ["model.tasks.balancer", "'ant_lightning.balancing.Nash'"],
    ),
    "clustering": (
        ["fit", "--model.init_args.tasks.clustering=SNRClusterin"],
        ["model.tasks.clustering", "did you mean 'SNRClustering'"],
    ),
    "model": (["fit", "--model=ant_lightning.modules.DiTModul"], ["model: no class", "DiTModule"]),
    "data": (["fit", "--data=ant_lightning.data.DigitData"], ["data: no class", "DigitsData"]),
    "option of a balancer": (
        ["fit", "--model.tasks.balancer=UncertaintyWeighting", "--model.tasks.balancer.min_los=1"],
        [
            "model.tasks.balancer.min_los: UncertaintyWeighting has no such",
            "'model.tasks.balancer.min_loss'",
        ],
    ),
    "option of a logger": (
        ["fit", "--trainer.logger=csv", "--trainer.logger.sav_dir=x"],
        ["trainer.logger.sav_dir: CSVLogger has no such setting; did you mean 'trainer.logger.sa"],
    ),
    "option of the default logger": (
        ["fit", "--config=digits/dit", "--trainer.logger.nam=x"],
        ["trainer.logger.nam: TensorBoardLogger has no such setting; did you mean 'trainer.logger"],
    ),
    "bound of a base": (
        ["fit", "--config=digits/dit", "--data=ImageFolderData", "--data.num_workers=-1"],
        ["data.num_workers: must be at least 0, found -1"],
    ),
    "bound of a group": (
        ["fit", "--config=digits/dit", "--model.optimization.max_skipped_steps=0"],
        ["model.optimization.max_skipped_steps: must be at least 1, found 0"],
    ),
    "choice of a class": (
        ["fit", "--config=digits/dit", "--model.sampling.sampler.spacing=foo"],
        ["model.sampling.sampler.spacing: must be one of 'ddim', 'even', 'ldm', ", "found foo"],
    ),
    "callback that is added": (
        ["fit", "--config=digits/dit", "--trainer.callbacks+", "ant_lightning.ConflictMonitr"],
        ["trainer.callbacks: no class is called 'ant_lightning.Conf", "'ConflictMonitor'"],
    ),
    "module that is not here": (
        ["fit", "--config=digits/dit", "--model.backbone", "no_such.Net"],
        ["model.backbone: no module is called 'no_such', found no_such.Net"],
    ),
    "setting of a list of loggers": (
        [
            *("fit", "--config=digits/dit", "--trainer.logger=[csv, mlflow]"),
            "--trainer.logger.name=x",
        ],
        ["trainer.logger[1].name: MLFlowLogger has no such setting; did you mean"],
    ),
    "values of a sweep": (
        ["sweep", ".", "--guidance", "1,2"],
        ["guidance: must be numbers with spaces between them", "found 1,2"],
    ),
    "extractor of a sweep": (
        ["sweep", ".", "--guidance", "1", "--extractor", "ant_lightning.ShapesFeature"],
        ["metrics.extractor: no class is called", "did you mean 'ShapesFeatures'"],
    ),
    "weights of an export": (
        ["export", ".", "--to", "torch", "--weights=lve"],
        ["weights: must be one of 'ema', 'live', found lve"],
    ),
    "callback": (["fit", callback("ConflictMonitr")], ["trainer.callbacks", "ConflictMonitor"]),
    "images": (
        ["predict", "--config=digits/dit", "--samples.num_images=0"],
        ["samples.num_images: must be at least 1"],
    ),
    "images by the name of all commands": (
        ["predict", "--config=digits/dit", "--num_images=0"],
        ["samples.num_images: must be at least 1"],
    ),
    "batch of images": (
        ["predict", "--config=digits/dit", "--samples.batch_size=-1"],
        ["samples.batch_size", "-1"],
    ),
    "nothing": (["fit"], ["data, model: needed, found nothing; give a --config FILE"]),
    "no model": (["test", "--data=DigitsData"], ["model: needed, found nothing"]),
    "option of encode": (["encode", "--cache.shard=3"], ["cache.shard: ", "'cache.shard_size'"]),
    "option of another command": (["encode", "--ema.decay=0.9"], ["ema: ", "no such"]),
    "data of encode": (["encode", "--data=ant_lightning.data.DigitData"], ["DigitsData"]),
    "report": (["report", "/nope"], ["/nope: must be the folder of a run"]),
    "sweep": (["sweep", "/nope", "--guidance", "1"], ["/nope: must be the folder of a run"]),
    "sweep of nothing": (["sweep", "."], ["guidance: needs values, as in --guidance 1 1.5 2"]),
    "diagnose": (["diagnose", "/nope"], ["/nope: must be the folder of a run"]),
    "option of diagnose": (
        ["diagnose", "--config", "digits/dit", "--num_imges=3"],
        ["num_imges: the command has no such setting; did you mean 'num_images'?"],
    ),
    "diagnose of nothing": (["diagnose"], ["diagnose: needs the folder of a run, or --config"]),
    "images of score": (
        ["score", "--data=DigitsData", "--images=/nope"],
        ["images: must be a folder or an npz file, found nothing at /nope"],
    ),
    "extractor of score": (
        [
            *("score", "--data=DigitsData", "--images=.", "--metrics.extractor"),
            *("ant_lightning.CLIPFeatures", "--metrics.extractor.folder=/nope"),
        ],
        ["metrics.extractor.folder: must be a folder with config.json, found nothing at /nope"],
    ),
    "clip of score": (
        ["score", "--data=DigitsData", "--images=.", "--clip=/nope"],
        ["clip: must be a folder with config.json, found nothing at /nope"],
    ),
    "export": (["export", "/nope", "--to", "torch"], ["/nope: must be the folder of a run or a"]),
    "export to nothing": (["export", "."], ["to: needed, one of diffusers, official,"]),
    "export to another": (["export", ".", "--to", "foo"], ["to: must be one of", "found foo"]),
    "the second run of app": (["app", ".", "/nope"], ["/nope: must be the folder of a run or a"]),
    "score without data": (["score", "--images", "."], ["data: needed", "RUN/config.yaml"]),
    "encode without its config": (["encode", "--config=/nope"], ["config", "found nothing"]),
}
FILES = {
    "no such logger": (
        "trainer: {logger: wandbb}",
        ["trainer.logger: no class is called 'wandbb'; did you mean 'wandb'?"],
    ),
    "no such logger in a list": ("trainer: {logger: [csv, foo]}", ["'foo'; short names are tens"]),
    "no YAML": ("trainer: {max_steps: 3", ["must be YAML, found in line"]),
    "misspelt group": ("trainr: {max_steps: 3}", ["line 1: trainr: ", "did you mean 'trainer'"]),
    "misspelt setting": ("ema: {deacy: 0.9}", ["ema.deacy", "did you mean 'ema.decay'"]),
    "misspelt flag": ("trainer: {max_stepz: 3}", ["trainer.max_stepz", "'trainer.max_steps'"]),
    "clip": ("trainer: {gradient_clip_val: 1.0}", ["use model.optimization.clip_grad_norm", "1.0"]),
    "number of tasks": (
        "model: {init_args: {tasks: {clustering: {init_args: {num_tasks: x}}}}}",
        ["model.tasks.clustering.num_tasks: must be a whole number, found x"],
    ),
    "decay": ("ema: {decay: high}", ["ema.decay: must be a number, found high"]),
    "checkpoints": ("checkpoint: {save_top_k: all}", ["save_top_k: must be a whole number"]),
    "seed": ("seed_everything: -1", ["seed_everything: must be from 0", "-1"]),
    "balancer": (
        "model: {init_args: {tasks: {balancer: {class_path: NashMTLL}}}}",
        ["model.tasks.balancer", "'NashMTL'"],
    ),
    "option of the model": (
        "model: {class_path: ant_lightning.DiTModule, init_args: {clip_norm: 3}}",
        ["model.clip_norm: DiTModule has no such setting"],
    ),
}
# What the parser takes, in spite of how it looks.
VALID = {
    "flags of neutral value": [
        "--trainer.gradient_clip_val=null",
        "--trainer.accumulate_grad_batches=1",
    ],
    "a later flag": ["--trainer.gradient_clip_val=3", "--trainer.gradient_clip_val=null"],
    "seed true": ["--seed_everything=true"],
    "a later seed": ["--seed_everything", "-1", "--seed_everything", "7"],
    "a later list": [callback("EMA"), "--trainer.callbacks=[]"],
    "a later class": [
        "--model.tasks.balancer=UncertaintyWeighting",
        "--model.tasks.balancer.min_loss=0.1",
        "--model.tasks.balancer=PCGrad",
    ],
    "a later list of others": [callback("EMA"), callback("ConflictMonitor")],
    "an appended callback": [
        "--trainer.callbacks+=ConflictMonitor",
        "--trainer.callbacks.log_every_n_steps=3",
    ],
    "a dictionary": [
        '--model.tasks.balancer={"class_path":"UncertaintyWeighting","init_args":{"lr":0.1}}'
    ],
    "no balancer": ["--model.tasks.balancer=null"],
    "another optimizer": [
        "--model.optimization.optimizer=SGD",
        "--model.optimization.optimizer.lr=1e-3",
    ],
    "a config in place": ["--config", '{"trainer": {"max_steps": 3}}'],
    "a long config in place": [
        f"--config={json.dumps({'trainer': {'default_root_dir': 'x' * 400}})}"
    ],
    "numbers": [
        "--trainer.max_epochs=null",
        "--model.optimization.optimizer.lr=1e-3",
        "--ema.decay=.5",
        "--ema.length=~",
    ],
    "numbers as words": ["--trainer.limit_val_batches=0.5", "--trainer.val_check_interval=00:01"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_of_wrong_settings_it_says_what_the_parser_says_or_nothing(tmp_path, name):
    options, words = SETTINGS[name]
    message = looked(arguments(tmp_path, *options))
    assert message is None or all(word in message for word in words), message
    assert (message is not None) == (name in SEEN)


@pytest.mark.parametrize("name", MORE)
def test_more_mistakes_are_seen(capsys, name):
    args, words = MORE[name]
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_mistakes_in_a_file_are_seen(tmp_path, name, command):
    text, words = FILES[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = looked([command, "--config", str(DIT), f"--config={path}"])
    assert message is not None
    assert all(word in message for word in words), message


def test_a_mistake_in_the_trainer_given_as_a_whole_is_named_once():
    said = 'Parser key "trainer": Parser key "trainer.max_steps": '
    said += "Expected a <class 'int'>. Got value: x"
    assert one_line(said) == "trainer.max_steps: must be a whole number, found x"


def configs():
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in {"studies"})


@pytest.mark.parametrize("path", configs(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_passes(path):
    args = ["fit", "--config", str(DIT), "--config", str(path), "--print_config"]  # without data
    if path.stem == "encode":
        args = ["encode", "--config", str(path), "--print_config"]
    assert looked(args) is None


@pytest.mark.parametrize("name", VALID)
def test_what_the_parser_accepts_is_never_refused(tmp_path, name):
    assert looked(arguments(tmp_path, *VALID[name])) is None


def test_the_parser_accepts_all_of_it(tmp_path):
    options = [option for each in VALID.values() for option in each]
    args = arguments(tmp_path, *options)
    assert looked(args) is None
    parsed(args)


def parsed(args):
    """Raises what the whole parser says."""

    class Parsed(AntCLI):
        def before_instantiate_classes(self):
            super().before_instantiate_classes()
            raise KeyboardInterrupt  # far enough

    from ant_lightning.cli import parser as cli

    kept, cli.AntCLI = cli.AntCLI, Parsed
    try:
        with pytest.raises(KeyboardInterrupt):
            cli.run(args)
    finally:
        cli.AntCLI = kept


def test_a_class_of_somebody_else_may_bring_others_with_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    own = [
        "--data=mine.Data",
        "--model.tasks.balancer=MyBalancer",
        "--model.tasks.balancer.strength=3",
    ]
    assert looked(arguments(tmp_path, *own)) is None


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_names_at_the_top_are_the_parsers(command, monkeypatch):
    found = {}

    class Names(AntCLI):
        def parse_arguments(self, parser, args):
            actions = self._subcommand_parsers[args[0]]._actions
            found.update(dict.fromkeys(a.dest.split(".")[0] for a in actions))
            raise KeyboardInterrupt

    from ant_lightning.cli import parser as cli

    monkeypatch.setattr(cli, "AntCLI", Names)
    with pytest.raises(KeyboardInterrupt):
        cli.run([command])
    assert top_settings(command) == sorted(found.keys() - {"help"})


def test_bounds_are_those_of_constructors():
    check = "check_whole"
    assert checks_of("UncertaintyWeighting")["num_tasks"] == ((check, (1,)),)  # of its base
    assert "num_held_out" not in checks_of("DigitsMixture")  # which has a check of its own
    assert checks_of("NoSuchClass") == {}


def test_arguments_that_are_handed_on_are_known():
    assert {"backbone", "tasks", "class_dropout", "optimization"} <= arguments_of("DiTModule")
    assert {"at_steps", "monitor", "save_top_k"} <= arguments_of("Checkpoints")
    assert arguments_of("NoSuchClass") is None


BLOCKED = """
import sys
from importlib.machinery import PathFinder
class Blocked:  # they can be found, but not imported
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "lightning.pytorch", "lightning.fabric"}:
            found = PathFinder.find_spec(name, path)
            found.loader = self
            return found
    def create_module(self, spec):
        raise ImportError(spec.name + " was imported")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocked())
import inspect
import json
from ant_lightning.cli.logger_names import places_of
from ant_lightning.cli.main import main
from ant_lightning.cli.messages import one_line
for args in json.loads(sys.argv[1]):
    assert main(args) == 2, args
"""


def test_mistakes_are_answered_where_torch_and_lightning_cannot_be_imported(tmp_path):
    commands = [args for args, _ in MORE.values()]
    for name, (text, _) in FILES.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        commands.append(["fit", "--config", str(DIT), "--config", str(path)])
    commands += [arguments(tmp_path, *SETTINGS[name][0]) for name in SEEN]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    assert all(line.startswith("ant-lightning: error: ") for line in lines)
