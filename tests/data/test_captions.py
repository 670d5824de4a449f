"""Captions: folders, encoders read from folders, and the cache that training reads."""

import pytest
import torch
import transformers
import yaml
from captions import write_encoders, write_images

from ant_lightning import CaptionFolderData, ConfigError, TextEncoder, TextWriter
from ant_lightning.cli.main import main
from ant_lightning.data.text.cache import TextCache
from ant_lightning.errors import FileError

TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("models"))


def encoders(models, **settings):
    clip = TextEncoder(str(models / "text_encoder"), max_length=5, pooled=True, layer=-2)
    return [clip, TextEncoder(str(models / "text_encoder_2"), max_length=6, **settings)]


def data(root, **settings):
    settings = {"image_size": 8, "batch_size": 2, "num_held_out": 2, "seed": 0, **settings}
    return CaptionFolderData(str(root), **settings)


def direct(models, caption):
    """What diffusers' SD3 does: hidden states padded to the widest and joined by length."""
    parts, pooled = [], None
    for name, length in (("text_encoder", 5), ("text_encoder_2", 6)):
        kind = "CLIPTextModelWithProjection" if length == 5 else "T5EncoderModel"
        model = getattr(transformers, kind).from_pretrained(models / name)
        tokens = transformers.AutoTokenizer.from_pretrained(
            models / name.replace("text_encoder", "tokenizer")
        )(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = model(tokens["input_ids"], output_hidden_states=True)
        if length == 5:
            pooled = output.text_embeds
        parts.append(output.hidden_states[-2] if length == 5 else output.last_hidden_state)
    parts[0] = torch.nn.functional.pad(parts[0], (0, 4))
    return torch.cat(parts, 1)[0], pooled[0]


def test_encode_writes_each_caption_once_and_training_reads_it(tmp_path, models, capsys):
    root = write_images(tmp_path / "images")
    config = {
        "data": {
            "class_path": "ant_lightning.CaptionFolderData",
            "init_args": {"root": str(root), "image_size": 8, "batch_size": 2},
        },
        "text": {
            "output": str(tmp_path / "cache"),
            "encoders": [
                {
                    "folder": str(models / "text_encoder"),
                    "max_length": 5,
                    "pooled": True,
                    "layer": -2,
                },
                {"folder": str(models / "text_encoder_2"), "max_length": 6},
            ],
        },
        "device": "cpu",
    }
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(config))
    args = ["encode", "--config", str(tmp_path / "encode.yaml")]
    assert main(args) == 0
    assert "wrote 1 shards" in capsys.readouterr().out
    assert main(args) == 0
    assert "wrote 0 shards" in capsys.readouterr().out
    found = data(root, embeddings=str(tmp_path / "cache"))
    train = found.train_images
    batch = train.load([0, 3], epoch=0)
    for row, index in enumerate([0, 3]):
        hidden, pooled = direct(models, train.captions[index])
        torch.testing.assert_close(batch.condition[TEXT][row], hidden)
        torch.testing.assert_close(batch.condition[POOLED][row], pooled)
    hidden, pooled = direct(models, "")
    torch.testing.assert_close(found.null_condition[TEXT], hidden)
    torch.testing.assert_close(found.null_condition[POOLED], pooled)
    loaded = next(iter(found.train_dataloader()))
    assert loaded.condition[TEXT].shape == (2, 11, 12)


def test_several_shards_ranks_and_16_bits(tmp_path, models):
    captions = [f"a {colour} square" for colour in ("red", "green", "blue")]
    writer = TextWriter(
        str(tmp_path / "a"), encoders=encoders(models, mask=True), shard_size=2, dtype="float16"
    )
    assert [writer.write(captions, rank=r, world_size=2) for r in range(2)] == [1, 1]
    cache = TextCache(tmp_path / "a")
    whole = TextWriter(str(tmp_path / "b"), encoders=encoders(models, mask=True))
    whole.write(captions)
    expected = TextCache(tmp_path / "b")(captions)
    # Half precision has 11 bits.
    torch.testing.assert_close(cache(captions), expected, rtol=2**-11, atol=1e-6)
    assert cache([""])[MASK][0, 5:].tolist() == [0.0] * 6
    assert expected[MASK][0, 5:].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("metadata", [False, True])
def test_both_layouts_give_the_same_captions(tmp_path, metadata):
    root = write_images(tmp_path / "images", metadata=metadata)
    found = data(root)
    assert len(found.captions()) == 8
    wide = data(root, image_size=(8, 12)).train_images
    assert wide.load([0], epoch=None).images.shape == (1, 3, 8, 12)
    train = found.train_images
    for path, text in zip(train.images.paths, train.captions, strict=True):
        assert text.split()[2] == ["red", "green", "blue"][int(path.stem) % 3]


def test_bad_input_is_named(tmp_path, models):
    root = write_images(tmp_path / "images")
    (root / "3.txt").unlink()
    with pytest.raises(ConfigError, match=r"root: every image must have a caption.*3\.txt"):
        data(root).setup("fit")
    (root / "3.txt").write_text("a red square")
    with pytest.raises(ConfigError, match="embeddings: must be a cache of embeddings"):
        data(root, embeddings=str(tmp_path / "nothing")).setup("fit")
    TextWriter(str(tmp_path / "cache"), encoders=encoders(models)).write(["a red square"])
    with pytest.raises(ConfigError, match="embeddings: must hold every caption, found none of"):
        data(root, embeddings=str(tmp_path / "cache")).setup("fit")
    other = TextWriter(str(tmp_path / "cache"), encoders=encoders(models)[:1])
    with pytest.raises(FileError, match=r"output: .* holds content made with encoders"):
        other.write(["a red square"])
    (root / "metadata.jsonl").write_text('{"file": "0.png"}')
    with pytest.raises(ConfigError, match=r"root: each line of .* must have file_name and text"):
        data(root).setup("fit")
    with pytest.raises(ConfigError, match="folder: must hold a text encoder"):
        TextWriter(str(tmp_path / "c"), encoders=[TextEncoder(str(root))]).write([])
    with pytest.raises(ConfigError, match="pooled: must be false for T5EncoderModel"):
        TextWriter(
            str(tmp_path / "d"),
            encoders=[TextEncoder(str(models / "text_encoder_2"), pooled=True, max_length=4)],
        ).write(["a"])
    with pytest.raises(ConfigError, match="join: must be length for encoders of 5 and 6 tokens"):
        TextWriter(str(tmp_path / "e"), encoders=encoders(models, join="width")).write(["a"])


def test_encode_refuses_data_without_captions(models, tmp_path, capsys):
    args = ["encode", "--data=ant_lightning.DigitsData", "--data.batch_size=2", "--device=cpu"]
    encoder = f'[{{"folder": "{models / "text_encoder_2"}"}}]'
    args += [f"--text.output={tmp_path}", f"--text.encoders={encoder}"]
    assert main(args) == 2
    assert "data: must have captions to encode text" in capsys.readouterr().err
