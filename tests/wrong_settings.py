"""Wrong settings of a small run, each with words that the message must have."""

import json
from pathlib import Path

from ant_lightning import ConfigError
from ant_lightning.cli.first_look import first_look

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DIT = CONFIGS / "digits" / "dit.yaml"
TINY = [
    "--model.backbone.hidden_size=16",
    "--model.backbone.depth=1",
    "--model.backbone.num_heads=2",
    "--data.batch_size=20",
    "--trainer.max_steps=1",
    "--trainer.callbacks=[]",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
]


def arguments(folder, *options, command="fit", balancer="uw"):
    files = [DIT, CONFIGS / "balancer" / f"{balancer}.yaml"]
    args = [command, *[x for file in files for x in ("--config", str(file))], *TINY]
    places = ["--trainer.logger.save_dir", "--trainer.default_root_dir"]
    return [*args, *(f"{name}={folder}" for name in places), *options]


def callback(kind, package="ant_lightning", **settings):
    entry = {"class_path": f"{package}.{kind}", "init_args": settings}
    return f"--trainer.callbacks={json.dumps([entry])}"


def looked(args):
    """The message of the first look, if it has one."""
    try:
        first_look(args)
    except ConfigError as error:
        return str(error)
    return None


LIGHTNING = "lightning.pytorch.callbacks"
STEPS = ["--model.optimization.warmup_steps=0", "--model.optimization.lr_scheduler=StepLR"]
DDP = "--trainer.strategy=DDPStrategy"

