"""Every engine gives the gradients of the loop, or says why it cannot."""

import copy
import weakref

import pytest
import tiny_digits
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from ant_lightning.backbones import DiT, UNet
from ant_lightning.balancing import (
    Auto,
    Loop,
    LowMemory,
    NashMTL,
    OnePass,
    PCGrad,
    Reduction,
    UnsupportedError,
    Vmap,
    auto,
    multitask_backward,
    task_gradients,
)
from ant_lightning.balancing.batch import TaskBatch
from ant_lightning.balancing.factors import layers_to_factor
from ant_lightning.balancing.groups import Groups
from ant_lightning.balancing.taps import Taps
from ant_lightning.data import DigitsData
from ant_lightning.errors import ConfigError
from ant_lightning.modules.row_buffers import engine_and_rows

EQUAL = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])
NEARLY = torch.tensor([2, 1, 0, 1, 3, 0, 2, 3, 1])  # one task has one more
UNEQUAL = torch.tensor([0, 1, 1, 4, 4, 0, 4, 1, 3, 1, 0])  # and nobody is of task 2
ENGINES = [OnePass, LowMemory, Vmap, Auto]


class Everything(nn.Module):
    """Each kind of layer that has a rule; a tied weight, a frozen bias, an unused parameter."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv3d(1, 4, 3, padding=1, stride=(2, 1, 1))
        self.group_norm = nn.GroupNorm(2, 4)
        self.conv2 = nn.Conv2d(4, 8, 3, groups=2, dilation=1)
        self.conv1 = nn.Conv1d(8, 8, 1)
        self.layer_norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.table = nn.Embedding(5, 8)
        self.inplace = nn.ReLU(inplace=True)
        self.unused = nn.Parameter(torch.ones(3))
        self.linear.bias.requires_grad_(False)

    def forward(self, x, timesteps, labels):
        x = self.group_norm(self.conv3(x.unflatten(1, (1, 4))).sum(2))
        x = self.conv1(self.inplace(self.conv2(x)).flatten(2)).mT
        x = self.inplace(self.linear(self.layer_norm(x))).tanh() + self.table(labels)[:, None]
        return self.linear(x.mean(1))[:, :, None, None]


def dit(**settings):
    return DiT(input_size=8, in_channels=4, hidden_size=8, depth=2, num_heads=2, **settings)


def unet():
    sizes = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}
    return UNet(
        input_size=8,
        in_channels=4,
        out_channels=4,
        attention_resolutions=(2,),
        num_classes=5,
        **sizes,
    )


class OnePosition(nn.Module):
    """Maps of one position and sequences of one token."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 8), nn.GroupNorm(2, 6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x, timesteps, labels):
        return self.linear(self.norm(self.conv(x)).flatten(2).mT)[..., None]


class FewPositions(nn.Module):
    """Layers whose factors are smaller than their gradients, one gradient for two of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 256, 4, stride=5, padding=1)
        self.tokens, self.tied = nn.Linear(256, 128), nn.Linear(128, 128)
        self.frozen, self.bare = nn.Linear(128, 96), nn.Linear(128, 96, bias=False)
        self.frozen.bias.requires_grad_(False)
        self.flat, self.row = nn.Parameter(torch.zeros(128 * 128)), nn.Parameter(torch.ones(1, 128))
        self.dead = nn.Linear(128, 96)

    def forward(self, x, timesteps, labels):
        x = self.tokens(self.conv(x).flatten(2).mT.tanh()).tanh().mean(1)
        x = self.tied(self.tied(x).tanh())
        x = nn.functional.linear(x, self.flat.view(128, 128), self.row[0]).tanh()
        self.dead(x)
        return (self.frozen(x) + self.bare(x))[..., None, None]


class OnlyFactors(nn.Module):
    """No layer has rows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, x, timesteps, labels):
        return self.layers(x[:, :, :4].flatten(1))[..., None, None]


class Keeping(nn.Module):
    """A view that is made once and kept, and a copy made on the way."""

    def __init__(self):
        super().__init__()
        self.layer, self.view = nn.Conv2d(4, 4, 1), None

    def forward(self, x, timesteps, labels):
        view = self.layer.weight.view(4, 4) if self.view is None else self.view
        if torch.is_grad_enabled():
            self.view = view
        copied = copy.deepcopy(self.layer)
        assert type(copied.weight) is nn.Parameter
        x = copied(x).detach().movedim(1, 3)
        return nn.functional.linear(x, view, self.layer.bias).movedim(3, 1)


