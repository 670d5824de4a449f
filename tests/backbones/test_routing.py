"""Denoising task routing: the published masks, and blocks that see their window alone."""

import numpy as np
import pytest
import torch

from ant_lightning import (
    ChannelRouting,
    ConfigError,
    DiT,
    PCGrad,
    multitask_backward,
)
from ant_lightning.backbones.diffusers_layouts import diffusers_layout

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 20, "depth": 2}
SIZE |= {"num_heads": 2, "num_classes": 0, "learn_sigma": False}


@pytest.mark.parametrize(("alpha", "beta", "channels"), [(4, 0.8, 72), (1, 0.5, 30), (2, 0.33, 41)])
def test_masks_are_those_of_the_paper(alpha, beta, channels):
    # Retyped in numpy, with a task for each of 1,000 timesteps.
    active = int(np.floor(beta * channels))
    start = np.round((channels - active) * (np.arange(1000) / 999) ** alpha)
    place = np.arange(channels)[None]
    expected = (place >= start[:, None]) & (place < start[:, None] + active)
    found = ChannelRouting(alpha, beta).masks(torch.arange(1000), channels).numpy()
    assert np.array_equal(found, expected)
    assert (found.sum(1) == active).all()


def networks(beta=0.6):
    torch.manual_seed(0)
    plain, routed = DiT(**SIZE), DiT(**SIZE, routing=ChannelRouting(1.0, beta))
    for parameter in plain.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    routed.load_state_dict(plain.state_dict())  # no parameter more
    return plain.double(), routed.double()


def test_a_block_sees_its_window_and_the_rest_passes_by():
    plain, routed = networks()
    x, t = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 400, 999])
    masks = ChannelRouting(1.0, 0.6).masks(t, 20)[:, None].double()
    seen = []
    for block in plain.blocks:  # the formula around blocks that know nothing of it
        forward = block.forward

        def outer(tokens, conditioning, forward=forward):
            seen.append(tokens)
            return forward(tokens * masks, conditioning) + (1 - masks) * tokens

        block.forward = outer
    torch.testing.assert_close(routed(x, t), plain(x, t), atol=1e-12, rtol=0)
    assert len(seen) == 2


def test_all_channels_active_is_no_routing():
    plain, routed = networks(beta=1.0)
    x, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([3, 900])
    assert torch.equal(routed(x, t), plain(x, t))


def test_engines_agree_on_a_routed_network():
    _, routed = networks()
    x, t = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 100, 600, 999])

    def losses(rows):
        return routed(x[rows], t[rows]).square().mean((1, 2, 3))

    found = []
    for engine in ("loop", "one_pass"):
        multitask_backward(
            losses, torch.tensor([0, 0, 1, 1]), routed.parameters(), PCGrad(2), engine=engine
        )
        found.append([p.grad.clone() for p in routed.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_wrong_numbers_are_refused_and_an_export_has_them():
    with pytest.raises(ConfigError, match=r"beta: must be above 0 and at most 1, found 1.5"):
        ChannelRouting(beta=1.5)
    with pytest.raises(ConfigError, match="alpha: must be above 0, found 0"):
        ChannelRouting(alpha=0)
    assert diffusers_layout(networks()[1]).config["routing"] == [1.0, 0.6, 999.0]
