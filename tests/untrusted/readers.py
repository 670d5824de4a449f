"""Every reader of files from elsewhere: how a good small file is written, and how it is read."""

import json

import lightning as L
import numpy as np
import torch
from grouped import grouped
from PIL import ExifTags, Image
from safetensors.torch import save_file

from ant_lightning import (
    AffinityResult,
    CosineSchedule,
    DigitsFeatures,
    DiT,
    DiTModule,
    GaussianStatistics,
    GradientClustering,
    ImageStatistics,
    LatentSpace,
    SNRClustering,
    StoredImages,
    TransferGapResult,
    load_official_checkpoint,
)
from ant_lightning.affinity.gradient_store import GradientStore
from ant_lightning.backbones.official_checkpoints import read_checkpoint
from ant_lightning.callbacks.sample_files import NpzSamples
from ant_lightning.data.class_map import read_class_map
from ant_lightning.data.latents.cache import (
    CacheIndex,
    read_index,
)
from ant_lightning.data.pictures import SUFFIXES, open_picture
from ant_lightning.errors import FileError
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import read_json, write_json
from ant_lightning.files.torch_file import read_torch
from ant_lightning.generation.inception import _check_weights
from ant_lightning.models.first_stage.files import check_config
from ant_lightning.models.state import CheckpointState
from ant_lightning.runtime.checkpoint_files import content_fault
from ant_lightning.transfer.gap import GapEstimate
from ant_lightning.transfer.result import IntervalGap

INDEX = CacheIndex(
    space=LatentSpace(kind="kl", scale=0.5, shift=0.0, fingerprint="f", source="s"),
    image_shape=(1, 8, 8),
    moments_shape=(8, 2, 2),
    dtype="float32",
    views=1,
    num_classes=3,
    num_images={"train": 3, "held_out": 1},
    shard_size=4,
    identity={"data": "d"},
)
IDENTITY = {"model": "m", "width": 4, "sides": (1, 2)}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


def affinity(path):
    np.savez(path, affinity=np.eye(3), timesteps=np.array([1, 4, 8]), num_timesteps=np.array(10))


def affinity_result(path):
    dots = torch.eye(3, dtype=torch.float64).expand(1, 2, 2, 3, 3).contiguous()
    AffinityResult((1, 4, 8), 10, dots, model="m").save(path)


def affinity_of_0_1(path):
    np.savez(
        path,
        half_dots=np.broadcast_to(np.eye(3), (1, 2, 2, 3, 3)),
        timesteps=np.array([1, 4, 8]),
        num_timesteps=np.array(10),
        log_snr=np.zeros(0),
        model=np.array("m"),
    )


def reference(path):
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((3, 2), np.float32)}
    np.savez(path, extractor=np.array("digits"), image_shape=np.array([1, 8, 8]), **arrays)


def statistics(path):
    gaussian = GaussianStatistics.from_features(torch.eye(3))
    ImageStatistics(gaussian, torch.eye(3), extractor="e", image_shape=(1, 8, 8)).save(path)


def images(path):
    np.savez_compressed(path, arr_0=np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3))


def gradients(path):
    """The gradient of one timestep in the folder of a measurement that can resume."""
    return GradientStore(
        (0,),
        num_parameters=4,
        sketch=None,
        device=torch.device("cpu"),
        folder=path.parent,
        identity=IDENTITY,
        memory_budget_mb=None,
        sharded=False,
    )


def index(path):
    write_json(path, INDEX.as_json())


def shard(path):
    moments, labels = torch.zeros(3, 1, 8, 2, 2), torch.zeros(3, dtype=torch.int64)
    INDEX.shards("train")[0].write(path.parent, moments=moments, labels=labels)


def class_map(path):
    path.write_text(json.dumps({"ant": 0, "bee": 1}))


def identity_of_samples(path):
    check_samples(path, store=True)


def check_samples(path, *, store):
    files = NpzSamples(path.with_suffix(""), 1)
    files.check({"format": 2, "seed": 0, "sampler": "DDIM"}, store=store)


def config(path):
    content = {"_class_name": "AutoencoderKL", "block_out_channels": [16, 32], "in_channels": 1}
    path.write_text(json.dumps({**content, "layers_per_block": 1, "scaling_factor": 0.5}))


def picture(path, mode="RGB", **options):
    size = (5, 4)
    Image.effect_noise(size, 60).convert(mode).save(path, **options)


def photo(path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(path, exif=exif)


def identity(path):
    write_json(path, IDENTITY)


def legacy(path):
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


def digits(path):
    save_file(DigitsFeatures().state_dict(), path)


def gaps(path):
    gap = IntervalGap(
        start=0,
        stop=5,
        budget="samples",
        specialist_steps=3,
        multitask_loss=0.5,
        specialist_loss=0.25,
        loss_gap=GapEstimate(0.25, 0.0, 0.5),
    )
    TransferGapResult(gaps=(gap,), multitask_steps=3, num_images=0, num_held_out=4).save(path)


def network():
    torch.manual_seed(0)
    size = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 4}
    return DiT(**size, depth=1, num_heads=1, num_classes=2, class_dropout_prob=0.1)