NETWORKS = {
    "dit": lambda: dit(num_classes=5),
    "unet": unet,
    "everything": Everything,
    "one position": OnePosition,
    "few positions": FewPositions,
    "only factors": OnlyFactors,
}


class Problem:
    """A regression in float64 with random weights everywhere."""

    def __init__(self, network, tasks, dtype=torch.float64):
        torch.manual_seed(0)
        self.network, self.tasks = network().to(dtype), tasks
        with torch.no_grad():
            for p in self.network.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        self.x = torch.randn(len(tasks), 4, 8, 8, dtype=dtype)
        self.labels = torch.randint(0, 5, (len(tasks),))

    def losses(self, rows):
        out = self.network(self.x[rows], 100 * self.tasks[rows], self.labels[rows])
        return (out - 1).square().mean((1, 2, 3)) * (1 + self.tasks[rows])

    def run(self, engine, *, calls=1, **settings):
        balancer = NashMTL(int(self.tasks.max()) + 1, update_every=1)
        parameters = list(self.network.parameters())
        for _ in range(calls):
            report = multitask_backward(
                self.losses, self.tasks, parameters, balancer, engine=engine, **settings
            )
        return report, torch.cat([p.grad.flatten() for p in parameters if p.requires_grad])


def assert_same(found, expected, tolerance=1e-10):
    for name in ("gramian", "task_losses", "task_weights", "grad_norm", "num_samples"):
        a, b = getattr(found[0], name), getattr(expected[0], name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12, equal_nan=True)
    scale = expected[1].abs().max()
    torch.testing.assert_close(found[1] / scale, expected[1] / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "tasks", [EQUAL, NEARLY, UNEQUAL], ids=["equal", "nearly equal", "unequal"]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_engines_give_the_numbers_of_the_loop(network, tasks, engine):
    problem = Problem(NETWORKS[network], tasks)
    expected = problem.run(Loop())
    made = engine()
    assert_same(problem.run(made, calls=2, loss_scale=1.0), expected)
    scaled = problem.run(made, loss_scale=torch.tensor(8.0))
    assert_same((scaled[0], scaled[1] / 8), expected)
    assert getattr(made, "reason", None) is None


@pytest.mark.parametrize("engine", [Loop, OnePass])
def test_gradients_have_the_memory_layout_of_their_parameters(engine):
    problem = Problem(FewPositions, EQUAL)
    problem.network.to(memory_format=torch.channels_last)
    assert not problem.network.conv.weight.is_contiguous()
    problem.run(engine())
    for p in problem.network.parameters():
        assert p.grad is None or p.grad.stride() == p.stride()


@pytest.mark.parametrize("engine", [OnePass, LowMemory, Auto])
def test_a_network_may_keep_a_view_of_a_parameter_and_copies_are_not_watched(engine):
    problem = Problem(Keeping, EQUAL)
    expected = problem.run(Loop(), calls=3)
    problem.network.view = None
    assert_same(problem.run(engine(), calls=3), expected)
    assert type(problem.network.view) is torch.Tensor


class Embedded(nn.Module):
    """An embedding with settings of which `OnePass` has no rule."""

    def __init__(self, **settings):
        super().__init__()
        self.table = nn.Embedding(5, 4, **settings)

    def forward(self, x, timesteps, labels):
        return x + self.table(labels)[:, :, None, None]


class Stopped(nn.Module):
    """A weight that is used once as it is, and once, in a view of it, as a constant."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x, timesteps, labels):
        with torch.no_grad():
            constant = self.layer.weight.view(4, 4)
        return self.layer(x) + nn.functional.linear(x.movedim(1, 3), constant).movedim(3, 1)


@pytest.mark.parametrize(
    "network",
    [
        lambda: Embedded(padding_idx=0),
        lambda: Embedded(padding_idx=2),
        lambda: Embedded(max_norm=2.0),
        lambda: Embedded(scale_grad_by_freq=True),
        Stopped,
    ],
    ids=["padding 0", "padding 2", "norm", "frequency", "stopped view"],
)
def test_auto_is_right_where_a_layer_means_something_else(network):
    # A limit of the norm changes the weights: a problem for each.
    assert_same(Problem(network, EQUAL).run(Auto()), Problem(network, EQUAL).run(Loop()))


@pytest.mark.parametrize("network", ["dit", "few positions"])
@pytest.mark.parametrize("engine", [OnePass, LowMemory, Vmap])
def test_in_bfloat16_autocast_rows_differ_by_rounding(engine, network):
    problem = Problem(NETWORKS[network], EQUAL, torch.float32)
    exact = problem.run(Loop())
    with torch.autocast("cpu", torch.bfloat16):
        loop, found = problem.run(Loop()), problem.run(engine())
    assert not torch.equal(found[1], exact[1])
    error = (found[1] - exact[1]).norm() / exact[1].norm()
    assert error < 2 * (loop[1] - exact[1]).norm() / exact[1].norm() + 1e-3


class Typed(nn.Module):
    """A weight of a class of its own."""

    class Weight(nn.Parameter):
        pass

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        self.layer.weight = self.Weight(self.layer.weight.double().detach())

    def forward(self, x, timesteps, labels):
        return self.layer(x)


class Scaled(nn.Module):
    """A parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x, timesteps, labels):
        return self.layer(x) * self.scale


