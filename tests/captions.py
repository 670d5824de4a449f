"""A tiny folder of captioned images, and tiny random text encoders of transformers."""

import json

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "<unk>", "</s>", "a", "red", "green", "blue", "square", "small", "large"]


def write_images(folder, n=8, *, metadata=False):
    folder.mkdir(parents=True)
    lines = []
    for i in range(n):
        colour = ["red", "green", "blue"][i % 3]
        text = f"a {'small' if i % 2 else 'large'} {colour} square"
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
        if not metadata:
            (folder / f"{i}.txt").write_text(text + "\n")
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_encoders(folder):
    """CLIP of width 8 with a pooled output of 6, and T5 of width 12, each with a tokenizer."""
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=6,
        eos_token_id=2,
    )
    t5 = T5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for name, kind, config in (
        ("text_encoder", CLIPTextModelWithProjection, clip),
        ("text_encoder_2", T5EncoderModel, t5),
    ):
        kind(config).save_pretrained(folder / name)
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="</s>",
            model_max_length=6,
        ).save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    return folder
