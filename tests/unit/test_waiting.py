"""How often a balancer waits for the device that its Gramian is on."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ant_lightning.balancing import NashMTL, PCGrad

MOST = {"pcgrad": 0, "nash": 1}
BALANCERS = {"pcgrad": lambda: PCGrad(5), "nash": lambda: NashMTL(5, update_every=1)}
ACCELERATOR = torch.device("meta")  # a name only: what is on it has its numbers in `value`


def random_gramian():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows @ rows.T


class Remote(torch.Tensor):
    """A tensor on a made-up accelerator."""

    @staticmethod
    def __new__(cls, value):
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=ACCELERATOR, strides=value.stride()
        )
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside the mode")


class Waits(TorchDispatchMode):
    """Computes on the accelerator, and lists the calls for which the host has to wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        remote = any(isinstance(leaf, Remote) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        to_remote = device is not None and torch.device(device) == ACCELERATOR
        copy = func is torch.ops.aten._to_copy.default
        asks = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        asks |= {torch.ops.aten.equal.default}
        if remote and (func in asks or (copy and device is not None and not to_remote)):
            self.found.append(f"{func} of what is on the device")
        if copy and to_remote and not remote and not kwargs.get("non_blocking"):
            self.found.append("a blocking copy to the device")
        if to_remote:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(Remote, lambda t: t.value, (args, kwargs))
        result = func(*args, **kwargs)
        stays = to_remote or (remote and device is None)
        return tree_map_only(torch.Tensor, Remote, result) if stays else result


@pytest.mark.parametrize("name", BALANCERS)
def test_balancers_wait_for_the_device_at_most_once(name):
    gramian, balancer, local = random_gramian(), BALANCERS[name](), BALANCERS[name]()
    with Waits() as waits:
        weights = balancer(Remote(gramian))
    assert len(waits.found) <= MOST[name], waits.found
    torch.testing.assert_close(weights.value, local(gramian))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BALANCERS)
def test_balancers_wait_for_a_gpu_at_most_once(name):
    balancer, gramian = BALANCERS[name](), random_gramian().cuda()
    balancer(gramian)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            balancer(gramian)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [str(each.message) for each in said if "called a synchronizing" in str(each.message)]
    assert len(waits) <= MOST[name], waits
