"""What torch's wrappers add to names is left out wherever weights are read."""

import pytest
import torch
from tiny_digits import TinyDiT, module, trainer
from torch import nn

from ant_lightning import EMA, ConfigError, DigitsData, load_official_checkpoint
from ant_lightning.backbones.checkpoint_layouts import bare_names, nested_tensors
from ant_lightning.backbones.official_checkpoints import read_checkpoint

WRAPPERS = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    state = TinyDiT().state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


def wrapped(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def inside(tensors, wrapper):
    """As if each block had been wrapped by itself."""
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}."): v for name, v in tensors.items()}


def assert_holds(network, expected):
    found = network.state_dict()
    for bare, name in bare_names(found).items():
        assert torch.equal(found[name], expected[bare]), bare


def lightning(live, averages, prefix="backbone."):
    return {
        "state_dict": wrapped(live, prefix),
        "callbacks": {"EMA": {"averages": averages, "num_updates": 1}},
    }


LAYOUTS = {
    "state dict": lambda live, averages: live,
    "nested": lambda live, averages: {"state_dict": live, "epoch": 3},
    "training file": lambda live, averages: {"model": averages, "ema": live},
    "lightning": lambda live, averages: lightning(averages, live),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_every_kind_of_file_is_read_without_the_prefix_of_a_wrapper(tmp_path, prefix, layout):
    expected, other = weights(0), weights(1)
    content = LAYOUTS[layout](wrapped(expected, prefix), wrapped(other, prefix))
    torch.save(content, tmp_path / "w.ckpt")
    network = TinyDiT()
    report = load_official_checkpoint(network, tmp_path / "w.ckpt")
    assert_holds(network, expected)
    assert prefix.split(".")[0] not in report.ignored


@pytest.mark.parametrize(
    "names",
    [
        lambda live: inside(live, "_orig_mod"),
        lambda live: inside(live, "_checkpoint_wrapped_module"),
        lambda live: wrapped(inside(live, "_fsdp_wrapped_module"), "_fsdp_wrapped_module."),
        lambda live: wrapped(live, "module.model.diffusion_model."),
    ],
)
def test_wrappers_inside_and_around_are_left_out_too(tmp_path, names):
    expected = weights(0)
    torch.save(names(expected), tmp_path / "w.pt")
    network = TinyDiT()
    load_official_checkpoint(network, tmp_path / "w.pt", weights="model")
    assert_holds(network, expected)


@pytest.mark.parametrize("prefix", ["module.backbone.", "backbone.module.", "backbone._orig_mod."])
def test_a_lightning_checkpoint_may_be_wrapped_around_or_inside(tmp_path, prefix):
    expected = weights(0)
    torch.save(lightning(expected, expected, prefix), tmp_path / "w.ckpt")
    network = TinyDiT()
    load_official_checkpoint(network, tmp_path / "w.ckpt", weights="model")
    assert_holds(network, expected)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_network_takes_the_same_files(tmp_path, prefix, whole):
    expected = weights(0)
    torch.save(wrapped(expected, prefix), tmp_path / "w.pt")
    network = TinyDiT()
    if whole:
        network = torch.compile(network, backend="eager")
    else:
        network.blocks[0] = torch.compile(network.blocks[0], backend="eager")
    load_official_checkpoint(network, tmp_path / "w.pt")
    assert_holds(network, expected)


def test_a_first_stage_is_found_in_a_wrapped_file(tmp_path):
    torch.save({"module.first_stage_model.encoder.w": torch.ones(2)}, tmp_path / "w.ckpt")
    assert list(nested_tensors(read_checkpoint(tmp_path / "w.ckpt"))) == [
        "first_stage_model.encoder.w"
    ]


def test_a_network_that_has_a_child_of_that_name_keeps_it(tmp_path):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.zeros(2, 2))

    assert bare_names(Held().state_dict()) == {n: n for n in Held().state_dict()}
    torch.save(Held().state_dict(), tmp_path / "w.pt")
    load_official_checkpoint(Held(), tmp_path / "w.pt")
    torch.save(wrapped(weights(0), "module.") | weights(1), tmp_path / "both.pt")
    network = TinyDiT()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ConfigError, match="extra: module"):
        load_official_checkpoint(network, tmp_path / "both.pt")
    assert_holds(network, before)


def test_a_file_of_another_network_is_not_said_to_have_other_classes(tmp_path):
    torch.save({f"net.{name}": value for name, value in weights(0).items()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"22 missing.*22 extra") as caught:
        load_official_checkpoint(TinyDiT(), tmp_path / "w.pt")
    assert "num_classes" not in str(caught.value)


def run(folder, network, *, steps, resume=None):
    ema = EMA(decay=0.5)
    fit = trainer(folder, ema, steps=steps, limit_val_batches=0)
    fit.fit(module(network), DigitsData(batch_size=20), ckpt_path=resume)
    fit.save_checkpoint(folder / "w.ckpt")
    return fit, ema


@pytest.mark.parametrize("compiled", ["before", "after", "as 0.1 wrote it"])
def test_a_run_goes_on_compiled_or_not(tmp_path, compiled):
    def network(this):
        return torch.compile(TinyDiT(), backend="eager") if this == compiled else TinyDiT()

    first, ema = run(tmp_path, network("before"), steps=2)
    averages = {bare: ema._averages[name] for bare, name in bare_names(ema._averages).items()}
    content = torch.load(tmp_path / "w.ckpt", weights_only=True)
    if compiled == "as 0.1 wrote it":
        content["ant_lightning"]["backbone"] = "OptimizedModule"
        state = content["state_dict"]
        content["state_dict"] = {
            n.replace("backbone.", "backbone._orig_mod."): state[n] for n in state
        }
        own = content["callbacks"]["EMA"]
        own["averages"] = wrapped(own["averages"], "_orig_mod.")
        torch.save(content, tmp_path / "w.ckpt")
    else:
        assert content["ant_lightning"]["backbone"] == "TinyDiT"
    trained = {
        n.replace("_orig_mod.", ""): v for n, v in first.lightning_module.state_dict().items()
    }
    second, ema = run(tmp_path, network("after"), steps=2, resume=tmp_path / "w.ckpt")
    for name, value in second.lightning_module.state_dict().items():
        assert torch.equal(value, trained[name.replace("_orig_mod.", "")])
    assert ema.num_updates == 2
    for name, value in ema._averages.items():
        assert torch.equal(value, averages[name.replace("_orig_mod.", "")])
    assert run(tmp_path, network("after"), steps=3, resume=tmp_path / "w.ckpt")[0].global_step == 3
