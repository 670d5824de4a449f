"""Processes of all kinds for tests of what they share."""

from ant_lightning import (
    EDM,
    CosineSchedule,
    DiscreteDiffusion,
    FlowMatching,
    IDDPMPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)

PROCESSES = {
    "ddpm": DiscreteDiffusion,
    "cosine v": lambda: DiscreteDiffusion(CosineSchedule(1000), prediction_type="v"),
    "linear": FlowMatching,
    "linear eps": lambda: FlowMatching(prediction_type="eps"),
    "gvp score": lambda: FlowMatching("gvp", prediction_type="score"),
    "vp x0": lambda: FlowMatching("vp", prediction_type="x0"),
    "edm": EDM,
    "edm vp": lambda: EDM(VPPreconditioning()),
    "edm ve": lambda: EDM(VEPreconditioning()),
    "edm iddpm": lambda: EDM(IDDPMPreconditioning(), sigma_max=80.0),
}
