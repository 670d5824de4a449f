"""A GPU that is not there: its tensors keep their numbers on the CPU.

Inside the mode what would fail on a GPU fails, tensors on two devices above all, and the calls for
which the host would wait are listed.
"""

import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import ant_lightning
from ant_lightning.balancing.one_pass import engine, task_parameters

GPU = torch.device("cuda", 0)
_OURS = str(Path(ant_lightning.__file__).parent)
_aten = torch.ops.aten
_ASKS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.masked_select.default,
}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}


class Remote(Tensor):
    """A tensor on the GPU."""

    device = GPU  # PyTorch itself is told "meta", which needs no driver

    @staticmethod
    def __new__(cls, value):
        made = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device="meta",
        )
        made.value = value
        return made

    def data_ptr(self):
        return self.value.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside the mode")


class _TaskParameter(Remote):
    __torch_function__ = task_parameters.TaskParameter.__torch_function__


class _TaskView(Remote):
    __torch_function__ = task_parameters.TaskView.__torch_function__


def _as_view(value, leaf):
    value.__class__, value.leaf = _TaskView, leaf
    return value


class PretendedGPU(TorchDispatchMode):
    """Computes on the GPU; `waits` are the calls for which the host waits, and our line of each."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits = []
        monkeypatch.setattr(torch.cuda, "_initialized", True)
        # Autocast can be told of; as PyTorch is told "meta", it converts nothing.
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        # Parameters with a leaf for each task are of a class of their own, here of a remote one.
        monkeypatch.setattr(engine, "Tensor", Remote)
        for module in (engine, task_parameters):
            monkeypatch.setattr(module, "TaskParameter", _TaskParameter)
        monkeypatch.setattr(task_parameters, "TaskView", _TaskView)
        monkeypatch.setattr(task_parameters, "_as_view", _as_view)

    def move(self, module):
        """Have all parameters and buffers of `module` on the GPU."""
        with self:
            for part in module.modules():
                for name, p in part._parameters.items():
                    if p is not None:
                        remote = nn.Parameter(Remote(p.detach()), p.requires_grad)
                        part._parameters[name] = remote
                for name, buffer in part._buffers.items():
                    part._buffers[name] = None if buffer is None else Remote(buffer)
        return module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        device = kwargs.get("device")
        to_remote = device is not None and torch.device(device).type != "cpu"
        if not to_remote and not any(isinstance(leaf, Remote) for leaf in leaves):
            return func(*args, **kwargs)
        if func in _ASKS:
            self._note(func)
        inside, outside = tree_map_only(Remote, lambda t: t.value, (args, kwargs)), args[0]
        inside, named = tree_map_only(torch.device, lambda _: torch.device("cpu"), inside)
        result = func(*inside, **named)
        if func is _aten._to_copy.default:
            arrives, leaves_it = type(outside) is Tensor, device is not None and not to_remote
            if leaves_it or (arrives and not kwargs.get("non_blocking")):
                self._note(func)
            return result if leaves_it else Remote(result)
        if func is _aten.copy_.default:
            here = [type(each) is Tensor and each.ndim > 0 for each in args[:2]]
            if any(here) and not kwargs.get("non_blocking"):
                self._note(func)
            return outside
        mixed = [leaf for leaf in leaves if type(leaf) is Tensor and leaf.ndim]
        if func in _BY_INDEX:
            positions = [each for each in args[1] if each is not None]
            if any(type(each) is Tensor or each.dtype == torch.bool for each in positions):
                self._note(func)
            mixed = [outside] if type(outside) is Tensor else []
        assert not mixed, f"{func}: found tensors on two devices, called at {_line()}"
        result = tree_map_only(Tensor, Remote, result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _note(self, func):
        self.waits.append(f"{func} at {_line()}")


def _line():
    """Where our code is."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(_OURS)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "a test"
