"""Networks and problems on which the engines are compared with the loop."""

import timestep_features
import torch
from torch import nn

from ant_lightning import DiT, NashMTL, UNet, multitask_backward

EQUAL = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])
NEARLY = torch.tensor([2, 1, 0, 1, 3, 0, 2, 3, 1])  # one task has one more
UNEQUAL = torch.tensor([0, 1, 1, 4, 4, 0, 4, 1, 3, 1, 0])  # and nobody is of task 2


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


def dit(depth=2, **settings):
    network = DiT(input_size=8, in_channels=4, hidden_size=8, depth=depth, num_heads=2, **settings)
    return timestep_features.exact(network)


def unet():
    sizes = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}
    network = UNet(
        input_size=8,
        in_channels=4,
        out_channels=4,
        attention_resolutions=(2,),
        num_classes=5,
        **sizes,
    )
    return timestep_features.exact(network)


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


class Scaled(nn.Module):
    """A parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x, timesteps, labels):
        return self.layer(x) * self.scale


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
