"""Where a number came from: commit, configuration, machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path

__all__ = ["commit", "config_hash", "machine"]

_HERE = Path(__file__).resolve().parent


def commit() -> str:
    """Short hash of the checked-out commit; `+` if tracked files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=_HERE, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("diff", "--stat", "HEAD") else "")


def config_hash(config: object) -> str:
    """Hash of anything that JSON can write."""
    text = json.dumps(config, sort_keys=True, default=str).encode()
    return hashlib.sha256(text).hexdigest()[:12]


def machine(threads: int | None = None) -> str:
    """Processor, threads (by default those of this process), versions."""
    import torch  # noqa: PLC0415 - a study that runs elsewhere need not wait for it

    threads = threads or torch.get_num_threads()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{model}, {threads} threads, {device}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
