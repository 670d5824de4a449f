"""Peak memory of steps on a GPU, counted without one: `python -m benchmarks.counted_memory`.

Runs the steps of `benchmarks.methods` with tensors that have shapes but no numbers, and adds up the
bytes that are alive at once: weights, Adam's two states, rows, activations and intermediate
results. The peak is over three steps, as there. It does not include the workspace of kernels, the
allocator's rounding and Adam's own step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from ant_lightning.backbones import unet_blocks
from ant_lightning.balancing import auto
from ant_lightning.balancing.one_pass import engine, layer_rules, task_parameters
from benchmarks.memory import LiveBytes
from benchmarks.methods import memory_lines
from benchmarks.steps import Cell, Stepper
from studies.provenance import commit

__all__ = ["CountedGPU", "counted_memory"]

NAMES = ("uw", "pcgrad", "official", "loop", "one_pass", "low_memory")
_aten = torch.ops.aten
_MAKERS = {
    _aten.empty.memory_format,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.randn.default,
    _aten.zeros.default,
}
_SMALL = 100_000  # smaller new tensors are real: timesteps, tasks, schedules


class Shaped(Tensor):
    """A tensor without numbers that stands for one on a GPU."""

    @staticmethod
    def __new__(cls: type[Shaped], value: Tensor) -> Shaped:
        """Make one with the shape and layout of `value`, which is on no device."""
        made: Shaped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=torch.device("cpu"),  # where autocast, autograd and attention work without a GPU
        )
        made.value = value
        return made

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        """As `__new__`."""

    def data_ptr(self) -> int:
        """A number that views of the same tensor at the same place share."""
        storage: Any = self.value.untyped_storage()
        return hash((storage._cdata, self.value.storage_offset()))

    def tolist(self) -> list[list[bool]]:
        """Answer one pass's check of a layer: reached by a gradient, samples not mixed."""
        return [[row == 0] * self.shape[1] for row in range(self.shape[0])]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:  # noqa: ANN401
        raise AssertionError(f"{func} outside of CountedGPU")


class _TaskParameter(Shaped):
    __torch_function__ = task_parameters.TaskParameter.__torch_function__


class _TaskView(Shaped):
    __torch_function__ = task_parameters.TaskView.__torch_function__


def _as_view(value: Any, leaf: Tensor) -> Any:  # noqa: ANN401
    value.__class__, value.leaf = _TaskView, leaf
    return value


class CountedGPU(TorchDispatchMode):
    """Context in which large tensors, and tensors made of them, have no numbers and are counted.

    Attributes:
        bytes: Bytes of the tensors that are alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = LiveBytes()

    def __enter__(self) -> CountedGPU:
        """Use the rules of a GPU where they affect memory."""
        self._rules = ExitStack()
        cast = layer_rules._cast

        def cast_as_there(value: Tensor, *, to_norm: bool = False) -> Tensor:
            return _single(value) if to_norm else cast(value)

        for place, name, rule in (
            (engine, "TaskParameter", _TaskParameter),
            (task_parameters, "TaskParameter", _TaskParameter),
            (task_parameters, "TaskView", _TaskView),
            (task_parameters, "_as_view", _as_view),
            (layer_rules, "_cast", cast_as_there),
            (torch, "group_norm", _in_single(torch.group_norm)),
            (torch, "layer_norm", _in_single(torch.layer_norm)),
            (unet_blocks, "_MIN_FUSED_POSITIONS", float("inf")),
            (auto, "_CPU", auto._OTHERS),
        ):
            self._rules.enter_context(mock.patch.object(place, name, rule))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Restore the rules of the CPU."""
        super().__exit__(*error)
        self._rules.close()

    def network(self, cell: Cell) -> nn.Module:
        """The cell's network, without numbers."""
        model = Cell(cell.network, cell.batch_size, "meta").build()
        with self:
            for part in model.modules():
                for name, p in part._parameters.items():
                    if p is not None:
                        part._parameters[name] = nn.Parameter(self._shaped(p), p.requires_grad)
                for name, buffer in part._buffers.items():
                    part._buffers[name] = None if buffer is None else self._shaped(buffer)
        return model

    def _shaped(self, value: Tensor) -> Shaped:
        value = value.detach()
        self.bytes.add(value)
        return Shaped(value)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        makes = func in _MAKERS
        if not any(isinstance(each, Shaped) for each in given):
            size = next((each for each in args if isinstance(each, (list, tuple))), ())
            if not makes or torch.Size(size).numel() < _SMALL:
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return 1.0
        inside, named = tree_map_only(Tensor, _without_numbers, (args, kwargs))
        if "device" in named or makes:
            named["device"] = torch.device("meta")
        result = func(*inside, **named)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.bytes.add(each)
        result = tree_map_only(Tensor, Shaped, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def _without_numbers(value: Tensor) -> Tensor:
    if isinstance(value, Shaped):
        return value.value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _single(value: Tensor) -> Tensor:
    """Cast as autocast does for a norm on a GPU."""
    return value.float() if torch.is_autocast_enabled("cpu") else value


def _in_single(norm: Any) -> Any:  # noqa: ANN401
    return lambda input, *args, **kwargs: norm(_single(input), *args, **kwargs)


def counted_memory(cell: Cell, names: Sequence[str]) -> tuple[dict[str, float], int]:
    """Peak MiB of a step of vanilla and of each of `names`, and the number of parameters."""
    gpu, found = CountedGPU(), {}
    model = gpu.network(cell)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name in ("vanilla", *names):
        with gpu:
            stepper = Stepper(name, cell, model)
            with mock.patch.object(stepper.optimizer, "step"):
                gpu.bytes.peak = 0
                for _ in range(3):
                    stepper.step()
        found[name] = (gpu.bytes.peak + 8 * numbers) / 2**20
        del stepper
        model.zero_grad()
        gc.collect()
    return found, numbers


def _chosen() -> Iterator[Cell]:
    """The cells of a GPU run, and the DiTs of a CPU run."""
    for network in ("DiT-S/2", "DiT-B/2", "LDM FFHQ", "ADM light, 256 px"):
        for batch_size in (50, 256):
            yield Cell(network, batch_size, bf16=True)
    for size, tokens in itertools.product(("0.3M", "3M", "33M"), (16, 64, 256)):
        yield Cell(f"{size}/{tokens}", 40)


def main() -> None:
    """Print the table of docs/benchmarks.md and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/counted_memory.json"))
    args = parser.parse_args()
    origin = {"counted": True, "commit": commit()}
    print(
        f"Counted, commit {origin['commit']}\n\n"
        "| network | batch | method | peak MiB | relative to vanilla | above vanilla, in k p 4 "
        "bytes | target, at most |\n|---|---|---|---|---|---|---|"
    )
    memory: list[dict[str, Any]] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for cell in _chosen():
        for row, line in memory_lines(cell, *counted_memory(cell, NAMES)):
            memory.append(row)
            print(line, flush=True)
        args.output.write_text(json.dumps({**origin, "memory": memory}, indent=1))


if __name__ == "__main__":
    main()
