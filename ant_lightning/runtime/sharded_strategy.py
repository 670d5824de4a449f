"""Lightning's strategy for FSDP2, with checkpoints that any number of ranks can read."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh

from ant_lightning.balancing.local_parts import from_full, full_tensor, is_sharded
from ant_lightning.errors import CheckpointWriteError, ConfigError, FileError, check_at_least
from ant_lightning.files.checkpoint_shards import (
    check_shards,
    fill_shards,
    new_shards_folder,
    put,
    separated,
    write_shards,
)
from ant_lightning.runtime.checkpoint_files import AtomicCheckpointIO, read_checkpoint_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 (experimental): parameters, gradients, averages and optimizer state in shards.

    With replicas (HSDP), the shards of one replica are spread over `ranks / num_replicas` ranks.
    Inside a replica parameters are gathered and gradients reduce-scattered in each pass; between
    replicas only gradients are summed. One replica a node keeps the larger traffic inside nodes.

    `--trainer.strategy fsdp2` takes the defaults, `hsdp` takes one replica a node.

    A checkpoint `NAME.ckpt` is a file and a folder `NAME.ckpt.shards...` beside it, in which
    `torch.distributed.checkpoint` keeps each rank's shards. Any number of ranks resumes from it,
    sharded or not, and from the one file that other strategies write.

    Args:
        num_replicas: Number of copies of the shards; 1 shards over all ranks, `nodes` makes one
            copy a node. Neighbouring ranks belong to the same replica.
        save_distributed_checkpoint: Whether each rank writes its own shards, into a folder that all
            ranks share; otherwise rank 0 gathers one tensor after another into one file.
        timeout: Seconds after which a collective fails if a rank is missing.

    Raises:
        ConfigError: If `num_replicas` is below 1 or does not divide the number of ranks.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import ShardedStrategy
        >>> strategy = ShardedStrategy(num_replicas=2)  # 2 replicas of 4 shards each
        >>> trainer = L.Trainer(accelerator="cpu", devices=8, strategy=strategy, logger=False)
        >>> trainer.strategy.num_processes
        8
    """

    shard_mesh: DeviceMesh  # [shards], or [replicas, shards]

    def __init__(
        self,
        *,
        num_replicas: int | Literal["nodes"] = 1,
        save_distributed_checkpoint: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        if num_replicas != "nodes":
            check_at_least(1, num_replicas=num_replicas)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(seconds=timeout),
        )
        self.num_replicas = num_replicas
        self.checkpoint_io = AtomicCheckpointIO()

    def setup_environment(self) -> None:
        """Make the mesh; the default one would shard nothing on one node."""
        num_ranks = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.num_replicas == "nodes" else self.num_replicas
        if num_ranks % replicas:
            raise ConfigError(f"num_replicas: must divide the {num_ranks} ranks, found {replicas}")
        self._data_parallel_size = num_ranks
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if replicas > 1:
            shape = (replicas, num_ranks // replicas)
            names = ("replicas", "shards")
            self.shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    # Below, module and optimizer give and take their states as under any other strategy, with
    # sharded tensors in them. `ModelParallelStrategy` loses the extra state of modules, where
    # balancers keep their counts, and numbers the optimizer's parameters in another order.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning restore the optimizer, after the module has compared the settings."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, with this rank's parts."""
        assert self.model is not None
        return self.model.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load parts, or cut them from whole tensors."""
        assert self.model is not None
        own = self.model.state_dict()
        stored = checkpoint["state_dict"]
        parts = {n: _part(value, own[n]) if n in own else value for n, value in stored.items()}
        self.model.load_state_dict(parts, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, with this rank's parts."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load parts, or cut them from whole tensors."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = _parameters(optimizer)
            state = {
                number: {name: _part(value, parameters[number]) for name, value in each.items()}
                for number, each in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,  # noqa: ANN401 - Lightning's own loose type
    ) -> None:
        """Write a checkpoint; an existing one stays until the new one is complete. Collective.

        Raises:
            CheckpointWriteError: On every rank, if one of them could not write.
            ConfigError: If shards are to be written to a place that is no folder.
        """
        path = Path(self.broadcast(str(filepath)))
        content, tensors = separated(checkpoint)
        if not self._save_distributed_checkpoint:
            for place, tensor in tensors.items():  # one at a time is whole, on every rank
                full = full_tensor(tensor)
                if self.is_global_zero:
                    put(content, place, full.cpu())
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(content, filepath, storage_options)
            return
        if "://" in str(filepath):
            raise ConfigError(
                "save_distributed_checkpoint: must be false unless the checkpoint's folder is "
                f"local or mounted, found true with {filepath}"
            )
        from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415 - a second

        folder: Path = self.broadcast(new_shards_folder(path))
        try:
            own = write_shards(folder, tensors, rank=self.global_rank)
        # Raised on every rank; a rank's own error may be of any type.
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise CheckpointWriteError(f"{path}: could not be written: {reason}") from error
        files: list[Any] = [None] * self.world_size
        dist.all_gather_object(files, own)
        message = None
        if self.is_global_zero:
            content["shards"] = {
                "folder": folder.name,
                "files": {name: each for part in files for name, each in part.items()},
                "tensors": [list(place) for place in tensors],
            }
            try:
                check_shards(path, content["shards"])
                self.checkpoint_io.save_checkpoint(content, path)
            except FileError as error:
                message = f"{error}; ranks need one shared folder, or save_distributed_checkpoint "
                message += "false"
            except CheckpointWriteError as error:
                message = str(error)
        message = self.broadcast(message)
        if message is not None:
            raise CheckpointWriteError(message)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of a checkpoint, with this rank's parts of sharded tensors. Collective.

        Raises:
            FileError: If the checkpoint is damaged or not safe to read.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        content = read_checkpoint_file(path)
        if "shards" in content:
            # Each rank checks a share of the files; one that fails ends all.
            check_shards(path, content["shards"], share=(self.global_rank, self.world_size))
            fill_shards(path, content, self._empty)
        return content

    def _empty(
        self, place: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """Memory for a stored tensor: sharded like the parameter that it belongs to."""
        assert self.model is not None
        like: Tensor | None
        if place[0] == "optimizer_states":
            if place[1] >= len(self.optimizers):  # an evaluation has none
                return None
            like = dict(enumerate(_parameters(self.optimizers[place[1]]))).get(place[3])
        else:  # averages have the names of the backbone's parameters
            own: dict[str, Tensor] = dict(self.model.named_parameters())
            like = own.get(place[-1], own.get(f"backbone.{place[-1]}"))
        if like is None or like.shape != shape:  # the module says later what does not fit
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(like.detach(), dtype=dtype)


# Names for `--trainer.strategy`.
StrategyRegistry.register("fsdp2", ShardedStrategy, "Shards over all ranks", override=True)
StrategyRegistry.register(
    "hsdp", ShardedStrategy, "Shards over the ranks of a node", override=True, num_replicas="nodes"
)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters, as its state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _part(value: Any, like: Any) -> Any:  # noqa: ANN401 - states hold other values too
    """This rank's part of a whole tensor of a sharded parameter; other values as they are."""
    tensors = isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor)
    if not tensors or not is_sharded([like]) or is_sharded([value]) or value.shape != like.shape:
        return value
    # A copy: the whole tensor is a map of the file.
    return from_full(value, like).clone()
