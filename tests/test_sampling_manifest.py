"""The manifest of samples and the settings of their folder: what they hold, what is read back, what is refused."""

import dataclasses
import json
import re
import types

import pytest

from common.errors import InputError
from generate import GenerateConfig
from generate_t2i import TextGenerateConfig
from models.checkpoints import Checkpoint
from samplers import sample_labels
from sampling.conditions import ClassLabels
from sampling.manifest import SETTINGS, SampleManifest, check_settings, manifest_path, read_manifest

# Flags that affect no image, or only repeat what `model_options`, `weights_sha256` and `labels` say.
UNRECORDED = {"sample_dir", "projector_embed_dims", "resume", "grid", "classes", "out", "num_classes", "resolution"}
UNRECORDED |= {"trans_depth", "df_idxs", "dmf_depth", "qk_norm", "legacy_scaling", "ssl_align", "convention"}

MANIFEST = SampleManifest(
    ckpt="a.pt",
    mode="ode",
    num_steps=50,
    cfg_scale=1.5,
    num_fid_samples=2,
    labels=[3, 1],
    label_mode="random",
    model_options={"depth": 2, "df_idxs": (1,)},
    weights_sha256="0" * 64,
)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("config", [GenerateConfig, TextGenerateConfig])
def test_every_flag_that_decides_an_image_is_recorded(config):
    recorded = {field.name for field in dataclasses.fields(SampleManifest)}
    assert {field.name for field in dataclasses.fields(config)} - recorded == UNRECORDED & {
        field.name for field in dataclasses.fields(config)
    }


def test_a_manifest_is_read_as_written(tmp_path):
    found = read_manifest(write(tmp_path / "a.json", MANIFEST.to_json()))
    assert found == dataclasses.replace(MANIFEST, model_options={"depth": 2, "df_idxs": [1]})
    assert found.to_json() == MANIFEST.to_json()


def test_keys_of_prompts_are_written_for_prompts_only():
    keys = {"prompts", "images_per_prompt", "text_encoder", "text"}
    assert not keys & MANIFEST.to_json().keys()
    assert keys <= dataclasses.replace(MANIFEST, text={"width": 32}).to_json().keys()


def test_settings_are_what_decides_the_images():
    settings = MANIFEST.settings("png")
    assert (settings["labels"], settings["kept_as"], settings["model_options"]["df_idxs"]) == ("random", "png", [1])
    assert not {"ckpt", "num_fid_samples", "label_mode", "versions"} & settings.keys()
    moved = dataclasses.replace(MANIFEST, ckpt="b.pt", num_fid_samples=7, labels=[3, 1, 0], compile=True)
    assert moved.settings("png") == settings
    assert dataclasses.replace(MANIFEST, num_steps=51).settings("png") != settings


def test_what_others_write_is_read_as_far_as_it_goes(tmp_path):
    found = read_manifest(write(tmp_path / "a.json", {"labels": ["a cat"], "step": 7, "colour": "red"}))
    assert (found.labels, found.step, found.model) == (["a cat"], 7, None)
    assert read_manifest(write(tmp_path / "b.json", {"cfg_scale": 2})).cfg_scale == 2  # a whole number is one too


@pytest.mark.parametrize("content", [{"labels": "random"}, {"num_steps": "4"}, {"text": []}, [], 3, None])
def test_a_manifest_of_other_types_is_refused_by_name(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_manifest(path)
    assert not isinstance(content, dict) or next(iter(content)) in str(caught.value)


def test_the_first_changed_setting_is_named(tmp_path):
    write(tmp_path / SETTINGS, MANIFEST.settings("png"))
    check_settings(tmp_path, MANIFEST.settings("png"))
    changed = dataclasses.replace(MANIFEST, num_steps=4, cfg_scale=1.0)
    with pytest.raises(InputError, match=r"--num-steps was 50, is now 4; delete the folder or pass .*--sample-dir"):
        check_settings(tmp_path, changed.settings("png"))
    with pytest.raises(InputError, match=r"--format was png or both, is now npz; pass --format both, or another"):
        check_settings(tmp_path, MANIFEST.settings("parts"))
    write(tmp_path / SETTINGS, [])
    with pytest.raises(InputError, match=SETTINGS):
        check_settings(tmp_path, MANIFEST.settings("png"))


@pytest.mark.parametrize("name", ["cfg-1.5-sde.npz", "cfg-1.5-sde", "cfg-1.5-sde/"])
def test_where_a_manifest_lies(name):
    assert str(manifest_path(f"samples/{name}")) == "samples/cfg-1.5-sde.json"


def class_labels(mode, seed=0, count=24):
    config = GenerateConfig(ckpt="a.pt", labels=mode, global_seed=seed, num_fid_samples=count)
    model = types.SimpleNamespace(kind="flow")
    return ClassLabels(config, Checkpoint(model, {"num_classes": 10}, run={}, data={}, steps=None, path="a.pt"), "cpu")


def test_class_labels():
    assert class_labels("balanced").of([0, 9, 10, 23])[0].tolist() == [0, 9, 0, 3]
    assert class_labels("2,0").of(range(3))[0].tolist() == [2, 0, 2]
    drawn = class_labels("random", 5)
    assert drawn.of([7, 3])[0].equal(sample_labels(5, [7, 3], 10))
    y, y_null = class_labels("random", 5, count=3).of(range(3))
    assert y_null.tolist() == [10] * 3 and y.dtype == y_null.dtype
    assert class_labels("random", 5, count=3).facts() == {
        "label_mode": "random",
        "labels": y.tolist(),
        "labels_sha256": None,
    }
