"""The spacings of guided-diffusion by the text or the list that its scripts take."""

from ant_lightning.diffusion.samplers.spacing import space_timesteps, strided_timesteps


def spaced(num_timesteps, counts):
    """Timesteps of "ddim50", or of the counts of each section: "10,15,20" or [10, 15, 20]."""
    if isinstance(counts, str) and counts.startswith("ddim"):
        return strided_timesteps(num_timesteps, int(counts.removeprefix("ddim")))
    if isinstance(counts, str):
        counts = [int(count) for count in counts.split(",")]
    return space_timesteps(num_timesteps, counts)
