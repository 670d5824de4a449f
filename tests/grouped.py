"""Settings of a module given flat, for tests that change one of them."""

from ant_lightning import DiscreteDiffusion, Optimization, Sampling, Tasks, TimestepSampling

GROUPS = {
    "process": (
        DiscreteDiffusion,
        ("schedule", "prediction_type", "variance_type", "loss_weighting"),
    ),
    "tasks": (Tasks, ("clustering", "balancer", "weighting", "engine", "placement")),
    "timesteps": (TimestepSampling, ("method", "allocation", "interval")),
    "optimization": (
        Optimization,
        (
            "optimizer",
            "lr_scheduler",
            "warmup_steps",
            "clip_grad_norm",
            "accumulate_grad_batches",
            "max_skipped_steps",
            "param_groups",
        ),
    ),
    "sampling": (
        Sampling,
        (
            "sampler",
            "guidance_scale",
            "guided_channels",
            "guidance_interval",
            "guide_checkpoint",
            "guide_backbone",
            "guide_weights",
            "clip_denoised",
        ),
    ),
}


def grouped(**settings):
    """The arguments of a module; the variance is learned unless another is given."""
    settings = {"variance_type": "learned_range", **settings}
    groups = {}
    for name, (kind, fields) in GROUPS.items():
        found = {field: settings.pop(field) for field in fields if field in settings}
        if found and name not in settings:  # a whole group may be given in place of its fields
            groups[name] = kind(**found)
    return {**settings, **groups}
