"""Networks whose parameters are stored in unusual ways, and what plain autograd says of them."""

import torch
from torch import nn

from ant_lightning import PCGrad, UncertaintyWeighting
from ant_lightning.balancing.parameters import is_dense

K, B = 3, 12
TASKS = torch.tensor([0, 1, 2, 2, 1, 0, 2, 0, 2, 1, 0, 2])


class Network(nn.Module):
    """A convolution and two linear layers; `change(network)` exchanges parameters."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.out = nn.Conv2d(3, 4, 3), nn.Linear(16, 16), nn.Linear(16, 5)
        self.double()
        change(self)

    def forward(self, x):
        x = self.conv(x).tanh().flatten(1)
        return self.out(self.linear(x).tanh())


class Scaled(Network):
    """With a parameter that no layer holds."""

    def forward(self, x):
        scale = self.scale.sum().real if self.scale.is_complex() else self.scale
        return super().forward(x) * scale


class Tokens(Network):
    """Learned rows are added to the input."""

    def forward(self, x):
        numbers = (x[:, 0, 0].abs() * 10).long() % 9
        return super().forward(x) + self.table(numbers).sum(1)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype) / 4


def set_weight(layer, value):
    def change(network):
        getattr(network, layer).weight = nn.Parameter(value())

    return lambda: Network(change)


def set_scale(value):
    def change(network):
        network.scale = nn.Parameter(value())

    return lambda: Scaled(change)


def _tie(network):
    network.again = network.linear
    network.linear.bias = nn.Parameter(network.linear.bias.detach().clone())


def _freeze(network):
    network.conv.requires_grad_(False)
    network.linear.bias.requires_grad_(False)


def _sparse_table(network):
    network.table = nn.Embedding(9, 5, sparse=True).double()


def _two_slices(network):
    memory = normal(16, 32)
    network.linear.weight = nn.Parameter(memory[:, ::2])
    network.out.weight = nn.Parameter(memory[:5, 1::2])


RIGHT = {
    "ordinary": lambda: Network(lambda network: None),
    "stem cut to 3 channels": set_weight("conv", lambda: normal(4, 6, 3, 3)[:, :3]),
    "window of kernels": set_weight("conv", lambda: normal(4, 3, 5, 5)[..., 1:4, 1:4]),
    "channels last": lambda: Network(lambda network: None).to(memory_format=torch.channels_last),
    "every second column": set_weight("linear", lambda: normal(16, 32)[:, ::2]),
    "last, every second column": set_weight("out", lambda: normal(5, 32)[:, ::2]),
    "transposed": set_weight("linear", lambda: normal(16, 16).t()),
    "transposed and cut": set_weight("out", lambda: normal(16, 10).t()[:5]),
    "two slices of one memory": lambda: Network(_two_slices),
    "tied": lambda: Network(_tie),
    "frozen": lambda: Network(_freeze),
    "scale of every third number": set_scale(lambda: normal(15)[::3]),
    "scale on a diagonal": set_scale(lambda: normal(5, 5).diagonal()),
    "empty": lambda: Network(lambda network: setattr(network, "none", nn.Parameter(normal(0, 3)))),
    "scalar": set_scale(lambda: normal(1)[0]),
    "float32 among float64": set_scale(lambda: normal(5, dtype=torch.float32)),
    "bfloat16 among float64": set_scale(lambda: normal(5, dtype=torch.bfloat16)),
    "sparse gradient": lambda: Tokens(_sparse_table),
}
REFUSED = {
    "expanded": (set_scale(lambda: normal(1).expand(5)), "shape [5], dtype float64, strides [0]"),
    "windows that overlap": (
        set_scale(lambda: normal(6).unfold(0, 5, 1)[0:2]),
        "shape [2, 5], dtype float64, strides [1, 1]",
    ),
    "complex": (
        set_scale(lambda: normal(5, dtype=torch.complex128)),
        "dtype complex128, strides [1]; keep its torch.view_as_real",
    ),
    "8 bits": (
        set_scale(lambda: torch.ones(5).to(torch.float8_e4m3fn)),
        "dtype float8_e4m3fn, strides [1]",
    ),
    "sparse": (set_scale(lambda: normal(5).to_sparse()), "shape [5] and layout torch.sparse_coo"),
    "lazy": (
        lambda: Network(lambda network: setattr(network, "later", nn.LazyLinear(3))),
        "which has none yet",
    ),
}
BALANCERS = {
    "none": lambda: None,
    "uw": lambda: UncertaintyWeighting(K),
    "pcgrad": lambda: PCGrad(K),
}


def batch():
    torch.manual_seed(1)
    return torch.randn(B, 3, 4, 4, dtype=torch.float64)


def losses_of(network, x, tasks):
    return lambda rows: network(x[rows]).square().mean(1) * (1 + tasks[rows])


def by_autograd(network, task_weights):
    """Gradients as `backward` leaves them, and the Gramian, of the whole batch in one process."""
    losses = losses_of(network, batch(), TASKS)
    parameters = [p for p in network.parameters() if p.requires_grad]
    tasks = [losses((i == TASKS).nonzero()[:, 0]).mean() for i in range(K)]
    rows = []
    for loss in tasks:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.to_dense().flatten().double() for g in found]))
    for p in network.parameters():
        p.grad = None
    sum(w * loss for w, loss in zip(task_weights.tolist(), tasks, strict=True)).backward()
    matrix = torch.stack(rows)
    return {n: p.grad for n, p in network.named_parameters()}, matrix @ matrix.T


_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def assert_right(network, report, *, tolerance=1e-12):
    """`.grad` of the network and the report's Gramian are those of autograd."""
    parameters = list(network.parameters())
    tolerance = max(tolerance, *(_ROUNDING[p.dtype] for p in parameters))
    found = {n: p.grad for n, p in network.named_parameters()}
    expected, gramian = by_autograd(network, report.task_weights)
    dense = [g.to_dense() for g in expected.values() if g is not None]
    largest = max(g.abs().max() for g in dense if g.numel())
    for name, p in network.named_parameters():
        if not p.requires_grad:
            assert found[name] is None, name
            continue
        # Of an unused parameter we say zero where autograd says nothing.
        want = torch.zeros_like(p) if expected[name] is None else expected[name].to_dense()
        assert found[name].dtype == p.dtype, name
        if is_dense(p):
            assert found[name].stride() == p.stride(), name
        torch.testing.assert_close(found[name] / largest, want / largest, rtol=0, atol=tolerance)
    if report.gramian is not None:
        scale = gramian.abs().max()
        torch.testing.assert_close(report.gramian / scale, gramian / scale, rtol=0, atol=tolerance)
