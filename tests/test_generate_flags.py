"""What flags of generate.py do end to end: formats, labels, pictures, samplers; and what is refused."""

import argparse
import json
import os
import shutil

import numpy as np
import programs
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image

from common.errors import InputError
from common.flags import parse_flags
from generate import GenerateConfig
from models import load_model, model_config
from models.codec import LatentCodec
from models.deepflow import DeepFlow
from sampling import sampler

# ----------------------------------------------------------------------------------- formats, labels, pictures


def test_png_alone_writes_no_npz(reference, ckpt, tmp_path):
    tiny.run_generate_only(ckpt, tmp_path, format="png")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert tiny.file_bytes(folder) == tiny.file_bytes(reference[0])
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, folder.name + ".json"}


def test_npz_alone_leaves_no_images_and_is_not_made_twice(reference, ckpt, tmp_path, monkeypatch):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, format="npz")
    assert np.array_equal(array, reference[1])
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    rows = tiny.count_calls(monkeypatch)
    npz = folder.with_name(folder.name + ".npz")
    os.utime(npz, (0, 0))
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format="npz")[1], array)
    assert rows == []
    assert npz.stat().st_mtime > 0  # the newest, which script/measure.sh takes


def test_an_npz_of_other_settings_is_not_taken_over_where_its_folder_was_deleted(ckpt, tmp_path):
    """The error that refuses other settings says: delete the folder."""
    labels = tmp_path / "labels.txt"
    labels.write_text("0")
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, format="npz", labels=labels)
    shutil.rmtree(folder)
    labels.write_text("1")
    _, other, manifest = tiny.run_generate(ckpt, tmp_path, format="npz", labels=labels)
    assert manifest["labels"] == [1] * 5 and not np.array_equal(other, array)


def test_latents_are_those_that_are_decoded(reference, ckpt, vae, tmp_path):
    tiny.run_generate_only(ckpt, tmp_path, decode=False)
    (npz,) = tmp_path.glob("*-latents.npz")
    content = np.load(npz)
    assert content.files == ["latents"]
    latents = content["latents"]
    assert (latents.shape, latents.dtype) == ((5, 4, 8, 8), np.float32)
    images = LatentCodec.load(vae).decode(torch.from_numpy(latents)).numpy()
    assert np.abs(images.astype(int) - reference[1]).max() <= 1  # decoded in another batch


@pytest.mark.parametrize("size", [1, 2, 5])
def test_decoding_in_chunks_changes_no_pixel_by_more_than_rounding(reference, ckpt, tmp_path, size):
    _, array, _ = tiny.run_generate(ckpt, tmp_path, decode_batch_size=size)
    assert np.abs(array.astype(int) - reference[1]).max() <= 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_networks_and_decoders_give_nearly_the_same_images(reference, ckpt, tmp_path, dtype):
    _, array, manifest = tiny.run_generate(ckpt, tmp_path / "a", dtype=dtype)
    assert manifest["dtype"] == dtype and not np.array_equal(array, reference[1])
    assert np.abs(array.astype(int) - reference[1]).mean() < 1
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "b", vae_dtype=dtype)
    assert np.abs(array.astype(int) - reference[1]).mean() < 1


def test_a_network_that_overflows_in_half_precision_is_told_from_a_broken_one(vae, tmp_path):
    path = tiny.checkpoint(tmp_path / "large.pt", vae, std=2.0)
    with pytest.raises(InputError, match=r"samples that are not finite .*; try --dtype fp32"):
        tiny.run_generate(path, tmp_path / "samples", dtype="fp16")


def test_a_decoder_that_overflows_in_half_precision_gives_no_black_images(vae, ckpt, tmp_path):
    large = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        large.decoder.conv_out.weight.mul_(1e7)
    large.save_pretrained(tmp_path / "tiny-vae")
    with pytest.raises(InputError, match=r"tiny-vae gives pixels that are not finite in torch\.float16; use fp32"):
        tiny.run_generate(ckpt, tmp_path / "samples", vae=tmp_path / "tiny-vae", vae_dtype="fp16")
    assert not list((tmp_path / "samples").rglob("*.png"))


