"""Photographs with captions, a tiny CLIP text model, and data folders made of them, in seconds on a CPU."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import skimage
import tiny
import torch
from PIL import Image

import generate_t2i
from common.flags import parse_flags
from models import create_model, model_config
from models.text import TextSpec
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.options import CaptionFlags, ConvertFlags, EncodeFlags
from preprocessing.text import write_captions

PHOTOS = {
    "astronaut.png": ["an astronaut in an orange suit", "a smiling woman before a flag"],
    "chelsea.png": ["a cat", "a ginger cat looks to the side, its whiskers long", "the face of a cat"],
    "coffee.png": ["a cup of coffee", "an espresso with a spoon"],
    "rocket.jpg": ["a rocket on its launch pad", "a rocket"],
    "motorcycle_left.png": ["a motorcycle in a garage", "a red motorcycle, seen from the left"],
    "hubble_deep_field.jpg": ["galaxies", "many far galaxies on a black sky"],
}
COUNT, CAPTION_COUNT = len(PHOTOS), sum(map(len, PHOTOS.values()))
RESOLUTION = 16  # latents of side 8 with tiny.vae_folder
TOKENS, WIDTH = 77, 32


def text_folder(folder, width=WIDTH, tokens=TOKENS, seed=0):
    """A CLIP text model of random weights and a tokenizer of single bytes, as from_pretrained reads them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    clip_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    config = CLIPTextConfig(vocab_size=514, hidden_size=width, max_position_embeddings=tokens, **TEXT_SIZES)
    CLIPTextModel(config).save_pretrained(folder)
    return Path(folder)


TEXT_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "projection_dim": 16}
TEXT_SIZES.update(bos_token_id=512, eos_token_id=513, pad_token_id=513)


@functools.cache
def clip_tokenizer():
    """CLIP's tokenizer over single bytes: 256 characters, the same at the end of a word, start and end."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    names = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({name: number for number, name in enumerate(names)}))
        merges.write_text("#version: 0.2\n")
        Path(folder, "tokenizer_config.json").write_text('{"model_max_length": 77}')
        return CLIPTokenizer.from_pretrained(folder)


def clip_folder(folder):
    """A whole CLIP model of random weights and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    clip_tokenizer().save_pretrained(folder)
    text = {"vocab_size": 514, "hidden_size": WIDTH, "max_position_embeddings": TOKENS, **TEXT_SIZES}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision.update(image_size=32, patch_size=8, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return Path(folder)


def photos(folder):
    """The photographs as files of one folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.convert("RGB").resize((48, 32)).save(folder / name)
    return folder


def coco_json(path, captions=PHOTOS, **changes):
    """The captions as COCO's JSON."""
    images = [{"id": 7 * i, "file_name": name} for i, name in enumerate(captions)]
    pairs = [(7 * i, text) for i, group in enumerate(captions.values()) for text in group]
    annotations = [{"id": k, "image_id": i, "caption": text + " \n"} for k, (i, text) in enumerate(pairs)]
    Path(path).write_text(json.dumps({"images": images, "annotations": annotations, **changes}))
    return Path(path)


def data_folder(root, packed=True):
    """ROOT/data with images, vae-sd and text, ROOT/vae, ROOT/clip; returns ROOT/data."""
    root = Path(root)
    data, source = root / "data", photos(root / "photos")
    convert(ConvertFlags(source, data / "images", (RESOLUTION, RESOLUTION), "center-crop"))
    encode(EncodeFlags(data / "images", data / "vae-sd", tiny.vae_folder(root / "vae"), packed=packed, device="cpu"))
    annotations = coco_json(root / "captions.json")
    write_captions(CaptionFlags(data / "images", data / "text", annotations, text_folder(root / "clip"), device="cpu"))
    return data


def foreign_folder(root, count=4, texts=True):
    """A folder as U-ViT prepares it; image i has i + 1 captions. Returns ROOT/train."""
    folder, rng = Path(root) / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    np.save(folder.parent / "empty_context.npy", rng.standard_normal((TOKENS, WIDTH), dtype=np.float32))
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.standard_normal((8, 8, 8), dtype=np.float32))
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for k in range(i + 1):
            np.save(folder / f"{i}_{k}.npy", np.full((TOKENS, WIDTH), 10 * i + k, np.float32))
            if texts:
                (folder / f"{i}_{k}.txt").write_text(f"caption {k} of {i}\n")
    return folder


def checkpoint(path, root, name="DeepFlow-MMDiT-Ti/2", **overrides):
    """Write a checkpoint of random weights that fits ROOT/vae and ROOT/clip; both are made where they are missing."""
    root = Path(root)
    vae = root / "vae" if (root / "vae").exists() else tiny.vae_folder(root / "vae")
    clip = root / "clip" if (root / "clip").exists() else text_folder(root / "clip")
    spec = dataclasses.replace(tiny.SPEC, vae=str(vae), family="vae")
    sizes = {"depth": 2, "df_idxs": () if name.startswith("MMDiT") else (1,), "input_size": 8, "context_dim": WIDTH}
    options = model_config(name, **{**sizes, **overrides})
    weights = tiny.fill_(create_model(name, **options), 1, 0.2).state_dict()
    text = dataclasses.asdict(TextSpec(str(clip), "clip", TOKENS, WIDTH))
    data = {"count": 6, "num_classes": 0, "moments_shape": [8, 8, 8], "text": text, **dataclasses.asdict(spec)}
    config = {"model": name, "exp_name": "tiny", "path_type": "linear", "model_options": options}
    torch.save({"model": weights, "ema": weights, "steps": 3, "data": data, "config": config}, path)
    return Path(path)


def run_generate(ckpt, sample_dir, *prompts, **changes):
    """Sample in this process; returns (folder of images, arr_0, manifest)."""
    values = {"ckpt": ckpt, "sample_dir": sample_dir, "num_steps": 3, "per_proc_batch_size": 2, "prompts": [*prompts]}
    config = parse_flags(generate_t2i.TextGenerateConfig, tiny.flags(**{**values, **changes}))
    with tiny.one_thread():
        generate_t2i.generate_prompts(config)
    return tiny.results(sample_dir)