class Flat(nn.Module):
    """A linear layer with one output, and no dimension for it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, timesteps, labels):
        return nn.functional.linear(x.movedim(1, 3), self.weight)[:, None]


class Recomputed(nn.Module):
    """Where what is saved without taps has the shapes of what is saved with them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x, timesteps, labels):
        h = self.first(x.flatten(1)[:, :9])
        h = checkpoint(lambda h: self.second(h).tanh(), h, use_reentrant=False)
        return h[..., None, None]


class Mixing(nn.Module):
    """Positions first: as many of them as there are samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, timesteps, labels):
        first = x.flatten(2)[:, :, : len(x)].permute(2, 0, 1)
        return self.layer(first).transpose(0, 1)[..., None]


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Scaled, "found another use of parameters of shape [4, 1, 1]"),
        (Mixing, "depends on samples of another task"),
        (Typed, "parameters of the class Parameter, found"),
        (Flat, "found another use of parameters of shape [4]"),
        (lambda: dit(num_classes=5, gradient_checkpointing=True), "without gradient checkpointing"),
        (Recomputed, "without gradient checkpointing"),
    ],
    ids=["parameter", "mixing", "class", "flat", "checkpointing", "square checkpointing"],
)
def test_one_pass_refuses_a_network_that_does_not_fit_and_auto_takes_the_loop(
    network, words, engine
):
    problem = Problem(network, EQUAL)
    with pytest.raises(UnsupportedError) as error:
        problem.run(engine())
    assert words in str(error.value)
    auto = Auto()
    expected = problem.run(Loop())
    assert_same(problem.run(auto, calls=2), expected)
    assert words in auto.reason


def test_mixing_is_found_as_soon_as_a_gradient_reaches_the_layer():
    problem = Problem(nn.Sequential, EQUAL)
    mixing, last = Mixing().double(), nn.Linear(4, 2).double()
    problem.network = nn.ModuleList([mixing, last])
    problem.losses = lambda rows: (
        last(mixing(problem.x[rows], None, None)[..., 0].mean(1)).square().mean(1)
    )
    with torch.no_grad():
        last.weight.zero_()
    engine = OnePass()
    problem.run(engine)
    with torch.no_grad():
        last.weight.fill_(1.0)
    with pytest.raises(UnsupportedError, match="another task"):
        problem.run(engine)


@pytest.mark.parametrize(
    ("in_all", "for_each", "settings", "expected"),
    [
        (501, 0, {}, OnePass),
        (500, 0, {}, Loop),
        (0, 26, {}, OnePass),
        (0, 25, {}, Loop),
        (501, 0, {"micro_batch_size": 9}, Loop),
    ],
)
def test_auto_chooses_by_the_work_of_a_pass_over_one_task(
    in_all, for_each, settings, expected, monkeypatch
):
    monkeypatch.setattr(auto, "_CPU", (in_all, for_each))
    # 10 samples: 5 of a task, at 10 positions, 10 multiplications at each, with 20 parameters.
    layer, unused = nn.Linear(5, 2, bias=False), nn.Parameter(torch.zeros(10))
    x, tasks = torch.ones(10, 10, 5), torch.arange(10) % 2
    engine = Auto()
    for _ in range(2):
        multitask_backward(
            lambda rows: layer(x[rows]).square().mean((1, 2)),
            tasks,
            [layer.weight, unused],
            PCGrad(2),
            engine=engine,
            **settings,
        )
        assert type(engine.used) is expected


def test_multiplications_are_those_of_the_layers():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1),
        nn.ConvTranspose2d(6, 3, 2, stride=2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(192, 5),
    )
    x, tasks = torch.randn(6, 4, 8, 8), torch.arange(6) % 2
    batch = TaskBatch(
        lambda rows: network(x[rows]).sum(1),
        tasks,
        None,
        2,
        list(network.parameters()),
        reduction=Reduction(),
    )
    state = torch.random.get_rng_state()
    # 6 x 4 x 4 values of 2 x 9 products, 6 x 4 x 4 of 3 x 4, 5 of 192.
    assert auto.multiplications(batch) == 6 * 16 * 18 + 6 * 16 * 12 + 5 * 192
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not batch.values.any()


@pytest.mark.parametrize("engine", [OnePass, LowMemory, Vmap])
def test_whole_batch_engines_refuse_parts(engine):
    problem = Problem(NETWORKS["dit"], EQUAL)
    with pytest.raises(ConfigError, match=r"micro_batch_size: .*found 4; Loop"):
        problem.run(engine(), micro_batch_size=4)


def test_vmap_runs_layers_that_one_pass_has_no_rule_for():
    problem = Problem(Scaled, UNEQUAL)
    assert_same(problem.run(Vmap()), problem.run(Loop()))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key, size):
        self._seen.discard(key)
        self.now -= size


def peak(num_tasks, balancer, engine):
    """Peak bytes of a call on a wide network with few activations, and those of its parameters."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)], nn.Linear(256, 1024))
    x, tasks = torch.randn(16, 256), torch.arange(16) % num_tasks
    parameters = list(network.parameters())

    def losses(rows):
        return network(x[rows]).square().mean(1)

    with LiveBytes() as live:
        multitask_backward(losses, tasks, parameters, balancer, num_tasks=num_tasks, engine=engine)
    return live.peak, 4 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize("num_tasks", [2, 16])