def test_what_is_compiled_is_the_network_and_kept_beside_the_samples(ckpt, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(sampler, "compile_blocks", compiled.append)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    _, _, manifest = tiny.run_generate(ckpt, tmp_path, compile=True)
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(tmp_path / ".compile_cache")
    assert [model.kind for model in compiled] == ["flow"] and manifest["compile"]


def test_latents_that_the_vae_cannot_decode_are_refused(vae, tmp_path):
    path = tiny.checkpoint(tmp_path / "eight.pt", vae, in_channels=8)
    with pytest.raises(InputError, match=r"eight\.pt makes latents of 8 channels, but its VAE .* decodes 4; pass"):
        tiny.run_generate(path, tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_labels_are_taken_in_turn_from_a_list_or_a_file(ckpt, tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeff2 0\n0\n\n1\n2\n", "utf-8")  # as some editors write it
    for text, expected in (("2,0", [2, 0, 2, 0, 2]), (tmp_path / "labels.txt", [2, 0, 0, 1, 2])):
        _, _, manifest = tiny.run_generate(ckpt, tmp_path / f"{len(expected)}{expected[2]}", labels=text)
        assert manifest["labels"] == expected
    (tmp_path / "moved").mkdir()
    (tmp_path / "labels.txt").rename(tmp_path / "moved/labels.txt")
    assert tiny.run_generate(ckpt, tmp_path / "50", labels=tmp_path / "moved/labels.txt")[2]["labels"] == expected
    (tmp_path / "moved/labels.txt").write_text("2\n1\n")
    with pytest.raises(InputError, match="other settings: SHA-256 of the --labels or --prompts file was "):
        tiny.run_generate(ckpt, tmp_path / "50", labels=tmp_path / "moved/labels.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [("0,3", "'3' is not a class from 0 to 2"), ("nowhere.txt", "or a text file"), ("", "is empty")],
)
def test_labels_that_are_none_are_refused(ckpt, tmp_path, labels, message):
    with pytest.raises(InputError, match=f"--labels {labels}.*{message}"):
        tiny.run_generate(ckpt, tmp_path, labels=labels)
    assert not list(tmp_path.iterdir())


def test_labels_in_a_pipe_are_refused_instead_of_waited_for(ckpt, tmp_path):
    os.mkfifo(tmp_path / "labels")
    with pytest.raises(InputError, match=rf"--labels {tmp_path}/labels.* text file"):
        tiny.run_generate(ckpt, tmp_path / "s", labels=tmp_path / "labels")


@pytest.mark.parametrize("text", ["", "1 x", "-1"])
def test_label_files_that_hold_something_else_are_refused(ckpt, tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=r"labels\.txt: .* is not a class from 0 to 2"):
        tiny.run_generate(ckpt, tmp_path / "s", labels=tmp_path / "labels.txt")


def test_classes_by_name(ckpt, tmp_path, capsys):
    content = tiny.load(ckpt)
    content["data"]["class_names"] = ["robin", "0", "tabby cat"]
    torch.save(content, tmp_path / "named.pt")
    (tmp_path / "labels.txt").write_text("robin\ntabby cat\n")
    names = {"tabby cat, robin,0": [2, 0, 0, 2, 0], tmp_path / "labels.txt": [0, 2, 0, 2, 0], "robin": [0] * 5}
    for number, (text, expected) in enumerate(names.items()):
        _, _, manifest = tiny.run_generate(tmp_path / "named.pt", tmp_path / str(number), labels=text)
        assert manifest["labels"] == expected  # a number is a class's number even if a class is called so
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--labels")]
        assert said == ["--labels tabby cat, robin,0: 0 is class number 0, robin; the class of that name is 1"][number:]
    out = tmp_path / "a.png"
    tiny.run_generate_only(tmp_path / "named.pt", tmp_path, grid="1x2", classes="tabby cat,robin", out=out)
    assert json.loads(out.with_suffix(".json").read_text())["labels"] == [2, 0]
    for given, text in (("labels", "robin,tabi"), ("classes", "robin,tabi")):
        with pytest.raises(InputError, match=f"--{given} {text}: 'tabi' .* from 0 to 2.*robin"):
            tiny.run_generate_only(tmp_path / "named.pt", tmp_path, grid="1x2", **{given: text})


@pytest.mark.parametrize("folder", ["run", "run/"])
def test_a_runs_folder_stands_for_its_newest_checkpoint(ckpt, vae, tmp_path, capsys, folder):
    checkpoints = tmp_path / "run/checkpoints"
    with pytest.raises(InputError, match=r"run.* holds no checkpoint yet"):
        checkpoints.mkdir(parents=True)
        tiny.run_generate(f"{tmp_path}/{folder}", tmp_path / "samples")
    tiny.checkpoint(checkpoints / "0000009.pt", vae)
    tiny.checkpoint(checkpoints / "0000010.pt", vae, steps=10)
    (checkpoints / "0000011.pt.abandoned").touch()
    (tmp_path / "run/config.json").write_text("{}")
    images, _, manifest = tiny.run_generate(f"{tmp_path}/{folder}", tmp_path / "samples")
    assert manifest["ckpt"] == str(checkpoints / "0000010.pt") and images.name == "tiny-0000010-sde-4-seed-0"
    assert str(checkpoints / "0000010.pt") in capsys.readouterr().out
    assert load_model(tmp_path / "run")[1] == load_model(ckpt)[1]


def test_a_picture_of_chosen_classes(ckpt, tmp_path):
    out = tmp_path / "pictures/a.png"
    tiny.run_generate_only(ckpt, tmp_path / "none", grid="2x3", classes="2,0", seed=5, out=out)
    manifest = json.loads(out.with_suffix(".json").read_text())
    assert (manifest["labels"], manifest["global_seed"]) == ([2, 2, 2, 0, 0, 0], 5)
    assert not (tmp_path / "none").exists()
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "many", labels="2,2,2,0,0,0", num_fid_samples=6, global_seed=5)
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture[66::4, -64::4], array[5]) and picture.shape == (130, 13 + 196, 3)  # enlarged
    assert picture[:16, :13].min() < 128  # "2"


def test_a_picture_names_the_classes_of_its_rows(ckpt, tmp_path):
    content = tiny.load(ckpt)
    content["data"]["class_names"] = ["robin", "tench", "tabby"]
    torch.save(content, tmp_path / "named.pt")
    tiny.run_generate_only(tmp_path / "named.pt", tmp_path, grid="2x2", labels="0,0,1,2", out=tmp_path / "a.png")
    beside = np.asarray(Image.open(tmp_path / "a.png"))[:, :-130]
    one, two = (np.flatnonzero(row.min((1, 2)) < 128) for row in (beside[:64], beside[66:]))
    assert 0 < len(one) < len(two)  # robin; tench and tabby


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"grid": "8"}, "--grid '8' is not of the form 8x8"),
        ({"grid": "0x8"}, "--grid '0x8'"),
        ({"grid": "1x2", "classes": "0,1,2"}, "--classes names 3 classes for 2 images"),
        ({"grid": "1x2", "classes": "0,x"}, "--classes 0,x: 'x'"),
        ({"grid": "1x2", "out": "a.json"}, "--out a.json must end in .png"),
        ({"classes": "0"}, "--classes belongs to --grid"),
        ({"grid": "1x2", "classes": "0", "labels": "balanced"}, "--classes and --labels balanced exclude each other"),
        ({"out": "a.png"}, "--out belongs to --grid"),
        ({"decode": False, "format": "png"}, "--no-decode keeps latents"),
        ({"decode": False, "grid": "1x2"}, "--no-decode keeps latents"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(ckpt, tmp_path, changes, culprit):
    with pytest.raises(InputError, match=culprit):
        tiny.run_generate_only(ckpt, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- samplers and guidance


@pytest.mark.parametrize(
    ("changes", "calls", "guided"),
    [
        ({}, 4, 0),
        ({"mode": "ode"}, 4, 0),
        ({"mode": "ode", "heun": True}, 7, 0),  # none in the last step
        ({"cfg_scale": 2.0}, 4, 4),
        ({"cfg_scale": 2.0, "guidance_low": 0.3, "guidance_high": 0.7}, 4, 2),  # of t = 1, 0.68, 0.36, 0.04
        ({"mode": "ode", "cfg_scale": 1.5, "guidance_low": 0.5}, 4, 3),  # t = 1, 0.75, 0.5
    ],
)
def test_forward_passes_in_the_manifest_are_those_made(ckpt, tmp_path, monkeypatch, changes, calls, guided):
    rows = tiny.count_calls(monkeypatch)
    _, _, manifest = tiny.run_generate(ckpt, tmp_path, num_fid_samples=2, **changes)
    assert len(rows) == calls == manifest["forward_passes"]
    assert rows.count(4) == guided == manifest["guided_passes"]
    assert rows.count(2) == calls - guided
    assert manifest["model_evaluations"] == calls + guided


@pytest.mark.parametrize(("mode", "steps"), [("sde", 250), ("ode", 50), ("euler", 4), ("restart", 4)])
def test_default_steps(mode, steps):
    config = GenerateConfig(ckpt="x", mode=mode)
    assert config.for_model("flow map").num_steps == steps
    assert config.num_steps is None  # that was a copy
    assert GenerateConfig(ckpt="x", mode=mode, num_steps=7).for_model("flow map").num_steps == 7


@pytest.mark.parametrize(
    ("kind", "mode", "steps"), [("flow", "sde", 250), ("text", "sde", 250), ("flow map", "euler", 4)]
)
def test_the_sampler_follows_the_kind_of_model(kind, mode, steps):
    config = GenerateConfig(ckpt="x").for_model(kind)
    assert (config.mode, config.num_steps) == (mode, steps)
    assert GenerateConfig(ckpt="x", num_steps=2).for_model(kind).num_steps == 2
    assert GenerateConfig(ckpt="x", mode="ode").for_model(kind).num_steps == 50


def test_help_says_which_sampler_is_the_default(capsys):
    with pytest.raises(SystemExit):
        parse_flags(GenerateConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: sde, or euler for flow maps" in text and "default: 250 for sde" in text and "4 for euler" in text


def test_guidance_changes_the_images_and_scale_one_does_not(reference, ckpt, tmp_path):
    _, one, _ = tiny.run_generate(ckpt, tmp_path / "one", cfg_scale=1.0, guidance_low=0.2)
    assert np.array_equal(one, reference[1])
    _, two, _ = tiny.run_generate(ckpt, tmp_path / "two", cfg_scale=3.0)
    assert not np.array_equal(two, reference[1])


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"heun": True}, "--heun"),
        ({"cfg_scale": 0.5}, "--cfg-scale 0.5"),
        ({"cfg_scale": 2, "guidance_low": 0.8, "guidance_high": 0.2}, "--guidance-low 0.8 and --guidance-high 0.2"),
        ({"cfg_scale": 2, "guidance_low": 0.1, "guidance_high": 0.2}, "guide no step"),
        ({"num_fid_samples": 0}, "--num-fid-samples 0"),
        ({"per_proc_batch_size": 0}, "--per-proc-batch-size 0"),
        ({"num_steps": 0}, "--num-steps 0"),
        ({"global_seed": -1}, "--global-seed -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ckpt, tmp_path, changes, culprit):
    with pytest.raises(InputError, match=culprit):
        tiny.run_generate(ckpt, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ what the checkpoint answers


def test_flags_that_agree_with_the_checkpoint_change_nothing(reference, ckpt, vae, tmp_path):
    same = {"model": "DeepFlow-Ti/2", "df_idxs": "[2]", "num_classes": 3, "path_type": "linear", "resolution": 16}
    same.update(trans_depth=4, legacy_scaling=False, ssl_align=False, qk_norm=False, vae=vae)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, **same)[1], reference[1])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("model", "DeepFlow-S/2"),
        ("model", "SiT-Ti/2"),
        ("df_idxs", "[1]"),
        ("num_classes", 1000),
        ("path_type", "cosine"),
        ("resolution", 32),
        ("trans_depth", 6),
        ("legacy_scaling", True),
        ("ssl_align", True),
        ("qk_norm", True),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(ckpt, tmp_path, flag, value):
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} .*contradicts {ckpt}"):
        tiny.run_generate(ckpt, tmp_path, **{flag: value})
    assert not list(tmp_path.iterdir())


