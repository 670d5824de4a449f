"""InceptionV3 with random weights: same values as torch-fidelity's, and its weights checked."""

import pickle
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ant_lightning import ConfigError, InceptionFeatures


class _Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network before any weights are loaded."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        assert state_dict == {}


@pytest.fixture
def one_thread():
    """Threads that wait for each other make a big network slow on a shared machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("one_thread")
def test_grey_and_rgb_images_give_what_torch_fidelity_gives(tmp_path):
    torch.save({}, tmp_path / "empty.pth")
    network = _Untrained(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(tmp_path / "empty.pth"),
    )
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = InceptionFeatures(path)
    path.unlink()
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    grey = colour[:, :1]
    features, logits = extractor.extract(colour)
    expected = network(colour)
    assert features.shape == (1, extractor.num_features) == (1, 2048)
    assert logits.shape == (1, 1008)
    assert features.abs().max() > 0
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])
    assert torch.equal(extractor(grey), network(grey.repeat(1, 3, 1, 1))[0])
    assert not torch.equal(extractor(grey), features)


def test_offline_the_error_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: as good as no network
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        InceptionFeatures()
    message = str(caught.value)
    assert "weights-inception-2015-12-05-6726825d.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))]
)
def test_a_file_that_would_run_code_is_refused_before_it_does(tmp_path, save):
    trace = tmp_path / "trace"
    save({"weight": _Harmful(trace)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="refused, because reading it would call"):
        InceptionFeatures(tmp_path / "weights.pth")
    assert not trace.exists()


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.*: no such file"):
        InceptionFeatures(tmp_path / "missing.pth")
    path = tmp_path / "weights.pth"
    for content in (b"", b"text", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"weights\.pth: truncated, damaged"):
            InceptionFeatures(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ConfigError, match="dict of named tensors"):
        InceptionFeatures(path)