@pytest.mark.parametrize("engine", [LowMemory, OnePass])  # here, layers meet one position
def test_few_positions_need_less_than_one_row_more_than_vanilla(engine, num_tasks):
    vanilla, row = peak(num_tasks, None, None)
    found, _ = peak(num_tasks, PCGrad(num_tasks), engine())
    rows, _ = peak(num_tasks, PCGrad(num_tasks), Loop())
    assert vanilla >= row
    assert found <= vanilla + row
    assert rows > num_tasks * row


@pytest.mark.parametrize(
    ("layer", "shape", "factored"),
    [
        (nn.Linear(64, 64), (32, 64), True),
        (nn.Linear(64, 63), (32, 64), False),  # the factors take more than a gradient
        (nn.Linear(600, 600), (256, 600), True),
        (nn.Linear(600, 600), (257, 600), False),
        (nn.Linear(600, 600), (128, 2, 600), True),
        (nn.Linear(600, 600), (128, 3, 600), False),
        (nn.Conv2d(128, 128, 3, padding=1), (28, 128, 2, 2), True),
        (nn.Conv2d(128, 128, 3, padding=1), (29, 128, 2, 2), False),
        (nn.Conv2d(128, 128, 3, padding=1, groups=2), (25, 128, 2, 2), False),
        (nn.LayerNorm(64), (4, 64), False),
    ],
)
def test_layers_that_meet_few_positions_have_factors(layer, shape, factored):
    taps = Taps(list(layer.parameters()), shape[0])
    with taps:
        layer(torch.randn(shape))
    assert layers_to_factor(taps) == (taps.layers if factored else [])
    assert all(type(p) is nn.Parameter and not hasattr(p, "taps") for p in layer.parameters())
    assert len(taps.layers) == 1


def test_a_compiled_network_recompiles_once_per_shape():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    compiled = torch.compile(network, backend="aot_eager", dynamic=False)
    x = torch.randn(15, 4)

    def losses(rows):
        return compiled(x[rows]).square().mean(1)

    balancer = PCGrad(3)
    parameters = list(network.parameters())

    def step(tasks):
        multitask_backward(losses, tasks, parameters, balancer, engine=Loop())
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    equal = torch.arange(15) % 3
    assert [step(equal) for _ in range(4)] == [1] * 4
    # Tasks of 4, 5 and 6 samples: two new shapes, once each.
    unequal = torch.tensor([0] * 4 + [1] * 5 + [2] * 6)
    assert [step(unequal) for _ in range(4)] == [3] * 4
    assert [step(equal) for _ in range(2)] == [3] * 2
    torch._dynamo.reset()


def test_auto_is_the_loop_for_a_compiled_network():
    model = tiny_digits.module(balancer=PCGrad(3))
    assert type(engine_and_rows(model)[0]) is Auto
    model.backbone.blocks[0].compile(backend="eager")
    assert type(engine_and_rows(model)[0]) is Loop
    model = tiny_digits.module(balancer=PCGrad(3))
    model.backbone = torch.compile(model.backbone, backend="eager")
    assert type(engine_and_rows(model)[0]) is Loop


