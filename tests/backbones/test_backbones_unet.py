"""UNet: its start, its conditioning, its dropout, its errors."""

import pytest
import torch
from torch import nn

from ant_lightning import ConfigError, UNet, adm_imagenet64, adm_p2_light, ldm_cin256
from ant_lightning.backbones.unet_blocks import convolved_after_upsampling


def tiny(**settings):
    defaults = {
        "input_size": 8,
        "model_channels": 32,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "num_heads": 2,
    }
    return UNet(**{**defaults, **settings})


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        fan_in = max(1, parameter[0].numel())
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / fan_in**0.5
    return model


def batch(size=2, side=8):
    x = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(size) * 400, torch.arange(size)


def test_it_starts_at_zero():
    x, timesteps, _ = batch()
    assert torch.equal(tiny(out_channels=6)(x, timesteps), torch.zeros(2, 6, 8, 8))


def test_sizes_other_than_the_input_size_pass_if_every_level_divides_them():
    x, timesteps, _ = batch()
    model = randomised(tiny())
    assert model(torch.cat([x, x], dim=3), timesteps).shape == (2, 3, 8, 16)
    with pytest.raises(ConfigError, match="divisible by 2, found 7 x 8"):
        model(x[:, :, :7], timesteps)


def test_attention_sits_at_the_named_down_sampling_factors():
    def with_attention(factors):
        model = tiny(channel_mult=(1, 1, 1), attention_resolutions=factors)
        return [len(stage) for stage in model.input_blocks]

    # Stages: stem, level 0, down, level 1, down, level 2.
    assert with_attention(()) == [1, 1, 1, 1, 1, 1]
    assert with_attention((2,)) == [1, 1, 1, 2, 1, 1]
    assert with_attention((1, 4)) == [1, 2, 1, 1, 1, 2]


@pytest.mark.parametrize("context_dim", [None, 16])
@pytest.mark.parametrize(("dropout", "null"), [(0.0, None), (0.1, 5)])
def test_class_labels_enter_by_the_embedding_or_by_the_context(context_dim, dropout, null):
    model = tiny(
        num_classes=5,
        class_dropout_prob=dropout,
        use_spatial_transformer=context_dim is not None,
        context_dim=context_dim,
    )
    model = randomised(model)
    table = model.label_emb if context_dim is None else model.class_embedder.embedding
    assert (len(table.weight), model.null_class) == (5 + (null is not None), null)
    x, timesteps, labels = batch()
    output = model(x, timesteps, labels)
    assert not torch.allclose(model(x, timesteps, labels + 1), output)
    with pytest.raises(ConfigError, match=r"labels: must be given for 5 classes.*found None"):
        model(x, timesteps)


def test_a_context_takes_the_place_of_labels():
    settings = {"use_spatial_transformer": True, "context_dim": 16}
    model = randomised(tiny(num_classes=5, **settings))
    x, timesteps, labels = batch()
    context = model.class_embedder.embedding(labels)[:, None]
    torch.testing.assert_close(
        model(x, timesteps, context=context), model(x, timesteps, labels), rtol=0, atol=0
    )
    with pytest.raises(ConfigError, match="labels: must be None beside a context"):
        model(x, timesteps, labels, context)
    with pytest.raises(
        ConfigError, match=r"context: must have the shape \[b, m, 16\], found \[2, 1, 3\]"
    ):
        model(x, timesteps, context=context[..., :3])
    with pytest.raises(ConfigError, match=r"context: must have the shape \[.*, 16\], found None"):
        tiny(**settings)(x, timesteps)
    with pytest.raises(ConfigError, match=r"context: must have the shape .* None\], found"):
        tiny()(x, timesteps, context=context)


def test_dropout_is_random_in_training_only_and_replayed_by_checkpointing():
    model = randomised(tiny(dropout=0.5))
    x, timesteps, _ = batch()
    assert torch.equal(model.eval()(x, timesteps), model(x, timesteps))
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        loss = model(x, timesteps).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert not torch.equal(model(x, timesteps), model(x, timesteps))


def test_resampling_without_parameters_averages_down_and_repeats_up():
    model = tiny(conv_resample=False)
    down, up = model.input_blocks[2][0], model.output_blocks[1][-1]
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(down(x), x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("sides", [(32, 32), (16, 80)])
def test_a_convolution_after_upsampling_is_one_transposed_convolution(sides):
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    fused = convolved_after_upsampling(x, conv)
    assert "ConvolutionBackward" in type(fused.grad_fn).__name__
    assert fused.grad_fn._saved_transposed
    plain = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(fused, plain)
    direction = torch.randn_like(plain)
    leaves = [x, conv.weight, conv.bias]
    for ours, wanted in zip(
        torch.autograd.grad(fused, leaves, direction),
        torch.autograd.grad(plain, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("context_dim", [None, 16])
def test_autocast_keeps_it_close_to_float32(context_dim):
    model = tiny(
        num_classes=5, use_spatial_transformer=context_dim is not None, context_dim=context_dim
    )
    model = randomised(model)
    args = batch()
    with torch.no_grad():
        full = model(*args)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(*args)
    assert (low - full).norm() < 0.05 * full.norm()


def test_the_setting_compiles_in_place_and_keeps_names_and_outputs():
    model, plain = (
        randomised(tiny(channel_mult=(1,), compiled=True)),
        randomised(tiny(channel_mult=(1,))),
    )
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model._compiled_call_impl is not None
    assert plain._compiled_call_impl is None
    args = batch()[:2]
    # Compilation itself takes a minute; the test below shows that the whole network is one graph.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(*args), plain(*args))


def test_the_whole_network_compiles_as_one_graph():
    settings = {"use_spatial_transformer": True, "context_dim": 16, "num_classes": 5}
    model = randomised(tiny(channel_mult=(1,), **settings))
    args = batch()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*args)
        torch.testing.assert_close(compiled, model(*args))


def test_presets_keep_their_shape_at_reduced_width():
    with torch.device("meta"):
        light = adm_p2_light(input_size=64, model_channels=32, out_channels=3)
        small = adm_imagenet64(model_channels=64, num_classes=7, class_dropout_prob=0.2)
        latent = ldm_cin256(model_channels=32, num_classes=7)
    assert (light.input_size, light.out_channels, light.num_classes) == (64, 3, 0)
    assert (small.out_channels, small.num_classes, small.null_class) == (6, 7, 7)
    assert (latent.input_size, latent.out_channels, latent.null_class) == (64, 3, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_channels": 40}, r"model_channels: .*multiple of 32.*found 40 times \[1, 1\]"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"input_size": 9}, "input_size: must be divisible by 2.*found 9"),
        ({"attention_resolutions": (8,)}, r"out of \[1, 2\], found \[8\]"),
        ({"num_heads": 5}, "num_heads: must divide the 32 channels, found 5"),
        ({"num_head_channels": 64}, "num_head_channels: must divide the 32 channels, found 64"),
        (
            {"context_dim": 16},
            "context_dim: must be given with use_spatial_transformer and only then",
        ),
        ({"use_spatial_transformer": True}, "found None with use_spatial_transformer=True"),
        ({"num_classes": -2}, "num_classes: must be at least 0, found -2"),
        ({"class_dropout_prob": -0.5}, "-0.5"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 4, 8, 8)},
            r"x: must have the shape \[b, 3, h, w\], found \[2, 4, 8, 8\]",
        ),
        ({"timesteps": torch.zeros(2, 1)}, r"timesteps: .*found \[2, 1\]"),
    ],
)
def test_bad_inputs_are_named(change, message):
    x, timesteps, _ = batch()
    with pytest.raises(ConfigError, match=message):
        tiny()(**{"x": x, "timesteps": timesteps, **change})