def test_a_vae_of_another_family_is_refused_with_the_right_one_named(ckpt, vae, tmp_path):
    other = tiny.vae_folder(tmp_path / "other-vae")
    with pytest.raises(InputError, match=rf"VAE mismatch: .*--vae has family other-vae.*; use --vae {vae}"):
        tiny.run_generate(ckpt, tmp_path / "samples", vae=other)
    assert not (tmp_path / "samples").exists()


def test_a_vae_of_another_scale_is_refused(ckpt, tmp_path):
    other = tiny.vae_folder(tmp_path / "tiny-vae", scale=0.25)
    with pytest.raises(InputError, match=r"VAE mismatch: .* has scale 0.5 .*--vae has scale 0.25"):
        tiny.run_generate(ckpt, tmp_path / "samples", vae=other)


def test_a_missing_vae_is_named(ckpt, tmp_path):
    with pytest.raises(InputError, match=r"cannot load the VAE '.*nowhere'.*pass --vae"):
        tiny.run_generate(ckpt, tmp_path, vae=tmp_path / "nowhere")


@pytest.fixture
def published_vae(tmp_path):
    """A tiny VAE of the family and scale that published files are taken to be of."""
    return tiny.vae_folder(tmp_path / "sd-vae-ft-ema", scale=0.18215)