# name -> (options, words that the line must have); the rows of docs/reliability.md
SETTINGS = {
    # The parser: types, names, classes.
    "misspelt option": (["--ema.deacy=0.9"], ["ema.deacy", "did you mean 'ema.decay'"]),
    "option cut short": (["--checkpoint.keep=3"], ["checkpoint.keep: ", "'checkpoint.keep_last'"]),
    "learning rate in words": (
        ["--model.optimization.optimizer.lr=fast"],
        ["lr: must be a number", "fast"],
    ),
    "learning rate nan": (
        ["--model.optimization.optimizer.lr=nan"],
        ["lr: must be a number", "nan"],
    ),
    "clip nan": (
        ["--model.optimization.clip_grad_norm=nan"],
        ["clip_grad_norm: must be a number", "nan"],
    ),
    "tasks 2.5": (["--model.tasks.clustering.num_tasks=2.5"], ["num_tasks", "whole number", "2.5"]),
    "steps in words": (["--trainer.max_steps=many"], ["trainer.max_steps", "whole", "many"]),
    "yes or no": (["--ema.warmup=perhaps"], ["ema.warmup", "true or false", "perhaps"]),
    "choice": (["--model.tasks.engine=fast"], ["tasks.engine", "'auto'", "'low_memory'", "fast"]),
    "interval of three": (["--model.timesteps.interval=[1,2,3]"], ["interval", "2 elements"]),
    "duration": (["--checkpoint.train_time_interval=soon"], ["train_time_interval", "h:m:s"]),
    "unknown optimizer": (
        ["--model.optimization.optimizer=Adamm"],
        ["optimization.optimizer", "no class", "Adamm"],
    ),
    "unknown weighting": (
        ["--model.process.loss_weighting=MinSNRR"],
        ["loss_weighting", "'MinSNR'"],
    ),
    "class of another kind": (["--model.backbone=UNet"], ["backbone", "'UNet'", "fits here"]),
    "a program as a class": (
        ["--model.backbone=subprocess.Popen"],
        ["model.backbone", "subprocess.Popen", "subclass of DiT"],
    ),
    "abstract class": (["--model.tasks.balancer=Balancer"], ["tasks.balancer", "abstract"]),
    "unknown callback": ([callback("Foo")], ["trainer.callbacks", "no class", "Foo"]),
    "option of a callback": (
        [callback("ConflictMonitor", every_n_steps=0)],
        ["every_n_steps", "ConflictMonitor", "log_every_n_steps'"],
    ),
    "missing argument": (STEPS, ["optimization.lr_scheduler.step_size: needed"]),
    "no schedule": (["--model.process.schedule=null"], ["process.schedule", "found None"]),
    "no data": (["--data=null"], ["data: needed", "--config"]),
    "seed below 0": (["--seed_everything=-1"], ["seed_everything: must be from 0", "-1"]),
    "seed too large": (["--seed_everything=9999999999"], ["seed_everything", "9999999999"]),
    "optimizer beside the model": (
        ["--optimizer=SGD"],
        ["optimizer for model.optimization.optimizer"],
    ),
    # Ranges.
    "learning rate below 0": (
        ["--model.optimization.optimizer.lr=-1"],
        ["optimization.optimizer", "-1"],
    ),
    "betas": (
        ["--model.optimization.optimizer.betas=[1.5,2]"],
        ["optimization.optimizer", "beta", "1.5"],
    ),
    "weight decay": (
        ["--model.optimization.optimizer.weight_decay=-1"],
        ["optimization.optimizer", "weight_decay"],
    ),
    "optimizer of closures": (
        ["--model.optimization.optimizer=LBFGS"],
        ["optimization.optimizer", "LBFGS"],
    ),
    "sparse optimizer": (
        ["--model.optimization.optimizer=SparseAdam"],
        ["optimization.optimizer", "SparseAdam"],
    ),
    "scheduler of period 0": (
        [*STEPS, "--model.optimization.lr_scheduler.step_size=0"],
        ["optimization.lr_scheduler", "zero"],
    ),
    "balancer's rate": (
        ["--model.tasks.balancer.lr=-1"],
        ["tasks.balancer.lr: must be above 0", "-1"],
    ),
    "least loss": (
        ["--model.tasks.balancer.min_loss=-1"],
        ["tasks.balancer.min_loss: must be", "-1"],
    ),
    "no depth": (["--model.backbone.depth=0"], ["depth", "at least 1", "0"]),
    "absurd depth": (["--model.backbone.depth=1000000000"], ["depth", "at most 1000"]),
    "no width": (["--model.backbone.hidden_size=0"], ["hidden_size", "at least 1"]),
    "heads": (["--model.backbone.num_heads=3"], ["hidden_size", "multiple", "num_heads 3", "16"]),
    "patches": (["--model.backbone.patch_size=3"], ["patch_size", "divide", "8", "3"]),
    "no timesteps": (
        ["--model.process.schedule.num_timesteps=0"],
        ["num_timesteps", "at least 1", "0"],
    ),
    "sampler steps 0": (["--model.sampling.sampler.num_steps=0"], ["num_steps", "at least 1", "0"]),
    "clip 0": (
        ["--model.optimization.clip_grad_norm=0"],
        ["clip_grad_norm: must be above 0", "0.0"],
    ),
    "warm-up": (
        ["--model.optimization.warmup_steps=-1"],
        ["warmup_steps: must be at least 0", "-1"],
    ),
    "guided channels": (
        ["--model.sampling.guided_channels=9"],
        ["guided_channels", "the 1 channels", "9"],
    ),
    "sampler of another process": (
        ["--model.sampling.sampler=EDMSampler"],
        ["model.sampling.sampler: must be one for DiscreteDiffusion", "EDMSampler"],
    ),
    "steps of an adaptive solver": (
        [
            "--model.sampling.sampler=ODESampler",
            "--model.sampling.sampler.method=dopri5",
            "--model.sampling.sampler.num_steps=50",
        ],
        ["sampling.sampler.num_steps: must be left out of the adaptive dopri5", "50"],
    ),
    "interval of guidance": (
        ["--model.sampling.guidance_interval=[3,1]"],
        ["sampling.guidance_interval: must satisfy 0 <= low < high", "3.0, 1.0"],
    ),
    "no guide": (
        ["--model.sampling.guide_checkpoint=/nope.ckpt"],
        ["sampling.guide_checkpoint: /nope.ckpt: no such file"],
    ),
    "decay of the averages": (["--ema.decay=-0.1"], ["ema.decay: must be at least 0", "-0.1"]),
    "batch 0": (["--data.batch_size=0"], ["data.batch_size: must be at least 1", "0"]),
    "batch above the data": (["--data.batch_size=5000"], ["data.batch_size", "1437", "5000"]),
    "kept checkpoints": (["--checkpoint.keep_last=0"], ["keep_last: must be at least 1", "0"]),
    "best checkpoints": (["--checkpoint.save_top_k=-2"], ["save_top_k=-2", ">= -1"]),
    "steps to keep": (["--checkpoint.at_steps=[-5]"], ["at_steps", "at least 1", "-5"]),
    "pattern of names": (["--checkpoint.filename={step"], ["filename", "braces", "{step"]),
    "name outside": (["--checkpoint.filename=a/../../b"], ["filename", "dirpath", "a/../../b"]),
    "log never": (["--trainer.log_every_n_steps=0"], ["log_every_n_steps", "at least 1", "0"]),
    "sanity steps": (["--trainer.num_sanity_val_steps=-3"], ["num_sanity_val_steps", "-1", "-3"]),
    "epochs of checks": (["--trainer.check_val_every_n_epoch=0"], ["check_val_every_n_epoch", "0"]),
    "interval of checks": (["--trainer.val_check_interval=-3"], ["val_check_interval", "-3"]),
    "max steps": (["--trainer.max_steps=-5"], ["trainer.max_steps", "at least", "-5"]),
    "share of batches": (["--trainer.limit_val_batches=1.5"], ["limit_val_batches", "1.5"]),
    "time": (["--trainer.max_time=soon"], ["trainer.max_time", "DD:HH:MM:SS", "soon"]),
    # The machine.
    "precision": (["--trainer.precision=float17"], ["trainer.precision", "'bf16-mixed'", "17"]),
    "no library": (["--trainer.precision=transformer-engine"], ["trainer.precision", "install"]),
    "accelerator": (["--trainer.accelerator=gpuu"], ["trainer.accelerator", "cuda", "gpuu"]),
    "no devices": (["--trainer.devices=0"], ["trainer.devices", "0"]),
    "devices in words": (["--trainer.devices=two"], ["trainer.devices", "int > 0", "two"]),
    "no nodes": (["--trainer.num_nodes=0"], ["trainer.num_nodes", "positive", "0"]),
    "strategy": (["--trainer.strategy=dpp"], ["trainer.strategy", "ddp", "dpp"]),
    "a strategy that wraps": (["--trainer.strategy=fsdp"], ["trainer.strategy", "fsdp"]),
    "reduction by DDP": (
        [DDP, "--trainer.strategy.model_averaging_period=2"],
        ["trainer.strategy.model_averaging_period", "must be None", "2"],
    ),
    # Settings that contradict each other.
    "clip by the Trainer": (
        ["--trainer.gradient_clip_val=1"],
        ["trainer.gradient_clip_val", "use model.optimization.clip_grad_norm", "1"],
    ),
    "accumulation by the Trainer": (
        ["--trainer.accumulate_grad_batches=4"],
        ["trainer.accumulate_grad_batches", "use model.optimization.accumulate_grad_batches", "4"],
    ),
    "less than a batch": (
        ["--trainer.overfit_batches=0.001"],
        ["trainer.overfit_batches", "at least one of the 71 batches", "0.001"],
    ),
    "accumulation by a callback": (
        [callback("GradientAccumulationScheduler", LIGHTNING, scheduling={0: 2})],
        [
            "trainer.callbacks",
            "GradientAccumulationScheduler",
            "optimization.accumulate_grad_batches",
        ],
    ),
    "averages twice": ([callback("EMA")], ["trainer.callbacks: must not have EMA", "use ema"]),
    "averages of Lightning": (
        [callback("StochasticWeightAveraging", LIGHTNING, swa_lrs=0.1)],
        ["trainer.callbacks", "StochasticWeightAveraging", "use ema"],
    ),
    "search for a rate": (
        [callback("LearningRateFinder", LIGHTNING)],
        ["trainer.callbacks", "LearningRateFinder", "optimization.optimizer"],
    ),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], ["enable_checkpointing", "found"]),
    "a callback that needs a logger": (
        [callback("LearningRateMonitor", LIGHTNING), "--trainer.logger=false"],
        ["LearningRateMonitor", "logger"],
    ),
    "checks past the epoch": (
        ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=100000"],
        ["trainer.val_check_interval", "the 71 batches", "100000"],
    ),
    "warm-up and scheduler": (
        [
            "--model.optimization.lr_scheduler=StepLR",
            "--model.optimization.lr_scheduler.step_size=3",
        ],
        ["warmup_steps: must be 0 with an lr_scheduler", "100"],
    ),
    "tasks of the balancer": (
        ["--model.tasks.balancer.num_tasks=4"],
        ["tasks.balancer.num_tasks", "clusters 5", "4"],
    ),
    "timesteps below tasks": (
        ["--model.process.schedule.num_timesteps=1"],
        ["num_tasks", "5", "1"],
    ),
    "sampler steps above T": (
        ["--model.sampling.sampler.num_steps=5000"],
        ["num_steps", "1000", "5000"],
    ),
    "clusters of another T": (
        [
            "--model.tasks.clustering=FixedClustering",
            "--model.tasks.clustering.boundaries=[0,250,500]",
        ],
        ["boundaries", "1000", "500"],
    ),
    "parts above images": (
        ["--model.optimization.accumulate_grad_batches=50"],
        ["optimization.accumulate_grad_batches", "the 20 images", "50"],
    ),
    "specialist of a balancer": (
        ["--model.timesteps.interval=[0,100]"],
        ["timesteps.interval", "must be None with UncertaintyWeighting", "[0, 100]"],
    ),
    "placement": (["--model.tasks.placement=sorted"], ["placement", "'spread'", "'sorted'"]),
    "pixels of another size": (
        ["--data=ShapesData"],
        ["backbone", "in_channels and input_size", "(3, 32, 32)", "(1, 8, 8)"],
    ),
    "checkpoints by two rhythms": (
        ["--checkpoint.every_n_train_steps=2", "--checkpoint.every_n_epochs=2"],
        ["every_n_train_steps=2", "exclusive"],
    ),
    # Files.
    "no folder of images": (
        ["--data=ImageFolderData"],
        ["data.root, image_size: needed"],
    ),
    "no latents": (
        ["--data=LatentsData", "--data.cache=/nope"],
        ["/nope/index.json"],
    ),
    "no affinity": (
        [
            "--model.tasks.clustering=GradientClustering",
            "--model.tasks.clustering.affinity=/nope.npz",
        ],
        ["model.tasks.clustering.affinity: /nope.npz: must be a readable"],
    ),
    "no initial weights": (["--model.init_from=/nope.pt"], ["init_from", "/nope.pt"]),
    "log folder": (["--trainer.logger.save_dir=/proc/x"], ["logger.save_dir", "/proc/x"]),
    "no checkpoint": (
        ["--ckpt_path=/nope.ckpt"],
        ["ckpt_path", "must be a checkpoint, the folder", "/nope.ckpt"],
    ),
    "folder as checkpoint": ([f"--ckpt_path={CONFIGS}"], ["ckpt_path", "found the folder"]),
    "a word as checkpoint": (["--ckpt_path=best"], ["ckpt_path", "or last", "best"]),
    "checkpoint that runs code": (["--weights_only=false"], ["weights_only: must be true"]),
    "config that is not there": (
        ["--config=/nope.yaml"],
        ["config", "found nothing", "/nope.yaml"],
    ),
    "folder as config": ([f"--config={CONFIGS}"], ["config", "found a folder"]),
    "no group": (["--ema=false"], ["ema: must hold settings by name, found False"]),
    "part of a step": (["--trainer.max_steps=5.5"], ["max_steps: must be a whole number", "5.5"]),
    "option without a value": (["--model.seed"], ["model.seed: needs a value"]),
    "word without an option": (["digits/dit"], ["digits/dit", "mean --config digits/dit"]),
    "config without a name": (["--config"], ["config: needs a value"]),
}
