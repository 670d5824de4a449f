"""Where the weights of InceptionV3 are, and whether they can be had; without PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.request import urlopen

from ant_lightning.errors import ConfigError

# That of torch-fidelity.
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


def inception_file() -> Path:
    """The file in torch hub's checkpoint folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    home = Path(os.environ.get("TORCH_HOME", cache))
    return home.expanduser() / "hub" / "checkpoints" / URL.rpartition("/")[2]


def no_weights(error: OSError, path: Path) -> ConfigError:
    """The error for weights that cannot be downloaded: which file to put where."""
    return ConfigError(
        f"weights: could not be downloaded ({error}); put {path.name} from {URL} into "
        f"{path.parent}, or give its path as `weights` of the extractor InceptionFeatures"
    )


def without_weights(error: ConfigError, option: str) -> ConfigError:
    """The same error with another way: `option` sets the extractor."""
    return ConfigError(
        f"{error}; or score colour images by a network that the package has, "
        f"{option} ant_lightning.ShapesFeatures"
    )


def check_download() -> str | None:
    """Check that the weights are here or can be downloaded.

    Returns:
        What is to be downloaded, in words; `None` if the weights are here.

    Raises:
        ConfigError: If they are not, and their host cannot be reached.
    """
    path = inception_file()
    if path.exists():
        return None
    try:
        with urlopen(URL, timeout=10) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except OSError as error:  # urllib's URLError is one
        raise no_weights(error, path) from error
    return f"downloads the weights of InceptionV3, {size / 2**20:.0f} MB, from {URL} to {path}"