def published(path, **overrides):
    """A plain state dict as others publish them, with the weights of tiny.checkpoint's EMA."""
    options = {"input_size": tiny.SIZE, "num_classes": tiny.CLASSES, **overrides}
    model = DeepFlow(**model_config("DeepFlow-Ti/2", **options))
    torch.save(tiny.fill_(model, seed=2, std=0.05).state_dict(), path)
    return path


def test_a_published_state_dict_works_with_the_published_flags(published_vae, tmp_path):
    path = published(tmp_path / "released.pt", df_idxs=(3,))
    flags = {"model": "DeepFlow-Ti/2", "df_idxs": "[3]", "num_classes": 3, "vae": published_vae}
    flags.update(ssl_align=False, legacy_scaling=False, path_type="linear", projector_embed_dims="768,1024")
    folder, array, manifest = tiny.run_generate(path, tmp_path / "samples", **flags)
    assert array.shape == (5, 16, 16, 3)
    assert (manifest["model"], manifest["step"], manifest["model_options"]["df_idxs"]) == ("DeepFlow-Ti/2", None, [3])
    assert folder.name.startswith("DeepFlow-Ti-2-released-sde-")
    flags["df_idxs"] = "[2]"  # the same parameters with the branches ending elsewhere
    assert not np.array_equal(tiny.run_generate(path, tmp_path / "other", **flags)[1], array)


