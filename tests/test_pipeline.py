"""Exported pipelines: diffusers samples the images that generate.py makes; each mistake ends in one line."""

import runpy
import sys

import captioned
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from common.errors import InputError
from models.export import export, main
from sampling.pipeline import DeepFlowTransformer

CLASSES = [0, 2, 1, 1]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where diffusers copies the code that comes with models."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path, cache])
        yield


@pytest.fixture(scope="module")
def folder(ckpt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export(ckpt, folder, diffusers=True)
    return folder


def load(folder, **options):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@pytest.mark.parametrize("settings", [{}, {"mode": "ode", "cfg_scale": 1.5, "guidance_low": 0.3}], ids=["sde", "ode"])
def test_a_seed_gives_the_images_of_generate(pipe, ckpt, tmp_path, settings):
    words = {"labels": ",".join(map(str, CLASSES)), "num_fid_samples": 4, "per_proc_batch_size": 4, "seed": 5}
    _, expected, _ = tiny.run_generate(ckpt, tmp_path, **words, **settings)
    settings = {"guidance_scale" if name == "cfg_scale" else name: value for name, value in settings.items()}
    call = {"class_labels": CLASSES, "num_inference_steps": 4, "generator": torch.manual_seed(5), **settings}
    assert np.array_equal(np.stack(pipe(**call).images), expected)
    assert np.array_equal(np.rint(pipe(**call, output_type="np").images * 255), expected)
    (latents,) = pipe(**call, output_type="latent", return_dict=False)
    assert latents.shape == (4, 4, tiny.SIZE, tiny.SIZE)


def test_generate_reads_the_folder_and_its_vae(folder, ckpt, reference, tmp_path):
    _, images, manifest = tiny.run_generate(folder, tmp_path / "samples")
    assert np.array_equal(images, reference[1])
    assert manifest["vae"] == str(folder / "vae")
    assert manifest["latents"]["encoder_sha256"] and manifest["weights_sha256"] == reference[2]["weights_sha256"]


def test_raw_weights_of_a_flow_map(vae, tmp_path):
    ckpt = tiny.checkpoint(tmp_path / "map.pt", vae, "DeepFlow-DMF-Ti/2")
    export(ckpt, tmp_path / "map", "raw", diffusers=True)
    words = {"weights": "raw", "labels": "0", "num_fid_samples": 1}
    _, expected, _ = tiny.run_generate(ckpt, tmp_path / "samples", **words)
    assert np.array_equal(load(tmp_path / "map")(class_labels=0).images[0], expected[0])


def test_prompts_of_a_text_model(tmp_path):
    ckpt = captioned.checkpoint(tmp_path / "t2i.pt", tmp_path)
    export(ckpt, tmp_path / "t2i", diffusers=True)
    _, expected, _ = captioned.run_generate(ckpt, tmp_path / "samples", "a cat", "a cup", num_steps=3)
    images = load(tmp_path / "t2i")(prompt=["a cat", "a cup"], num_inference_steps=3).images
    assert np.array_equal(np.stack(images), expected)


def test_a_pipeline_takes_a_precision(folder):
    pipe = load(folder, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe(class_labels=[0], num_inference_steps=2).images[0].size == (16, 16)


def test_a_pipeline_takes_a_device_and_the_size_of_its_decoded_batches(folder, pipe, monkeypatch):
    assert DeepFlowTransformer.from_pretrained(folder / "transformer", device_map="meta").network.pos_embed.is_meta
    sizes = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    pipe(class_labels=[0, 1, 2], num_inference_steps=1, decode_batch_size=2)
    assert sizes == [2, 1]


def test_the_card_shows_diffusers(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert 'from_pretrained("USER/tiny", trust_remote_code=True)' in card.text and "class_labels" in card.text


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"class_labels": [7]}, "class"),
        ({"class_labels": [0], "num_inference_steps": 0}, "steps"),
        ({"class_labels": [0], "output_type": "tensor"}, "output_type 'tensor'.*pil"),
        ({"class_labels": [0], "strength": 1}, "strength"),
        ({"class_labels": [0], "decode_batch_size": 0}, "decode_batch_size 0 is out of range"),
        ({"class_labels": [0], "seed": 1}, "does not take seed; use its .* generator"),
        ({"prompt": "a cat"}, "classes"),
        ({}, "classes"),
    ],
)
def test_a_bad_call_ends_in_one_line(pipe, call, named):
    with pytest.raises(InputError, match=named) as caught:
        pipe(**call)
    assert "\n" not in str(caught.value)


def test_saving_a_pipeline_says_to_copy_its_folder(pipe, tmp_path):
    with pytest.raises(InputError, match="copy the folder"):
        pipe.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("file", ["pipeline.py", "transformer/deepflow_transformer.py"])
def test_without_this_repository_its_installation_is_named(folder, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "sampling.pipeline", None)
    with pytest.raises(ImportError, match=r"DeepFlow.*pip install"):
        runpy.run_path(str(folder / file))


def test_a_vae_elsewhere_is_named_and_another_is_refused(ckpt, tmp_path, vae):
    content = tiny.load(ckpt)
    content["data"]["vae"] = str(tmp_path / "moved")
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=f"{tmp_path}/moved.*--vae"):
        main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--diffusers"])
    other = tiny.vae_folder(tmp_path / "other", scale=0.25)
    with pytest.raises(InputError, match="--vae"):
        main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--diffusers", "--vae", str(other)])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--vae belongs to --diffusers"):
        main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--vae", str(vae)])
    main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--diffusers", "--vae", str(vae)])
    assert (tmp_path / "out/vae/config.json").is_file()
