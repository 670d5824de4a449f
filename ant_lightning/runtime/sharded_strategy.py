"""Lightning's strategy for FSDP2, with checkpoints that any number of ranks can read."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

__all__ = ["ShardedStrategy"]


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 (experimental): parameters, gradients, averages and optimizer state in shards.

    With replicas (HSDP), the shards of one replica are spread over `ranks / num_replicas` ranks.
    Inside a replica parameters are gathered and gradients reduce-scattered in each pass; between
    replicas only gradients are summed. One replica a node keeps the larger traffic inside nodes.

    A checkpoint is one file with whole tensors, as one process or DDP writes it, so that runs with
    and without shards can resume from each other. `ModelParallelStrategy` itself loses the extra
    state of modules when it reads such a file, and numbers the optimizer's parameters differently.

    Args:
        num_replicas: Number of copies of the shards; 1 shards over all ranks. Neighbouring ranks
            belong to the same replica.
        timeout: Seconds after which a collective fails if a rank is missing.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import ShardedStrategy
        >>> strategy = ShardedStrategy(num_replicas=2)  # 2 replicas of 4 shards each
        >>> trainer = L.Trainer(accelerator="cpu", devices=8, strategy=strategy, logger=False)
        >>> trainer.strategy.num_processes
        8

    Raises:
        ConfigError: If `num_replicas` is below 1 or does not divide the number of ranks.
    """

    shard_mesh: DeviceMesh  # [shards], or [replicas, shards]

    def __init__(self, *, num_replicas: int = 1, timeout: float = 1800.0) -> None:
        check_at_least(1, num_replicas=num_replicas)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout),
        )
        self.num_replicas = num_replicas

    def setup_environment(self) -> None:
        """Make the mesh; the default one would shard nothing on one node."""
        num_ranks = self.num_nodes * self.num_processes
        if num_ranks % self.num_replicas:
            raise ConfigError(
                f"num_replicas: must divide the {num_ranks} ranks, found {self.num_replicas}"
            )
        self._data_parallel_size = num_ranks
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if self.num_replicas > 1:
            shape = (self.num_replicas, num_ranks // self.num_replicas)
            names = ("replicas", "shards")
            self.shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on rank 0, numbered as the optimizer of one process numbers them."""
        import torch.distributed.checkpoint.state_dict as dcp  # noqa: PLC0415 - a second

        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.model is not None
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = dcp.get_optimizer_state_dict(self.model, optimizer, options=options)
        if not found:  # on every rank but 0
            return found
        # From names to numbers, which a run of one process or of DDP expects.
        return _renamed(found, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this rank's shards from the file; return its content without the weights."""
        import torch.distributed.checkpoint.state_dict as dcp  # noqa: PLC0415

        assert self.model is not None
        # Mapped: no rank holds a copy of the whole file in memory.
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only
        )
        # `full_state_dict`: torch cuts this rank's shards from whole tensors.
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):
            names = dict(enumerate(self._names(optimizer)))
            state = _renamed(state, names)  # noqa: PLW2901
            dcp.set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the optimizer's parameters in the optimizer's order.

        The order of the module differs if there are several groups or frozen parameters.
        """
        assert self.model is not None
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer, with each key of a parameter replaced by `names[key]`."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            group | {"params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }
