"""DiT: its start, its labels, its sizes, its errors."""

import math

import numpy as np
import pytest
import torch

import ant_lightning
from ant_lightning import ConfigError, DiT
from ant_lightning.backbones.layers import timestep_embedding

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


def tiny(**settings):
    defaults = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return DiT(**{**defaults, **settings})


def batch(size=2, channels=4, side=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, channels, side, side, generator=generator)
    return x, torch.arange(size) * 400, torch.arange(size)


@pytest.mark.parametrize("dim", [8, 7])
def test_timestep_features_are_cosines_then_sines(dim):
    timesteps = np.array([0.0, 0.5, 17.0, 999.0])
    half = dim // 2
    angles = timesteps[:, None] * 10000.0 ** (-np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, dim % 2))], axis=1)
    features = timestep_embedding(torch.from_numpy(timesteps), dim)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_it_starts_at_zero_with_blocks_that_are_the_identity():
    model = tiny()
    x, timesteps, labels = batch()
    assert torch.equal(model(x, timesteps, labels), torch.zeros(2, 8, 8, 8))
    tokens, conditioning = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, conditioning), tokens)


def test_initial_weights_have_the_official_spread():
    torch.manual_seed(0)
    model = tiny(hidden_size=128, num_classes=1000)
    # Xavier-uniform of the patch map: 4 * 2 * 2 = 16 inputs and 128 outputs.
    bound = math.sqrt(6 / (16 + 128))
    projection = model.x_embedder.proj.weight
    assert 0.9 * bound < projection.abs().max().item() <= bound
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (128 + 384))
    assert 0.9 * bound < model.blocks[0].attn.qkv.weight.abs().max().item() <= bound
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not parameter.any(), name
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    ("num_classes", "dropout", "rows", "null"),
    [(3, 0.1, 4, 3), (3, 0.0, 3, None), (1, 0.1, 1, None), (0, 0.1, None, None)],
)
def test_the_label_table_has_a_null_class_only_with_class_dropout(num_classes, dropout, rows, null):
    model = tiny(num_classes=num_classes, class_dropout_prob=dropout)
    found = None if model.y_embedder is None else len(model.y_embedder.embedding_table.weight)
    assert (found, model.null_class, model.num_classes) == (rows, null, num_classes)


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def test_labels_and_fractions_of_a_timestep_matter_and_training_mode_does_not():
    model = randomised(tiny()).train()
    x, timesteps, labels = batch()
    output = model(x, timesteps, labels)
    assert torch.equal(model(x, timesteps, labels), output)
    assert torch.equal(model(x, timesteps.float(), labels), output)
    assert not torch.allclose(model(x, timesteps, torch.full_like(labels, 3)), output)
    assert not torch.allclose(model(x, timesteps + 0.5, labels), output)


def test_one_class_needs_no_labels_and_no_class_ignores_them():
    x, timesteps, labels = batch()
    one = randomised(tiny(num_classes=1))
    assert torch.equal(one(x, timesteps), one(x, timesteps, torch.zeros_like(labels)))
    none = randomised(tiny(num_classes=0))
    assert torch.equal(none(x, timesteps), none(x, timesteps, labels))


def test_one_image_does_not_see_another():
    model = randomised(tiny())
    x, timesteps, labels = batch(3)
    rows = torch.cat([model(x[i : i + 1], timesteps[[i]], labels[[i]]) for i in range(3)])
    torch.testing.assert_close(model(x, timesteps, labels), rows, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_it_close_to_float32():
    model = randomised(tiny())
    x, timesteps, labels = batch()
    with torch.no_grad():
        full = model(x, timesteps, labels)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x, timesteps, labels)
    assert (low - full).norm() < 0.05 * full.norm()


def test_the_setting_compiles_in_place_and_keeps_names_and_outputs():
    model, plain = randomised(tiny(depth=1, compiled=True)), randomised(tiny(depth=1))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model._compiled_call_impl is not None
    assert plain._compiled_call_impl is None
    args = batch()
    # Compilation itself takes a minute; the test below shows that the whole network is one graph.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(*args), plain(*args))


def test_the_whole_network_compiles_as_one_graph():
    model = randomised(tiny(depth=1))
    args = batch()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*args)
        torch.testing.assert_close(compiled, model(*args))


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_have_the_published_sizes(size, patch):
    with torch.device("meta"):
        preset = getattr(ant_lightning, f"dit_{size}_{patch}")
        model = preset(input_size=16, in_channels=3, learn_sigma=False, num_classes=10)
    hidden, depth, heads = SIZES[size]
    assert model.x_embedder.proj.weight.shape == (hidden, 3, patch, patch)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (depth, heads)
    assert model.final_layer.linear.out_features == patch * patch * 3
    assert (model.out_channels, model.null_class) == (3, 10)


def test_a_preset_has_no_argument_for_what_it_fixes():
    with pytest.raises(TypeError, match="depth"):
        ant_lightning.dit_s_2(depth=3)


def test_a_preset_is_named_in_a_configuration_as_a_class_is():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=DiT)
    name = "ant_lightning.dit_s_8"
    config = parser.parse_args([f"--backbone={name}", "--backbone.num_classes=7"])
    assert config.backbone.class_path == name
    # Renamed in jsonargparse 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    with torch.device("meta"):
        model = instantiate(config).backbone
    assert (type(model), model.num_classes, model.patch_size) == (DiT, 7, 8)
    with pytest.raises(jsonargparse.ArgumentError, match="num_clases"):
        parser.parse_args([f"--backbone={name}", "--backbone.num_clases=7"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 3}, "patch_size: must divide input_size 8, found 3"),
        ({"patch_size": 0}, "patch_size: must be at least 1, found 0"),
        ({"num_heads": 5}, "multiple of 4 and of num_heads 5, found 32"),
        ({"hidden_size": 30, "num_heads": 3}, "found 30"),
        ({"num_classes": -1}, "num_classes: must be at least 0, found -1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: must be from 0 to 1, found 1.5"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 8, 8)},
            r"x: must have the shape \[b, 4, h, w\], found \[2, 3, 8, 8\]",
        ),
        ({"x": torch.zeros(2, 4, 8)}, r"found \[2, 4, 8\]"),
        ({"x": torch.zeros(2, 4, 8, 16)}, "x: must be 8 x 8, found 8 x 16"),
        ({"timesteps": torch.zeros(3)}, r"timesteps: must have the shape \[2\].*found \[3\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels: .*found \[3\]"),
        ({"labels": None}, r"labels: must have the shape \[2\].*found None"),
    ],
)
def test_bad_inputs_are_named(change, message):
    x, timesteps, labels = batch()
    arguments = {"x": x, "timesteps": timesteps, "labels": labels, **change}
    with pytest.raises(ConfigError, match=message):
        tiny()(**arguments)


def test_height_and_width_are_apart():
    torch.manual_seed(0)
    settings = {"patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    settings |= {"num_classes": 0, "learn_sigma": False}
    wide, square = DiT(input_size=(4, 8), **settings), DiT(input_size=8, **settings)
    weights = square.state_dict() | {"pos_embed": wide.pos_embed}
    for name, value in weights.items():
        if name != "pos_embed":
            torch.nn.init.normal_(value, std=0.2)
    wide.load_state_dict(weights)
    # Rows and columns have the positions that they have in the square.
    grid = square.pos_embed.view(4, 4, 16)
    torch.testing.assert_close(wide.pos_embed.view(2, 4, 16), grid[:2], atol=0, rtol=0)
    x, t = torch.randn(2, 2, 4, 8), torch.tensor([3, 700])
    output = wide(x, t)
    assert output.shape == x.shape
    # Only positions tell rows from columns: without them, the transposed image gives the transpose.
    with torch.no_grad():
        wide.pos_embed.zero_()
        tall = DiT(input_size=(8, 4), **settings)
        tall.load_state_dict(wide.state_dict())
        shifted = wide(x.roll(2, dims=3), t)
        torch.testing.assert_close(shifted, wide(x, t).roll(2, dims=3), atol=1e-5, rtol=0)
        assert tall(x.mT, t).shape == (2, 2, 8, 4)
    with pytest.raises(ConfigError, match="x: must be 4 x 8, found 8 x 4"):
        wide(x.mT, t)
    with pytest.raises(ConfigError, match="patch_size: must divide input_size"):
        DiT(input_size=(4, 7), **settings)
    with pytest.raises(ConfigError, match=r"input_size: must be at least 1, .*found \(4, 8, 2\)"):
        DiT(input_size=(4, 8, 2), **settings)