NETWORK = network()


def official(path):
    state = NETWORK.state_dict()
    torch.save({"model": state, "ema": state, "opt": {}, "args": None}, path)


def run_module():
    return DiTModule(network(), **grouped(schedule=CosineSchedule(20), clustering=SNRClustering(2)))


MODULE = run_module()
MODULE.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def run(path):
    """What a run keeps, without Lightning's loops."""
    state = {f"backbone.{name}": value for name, value in NETWORK.state_dict().items()}
    version = {"pytorch-lightning_version": "2.6.0", "global_step": 3, "epoch": 0}
    kept = {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    own = MODULE.checkpoint_state().state_dict()
    torch.save({**version, **kept, "state_dict": state, "ant_lightning": own}, path)


def read_run(path):
    """As the command line reads it, and as the module compares it."""
    content = read_torch(path)
    fault = content_fault(content)
    if fault is not None:
        raise FileError(f"ckpt_path: {path}: {fault}")
    module = run_module()
    CheckpointState.of_checkpoint(content).check_fits(module.checkpoint_state())
    module.check_weights(content)


def read_config(path):
    check_config(read_json(path, kind=dict), path)


# name of the reader -> (name of the file, write a good one, read it)
READERS = {
    "affinity": ("a.npz", affinity, lambda p: GradientClustering(p, 2)(torch.zeros(10))),
    "affinity result": ("a.safetensors", affinity_result, AffinityResult.load),
    "affinity of 0.1": ("a.npz", affinity_of_0_1, AffinityResult.load),
    "reference": ("r.npz", reference, ImageStatistics.load),
    "image statistics": ("r.safetensors", statistics, ImageStatistics.load),
    "images": ("i.npz", images, lambda p: list(StoredImages(p).batches())),
    "resume identity": ("identity.json", gradients, gradients),
    "gradient": (
        "gradient_000000_1.safetensors",
        lambda p: gradients(p).put(0, 1, torch.ones(4)),
        lambda p: gradients(p).gradients[0, 1].sum(),
    ),
    "latent index": ("index.json", index, lambda p: read_index(p.parent)),
    "latent shard": (
        "train_00000.safetensors",
        shard,
        lambda p: [each.sum() for each in INDEX.shards("train")[0].read(p.parent)],
    ),
    "class map": ("map.json", class_map, read_class_map),
    "identity of samples": (
        "s.json",
        identity_of_samples,
        lambda p: check_samples(p, store=False),
    ),
    "first stage config": ("config.json", config, read_config),
    "checkpoint": ("c.pt", lambda p: torch.save(TENSORS, p), read_checkpoint),
    "old checkpoint": ("c.pt", legacy, read_checkpoint),
    "safetensors": ("c.safetensors", lambda p: save_file(TENSORS, p), read_checkpoint),
    "digits network": ("d.safetensors", digits, DigitsFeatures),
    "inception weights": ("w.pth", lambda p: torch.save(TENSORS, p), _check_weights),
    "negative transfer": ("n.json", gaps, TransferGapResult.load),
    "official weights": ("o.pt", official, lambda p: load_official_checkpoint(NETWORK, p)),
    "checkpoint of a run": ("run.ckpt", run, read_run),
    "png": ("p.png", picture, lambda p: open_picture(p, channels=3)),
    "grey png": ("p.png", lambda p: picture(p, "L"), lambda p: open_picture(p, channels=1)),
    "palette png": ("p.png", lambda p: picture(p, "P"), lambda p: open_picture(p, channels=3)),
    "jpeg": ("p.jpg", picture, lambda p: open_picture(p, channels=3)),
    "webp": ("p.webp", picture, lambda p: open_picture(p, channels=3)),
    "bmp": ("p.bmp", picture, lambda p: open_picture(p, channels=3)),
    "tiff": ("p.tiff", picture, lambda p: open_picture(p, channels=3)),
    "ppm": ("p.ppm", picture, lambda p: open_picture(p, channels=3)),
    "gif": ("p.gif", picture, lambda p: open_picture(p, channels=3)),
    "tga": ("p.tga", picture, lambda p: open_picture(p, channels=3)),
    **{
        kind: (f"p.{kind}", picture, lambda p: open_picture(p, channels=3))
        for kind in ("avif", "jp2")  # optional parts of Pillow
        if f".{kind}" in SUFFIXES
    },
    "jpeg with EXIF": ("p.jpg", photo, lambda p: open_picture(p, channels=3)),
    "identity": ("identity.json", identity, lambda p: check_identity(p, IDENTITY, setting="s")),
}