def test_a_published_files_own_settings_reach_sampling(published_vae, tmp_path):
    plain = published(tmp_path / "plain.pt", df_idxs=(3,))
    args = argparse.Namespace(df_idxs="[3]", path_type="cosine", model="DeepFlow-B/2", trans_depth=4)
    torch.save({"ema": torch.load(plain), "args": args}, tmp_path / "with.pt")
    flags = {"vae": published_vae}
    expected = tiny.run_generate(plain, tmp_path / "a", **flags, df_idxs="[3]", path_type="cosine")
    found = tiny.run_generate(tmp_path / "with.pt", tmp_path / "b", **flags)
    assert np.array_equal(found[1], expected[1])
    assert found[2]["path_type"] == "cosine" and found[2]["model_options"]["df_idxs"] == [3]
    other = tiny.run_generate(tmp_path / "with.pt", tmp_path / "c", **flags, path_type="linear")
    assert other[2]["path_type"] == "linear" and not np.array_equal(other[1], expected[1])


def test_a_published_state_dict_of_another_model_is_refused(published_vae, tmp_path):
    path = published(tmp_path / "released.pt")
    for name in ("DeepFlow-B/2", "SiT-Ti/2"):
        with pytest.raises(InputError, match=f"--model {name} contradicts {path}, which holds depth 4, width 128"):
            tiny.run_generate(path, tmp_path / "samples", model=name, vae=published_vae)


# ---------------------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def nan_ckpt(vae, tmp_path):
    path = tiny.checkpoint(tmp_path / "nan.pt", vae)
    content = tiny.load(path)
    content["ema"]["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(content, path)
    return path


def test_weights_that_are_not_finite_give_no_image(nan_ckpt, tmp_path):
    with pytest.raises(InputError, match=rf"{nan_ckpt} gives samples that are not finite \(images 0..1\)"):
        tiny.run_generate(nan_ckpt, tmp_path / "samples")
    assert not list((tmp_path / "samples").rglob("*.png"))
    assert not list((tmp_path / "samples").rglob("*.npz"))


def test_weights_that_are_not_finite_end_in_one_line(nan_ckpt, tmp_path):
    done = programs.run(tiny.ROOT / "generate.py", *tiny.generate_flags(nan_ckpt, tmp_path / "samples"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip() and "?image/s" not in line]
    assert line.startswith(f"error: {nan_ckpt} gives samples that are not finite")


def test_missing_truncated_and_foreign_files_are_named(ckpt, tmp_path):
    whole = ckpt.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name in ("missing", "truncated", "empty", "text", "other", "list"):
        with pytest.raises(InputError, match=str(tmp_path / f"{name}.pt")):
            tiny.run_generate(tmp_path / f"{name}.pt", tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("changes", "culprit"), [({}, "--sample-dir FILE.* cannot be written"), ({"grid": "1x1"}, "--out FILE/grid.png")]
)
def test_a_place_that_cannot_be_written_is_named_before_sampling(ckpt, tmp_path, monkeypatch, changes, culprit):
    file = tmp_path / "file"
    file.touch()
    rows = tiny.count_calls(monkeypatch)
    out = {"out": file / "grid.png"} if changes else {}
    with pytest.raises(InputError, match=culprit.replace("FILE", str(file))):
        tiny.run_generate_only(ckpt, file, **changes, **out)
    assert rows == []
