"""Keeps the gradients of a measurement until their dot products are made."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import write_json
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.affinity.sketch import HadamardSketch

_MIB = 1 << 20
_BYTES_PER_NUMBER = 24  # working memory of a block of columns: float32, float64 and copies
_BLOCK_BYTES = 1 << 28  # larger blocks are not faster
_MIN_COLUMNS = 256  # narrower blocks would spend their time on overhead
_SKETCH_BYTES = 4 << 24  # working memory of a sketch


class GradientStore:
    """Gradients by timestep and half: in memory or in files, whole or sketched.

    If `torch.distributed` is initialised, rank r of w ranks has the timesteps r, r + w, ... of the
    grid. Use the store as a context manager: its temporary files are deleted on exit.

    Args:
        timesteps: The grid.
        num_parameters: Length of a gradient.
        sketch: Sketches gradients before they are kept; `None` to keep them whole.
        device: Device of the gradients, where dot products are made as well.
        folder: Folder with a file for each gradient, from which a killed measurement resumes.
        identity: Everything that the gradients depend on, by name; it must equal the folder's.
        memory_budget_mb: MiB for gradients and dot products. Gradients that do not fit go to a
            temporary folder. `None` for no limit.
        sharded: Whether ranks share the grid; otherwise this process has all of it.

    Attributes:
        own: Timesteps of this rank.
        gradients: The gradients kept so far, by timestep and half (0 or 1).

    Raises:
        ConfigError: If the budget is too small, or the folder has gradients of another measurement.
    """

    def __init__(
        self,
        timesteps: tuple[int, ...],
        *,
        num_parameters: int,
        sketch: HadamardSketch | None,
        device: torch.device,
        folder: Path | None,
        identity: Mapping[str, Any],
        memory_budget_mb: float | None,
        sharded: bool,
    ) -> None:
        active = sharded and dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)
        self.timesteps, self.own = timesteps, timesteps[self.rank :: self.world_size]
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self._sketch, self._width, self._dtype = sketch, num_parameters, torch.float32
        if sketch is not None:
            # Rounding a sketch to bfloat16 adds about 0.1% to its standard error.
            self._width, self._dtype = sketch.sketch_dim, torch.bfloat16
        self._device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        # NCCL sums only tensors on GPUs, gloo best those on the CPU.
        self._link = device if active and dist.get_backend() == "nccl" else torch.device("cpu")
        self._on_exit = ExitStack()
        in_memory, self._block_bytes = self._plan(memory_budget_mb, num_parameters)
        self._folder = folder
        if folder is not None:
            self._resume(folder, identity)
        elif not in_memory:
            name = self._on_exit.enter_context(TemporaryDirectory(prefix="affinity-"))
            self._folder = Path(name)
        if self._folder is not None:
            self._require_space(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.gradients.clear()  # files must not be mapped while they are deleted
        self._on_exit.close()

    def _require_space(self, folder: Path) -> None:
        """Refuse a disk that cannot hold the gradients, before hours are spent on them."""
        missing = 2 * len(self.own) - len(self.gradients)
        needed, free = missing * self._width * self._dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"resume_dir: must have {needed / 2**30:.1f} GiB for the gradients (fewer with "
                f"sketch_dim or fewer timesteps), found {free / 2**30:.1f} GiB free in {folder}"
            )

    def put(self, timestep: int, half: int, gradient: Float[Tensor, " p"]) -> None:
        """Keep a gradient; if there is a folder, a kill after the call does not lose it."""
        if self._sketch is not None:
            gradient = self._sketch(gradient)
        kept = gradient.to("cpu", self._dtype)
        if self._folder is not None:
            path = self._path(self._folder, timestep, half)
            write_tensors(path, {"gradient": kept}, {})
            kept = self._mapped(path)
        self.gradients[timestep, half] = kept

    def finished(self) -> tuple[int, ...]:
        """The timesteps at the start of the grid for which all ranks have both gradients.

        Collective: every rank must call it.
        """
        # Timesteps go round the w ranks in turn: if each rank finished its first m, the first
        # m w of the grid are finished. A rank that finished all of its own reports n, so that it
        # limits no other. The minimum over ranks is minus the maximum of the negatives.
        kept = [all((t, half) in self.gradients for half in (0, 1)) for t in self.own]
        count = kept.index(False) if False in kept else len(self.timesteps)
        return self.timesteps[: -self.largest(-count) * self.world_size]

    def largest(self, value: int) -> int:
        """The maximum of an integer over ranks; every rank must call this."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._link)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def dot_products(self, timesteps: tuple[int, ...]) -> Float[Tensor, "2 2 n n"]:
        """`result[g, h, i, j] = X_i · Y_j` for the gradients X of half g and Y of half h.

        The products are summed over blocks of columns, so each number is read once and working
        memory does not grow with the length of the gradients. Every rank must call this.

        Args:
            timesteps: The first `n` timesteps of the grid.

        Returns:
            Float64 on the CPU, the same on every rank.
        """
        n = len(timesteps)
        columns = max(1, min(self._width, self._block_bytes // (2 * n * _BYTES_PER_NUMBER)))
        gram = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device=self._device)
        for start in range(0, self._width, columns):
            stop = min(start + columns, self._width)
            block = torch.zeros(2, n, stop - start, device=self._link)
            for i in range(self.rank, n, self.world_size):
                for half in (0, 1):
                    block[half, i] = self.gradients[timesteps[i], half][start:stop]
            if self.world_size > 1:
                dist.all_reduce(block)  # the gradients of other ranks are 0 here
            flat = block.flatten(0, 1).to(self._device).double()
            gram.addmm_(flat, flat.T)
        gram = (gram + gram.T) / 2
        return gram.view(2, n, 2, n).transpose(1, 2).contiguous().cpu()

    def _plan(self, budget_mb: float | None, num_parameters: int) -> tuple[bool, int]:
        """Whether gradients stay in memory, and the bytes of a block of columns."""
        if budget_mb is None:
            return True, _BLOCK_BYTES
        n, budget = len(self.timesteps), int(budget_mb * _MIB)
        products = 3 * (2 * n) ** 2 * 8  # the float64 Gram matrix, and copies to symmetrise it
        least_block = 2 * n * _BYTES_PER_NUMBER * min(self._width, _MIN_COLUMNS)
        # A gradient and its copies on the way to the disk, or a gradient and the sketch's signs.
        one_gradient = 12 * num_parameters
        if self._sketch is not None:
            one_gradient = 6 * num_parameters + _SKETCH_BYTES
        # Gradients are made first; dot products and blocks of columns need memory afterwards.
        least = max(one_gradient, products + least_block)
        if budget < least:
            raise ConfigError(
                f"memory_budget_mb: must be at least {-(-least // _MIB)} for {num_parameters} "
                f"parameters and {n} timesteps, found {budget_mb:g}"
            )
        # Bytes on the rank with the most timesteps. All ranks must plan alike: they sum blocks of
        # columns, which must have equal sizes.
        kept = 2 * -(-n // self.world_size) * self._width * self._dtype.itemsize
        in_memory = kept + least <= budget
        free = budget - products - (kept if in_memory else 0)
        return in_memory, max(least_block, min(_BLOCK_BYTES, free))

    def _resume(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Take over the gradients in the folder of a killed measurement."""
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"resume_dir: must be a folder, found the file {folder}")
        path = folder / "identity.json"
        if not check_identity(path, identity, setting="resume_dir"):
            # Ranks that share the folder may all do this: they write the same bytes.
            write_json(path, identity)
        for timestep in self.own:
            for half in (0, 1):
                path = self._path(folder, timestep, half)
                if path.exists():
                    self.gradients[timestep, half] = self._mapped(path)

    def _path(self, folder: Path, timestep: int, half: int) -> Path:
        return folder / f"gradient_{timestep:06d}_{half}.safetensors"

    def _mapped(self, path: Path) -> Tensor:
        """The gradient in a file, memory-mapped: only the columns that are used are read."""
        tensors, _ = read_tensors(path, {"gradient": (self._dtype, (self._width,))})
        return tensors["gradient"]