@pytest.mark.parametrize(
    "sizes", [[2, 3, 2, 2], [2, 2], [3, 0, 2, 2], [1, 5, 5, 5], [4], [2, 4, 2, 3]]
)
def test_sums_of_groups_are_those_of_their_samples(sizes):
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    groups = Groups(starts)
    given = torch.repeat_interleave(torch.tensor(sizes))
    assert torch.equal(groups.order.sort().values, torch.arange(sum(sizes)))
    assert torch.equal(groups.of_samples(torch.device("cpu")), given[groups.order])
    left, right = torch.randn(2, sum(sizes), 3, 4, dtype=torch.float64)
    members = [left[given == group] for group in range(len(sizes))]
    wanted = torch.stack([part.sum((0, 1)) for part in members])
    torch.testing.assert_close(groups.sums(left[groups.order], (1,)), wanted)
    products = [
        part.flatten(0, 1).T @ right[given == group].flatten(0, 1)
        for group, part in enumerate(members)
    ]
    for out in (None, torch.full((len(sizes), 4, 4), torch.nan, dtype=torch.float64)):
        found = groups.products(left[groups.order], right[groups.order], out=out)
        torch.testing.assert_close(found, torch.stack(products))
        assert out is None or found.data_ptr() == out.data_ptr()
    pieces = torch.zeros(len(sizes), 3, 4, dtype=torch.float64)
    for group, piece in groups.pieces():
        pieces[group] += left[groups.order][piece].sum(0)
    torch.testing.assert_close(pieces.sum(1), wanted)


def test_rows_of_the_last_step_are_gone_before_the_next_are_made():
    problem = Problem(NETWORKS["dit"], EQUAL)
    problem.run(Loop())
    plain, left = problem.losses, []

    def losses(rows):
        left.extend(p for p in problem.network.parameters() if p.grad is not None)
        return plain(rows)

    problem.losses = losses
    problem.run(Loop())
    assert not left


def test_a_combination_is_the_last_use_of_rows():
    problem = Problem(NETWORKS["dit"], EQUAL)
    rows = task_gradients(problem.losses, EQUAL, list(problem.network.parameters()), num_tasks=3)
    assert rows.gramian().shape == (3, 3)
    rows.combine_(torch.ones(3))
    for use in (rows.gramian, rows.rows, lambda: rows.combine_(torch.ones(3))):
        with pytest.raises(AssertionError, match="combine_"):
            use()


class Biased(nn.Module):
    """Attention with a learned mask, given by name."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x, timesteps, labels):
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, x, x, attn_mask=self.mask)


def test_vmap_reaches_a_parameter_that_attention_is_given_by_name():
    problem = Problem(Biased, EQUAL)
    assert_same(problem.run(Vmap()), problem.run(Loop()))


@pytest.mark.parametrize("placement", ["spread", "sorted"])
@pytest.mark.parametrize(("every", "held"), [(1, True), (2, False)])
def test_rows_are_held_where_every_step_needs_them(every, held, placement):
    model = tiny_digits.module(
        balancer=NashMTL(3, update_every=every), engine="loop", placement=placement
    )
    engine, rows = engine_and_rows(model)
    x, t = torch.randn(6, *model.image_shape), torch.arange(6)

    def losses(rows):
        return (model.backbone(x[rows], t[rows], t[rows]) - 1).square().mean((1, 2, 3))

    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    multitask_backward(losses, t % 3, parameters, model.balancer, engine=engine, gradients=rows)
    buffers = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
    most = max(buffer.numel() for buffer in buffers)
    assert most >= 3 * sum(p.numel() for p in parameters) if held else most == 0
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("engine", ["one_pass", "vmap", "low_memory", "auto"])
def test_training_is_the_same_with_every_engine(engine, tmp_path):
    def weights(name):
        model = tiny_digits.module(balancer=NashMTL(3, update_every=2), engine=name)
        run = tiny_digits.trainer(tmp_path, steps=3, limit_val_batches=0)
        run.fit(model, datamodule=DigitsData(batch_size=14))
        losses = model.last_report.task_losses
        return torch.cat([p.detach().flatten() for p in model.backbone.parameters()]), losses

    expected, found = weights("loop"), weights(engine)
    # Adam makes steps of 1e-3 of the rounding errors of gradients near zero: compare as a whole.
    assert (found[0] - expected[0]).norm() < 3e-4
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "vmap", "accumulate_grad_batches": 2}, ["model.engine", "vmap", "'loop'"]),
        ({"engine": "low_memory", "placement": "sorted"}, ["model.placement", "low_memory"]),
    ],
)
def test_settings_that_contradict_the_engine_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        tiny_digits.module(balancer=PCGrad(3), **settings)
    assert all(word in str(error.value) for word in words)
