"""A user's mistakes in training end in one line that names the culprit, and leave nothing behind."""

import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import programs
import pytest
import tiny
import torch

from common.errors import InputError
from common.flags import parse_flags
from training.config import TrainConfig


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def refused(data, tmp_path, culprit, **changes):
    """Training must raise an InputError of one line that matches `culprit`, before it makes the run's folder."""
    with pytest.raises(InputError, match=culprit) as caught:
        tiny.run_train(data, tmp_path / "exps", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exps").exists()


def refused_on_resume(data, tmp_path, culprit, **changes):
    """Going on with the run in tmp_path/exps must raise an InputError, and change none of its files."""
    run_dir = tmp_path / "exps/run"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=culprit) as caught:
        tiny.run_train(data, tmp_path / "exps", **{"resume": "auto", **changes})
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


# -------------------------------------------------------------------------------------------------- the data


def test_missing_data_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, r"--data-dir .*nowhere does not exist")


def test_empty_data_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"--data-dir .*empty has no vae-sd")


def test_folder_without_latents(data, tmp_path):
    for index in range(12):
        tiny.moments_file(data, index).unlink()
    refused(data, tmp_path, r"img-mean-std-00000000.npy .* encode it again")


def test_missing_label_file(tmp_path):
    data = tiny.data_folder(tmp_path / "data", manifest=False)
    (data / "vae-sd/dataset.json").unlink()
    refused(data, tmp_path, "data has no vae-sd/dataset.json")


def test_labels_that_are_null(tmp_path):
    data = tiny.data_folder(tmp_path / "data", manifest=False)
    (data / "vae-sd/dataset.json").write_text('{"labels": null}')
    refused(data, tmp_path, r"dataset.json: labels are missing")


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range(tmp_path, label):
    data = tiny.data_folder(tmp_path / "data", labels=[0, 1, 2, label] * 3)
    refused(data, tmp_path, rf"dataset.json: label {label} is out of range for 3 classes")


def test_label_beyond_num_classes(tmp_path):
    data = tiny.data_folder(tmp_path / "data", manifest=False)
    refused(data, tmp_path, r"label 2 is out of range for 2 classes", num_classes=2)


def test_label_that_is_no_integer(tmp_path):
    data = tiny.data_folder(tmp_path / "data", labels=[0, 1, "cat"] * 4)
    refused(data, tmp_path, r"dataset.json: .* is 'cat'.*; prepare it")


def test_damaged_label_file(data, tmp_path):
    (data / "vae-sd/dataset.json").write_text('{"labels": [["img')
    refused(data, tmp_path, r"dataset.json .*; prepare it")


def test_one_latent_of_another_shape(data, tmp_path):
    np.save(tiny.moments_file(data, 5), np.zeros((8, 4, 4), np.float32))
    with pytest.raises(InputError, match=r"img-mean-std-00000005.npy has shape \(8, 4, 4\)"):
        tiny.run_train(data, tmp_path)


def test_one_truncated_latent(data, tmp_path):
    path = tiny.moments_file(data, 5)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"img-mean-std-00000005.npy is truncated"):
        tiny.run_train(data, tmp_path)


def test_latents_that_were_sampled_already(tmp_path):
    data = tiny.data_folder(tmp_path / "data", shape=(4, 8, 8))
    refused(data, tmp_path, r"latents have shape \(4, .*\(8, h, h\): mean and std .* encode the images again")


@pytest.mark.parametrize("shape", [(8, 8, 6), (32, 8, 8), (8, 64)])
def test_latents_of_an_odd_shape(tmp_path, shape):
    data = tiny.data_folder(tmp_path / "data", shape=shape)
    refused(data, tmp_path, r"data/vae-sd: latents have shape \(")


def test_latents_that_the_patches_do_not_tile(tmp_path):
    data = tiny.data_folder(tmp_path / "data", shape=(8, 7, 7))
    refused(data, tmp_path, r"latents of size 7 do not divide into patches of 2")


def test_resolution_that_contradicts_the_data(data, tmp_path):
    refused(data, tmp_path, r"--resolution 256 contradicts --data-dir .*16x16", resolution=256)


def test_number_of_classes_that_contradicts_the_data(data, tmp_path):
    refused(data, tmp_path, r"--num-classes 5: .*manifest.json says 3", num_classes=5)


def test_fewer_samples_than_one_batch(data, tmp_path):
    refused(data, tmp_path, r"--batch-size 16: the data holds only 12", batch_size=16)


def test_vae_of_the_grids_is_not_that_of_the_data(data, tmp_path):
    vae = tiny.vae_folder(tmp_path / "other-vae")
    culprit = r"VAE mismatch: the data has family tiny-vae .*--vae has family other-vae"
    refused(data, tmp_path, culprit, sampling_steps=2, vae=vae)


def test_scale_of_the_grids_vae_is_not_that_of_the_data(data, tmp_path):
    vae = tiny.vae_folder(tmp_path / "tiny-vae", scale=0.25)
    refused(data, tmp_path, r"the data has scale 0.5 .*--vae has scale 0.25", sampling_steps=2, vae=vae)


# --------------------------------------------------------------------------------------------- the checkpoint


@pytest.fixture
def run(data, tmp_path):
    """A run in tmp_path/exps with one checkpoint, at step 2; returns the checkpoint's path."""
    return tiny.run_train(data, tmp_path / "exps", max_train_steps=2) / "checkpoints/0000002.pt"


def test_resume_step_that_is_not_there(run, data, tmp_path):
    refused_on_resume(data, tmp_path, r"--resume 3: .*0000003.pt does not exist; the run has", resume=3)


def test_truncated_checkpoint(run, data, tmp_path):
    whole = run.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        run.write_bytes(whole[:size])
        refused_on_resume(data, tmp_path, r"0000002.pt is unreadable or truncated")


def test_checkpoint_with_python_objects(run, data, tmp_path):
    torch.save({"model": tiny.SPEC}, run)
    refused_on_resume(data, tmp_path, r"0000002.pt holds the Python object models.specs.LatentSpec")


def test_checkpoint_that_is_not_of_a_run(run, data, tmp_path):
    content = tiny.load(run)
    torch.save([1, 2], run)
    refused_on_resume(data, tmp_path, r"0000002.pt.*--resume")
    for entry in ("model", "opt", "train_state"):
        torch.save({name: value for name, value in content.items() if name != entry}, run)
        refused_on_resume(data, tmp_path, rf"0000002.pt: '{entry}' Field required")


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"trans_depth": 3}, "--trans-depth was 2, is 3"),
        ({"model": "SiT-Ti/2", "df_idxs": "[]"}, "--model was DeepFlow-Ti/2, is SiT-Ti/2"),
        ({"qk_norm": True}, "--qk-norm was False, is True"),
        ({"legacy_scaling": True}, "--legacy-scaling was False, is True"),
        ({"path_type": "cosine"}, "--path-type was linear, is cosine"),
    ],
)
def test_checkpoint_of_another_model(run, data, tmp_path, changes, culprit):
    culprit = rf"0000002.pt was made with other settings: .*{culprit}.*; start afresh under another --exp-name$"
    for allowed in (False, True):
        refused_on_resume(data, tmp_path, culprit, allow_changes=allowed, **changes)


def test_checkpoint_of_the_same_blocks_with_other_key_layers(data, tmp_path):
    tiny.run_train(data, tmp_path / "exps", max_train_steps=1, trans_depth=3, df_idxs="1")
    culprit = r"0000001.pt was made with other settings: --df-idxs was \(1,\), is \(2,\); start afresh"
    refused_on_resume(data, tmp_path, culprit, trans_depth=3, df_idxs="2")


def test_checkpoint_whose_weights_are_not_those_of_its_settings(run, data, tmp_path):
    content = tiny.load(run)
    content["model"]["extra"] = torch.zeros(1)
    torch.save(content, run)
    refused_on_resume(data, tmp_path, r"0000002.pt is of another model: Unexpected .*extra")


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.5},
        {"tg_upper_bound": 0.5},
        {"acc_coeff": 0.5},
        {"weighting": "uniform"},
        {"cfg_prob": 0.5},
        {"seed": 5},
        {"batch_size": 2},
        {"mixed_precision": "bf16"},
        {"scale_weight": [0.5, 1.0]},
        {"mirror": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_going_on_with_other_settings(run, data, tmp_path, changes):
    if "mirror" in changes:
        shutil.copytree(data / "vae-sd", data / "vae-sd-mirror")
    (flag,), (now,) = changes.keys(), changes.values()
    culprit = rf"0000002.pt was made with other settings: --{flag.replace('_', '-')} was .*, is {re.escape(str(now))}; "
    culprit += "start afresh under another --exp-name, or pass --allow-changes to go on$"
    refused_on_resume(data, tmp_path, culprit, max_train_steps=4, **changes)
    refused_on_resume(data, tmp_path, culprit, max_train_steps=2, **changes)  # where nothing is left to train


def test_going_on_with_more_images(run, tmp_path):
    data = tiny.data_folder(tmp_path / "more", count=16)
    refused_on_resume(data, tmp_path, r"settings: number of images in --data-dir was 12, is 16; start afresh")


@pytest.mark.parametrize(
    ("spec", "culprit"),
    [
        ({"family": "other"}, "family tiny-vae .*--data-dir has family other"),
        ({"scale": 0.3}, "scale 0.5 .*--data-dir has scale 0.3"),
        ({"shift": 0.1}, "shift 0.0 .*--data-dir has shift 0.1"),
    ],
)
def test_going_on_with_the_data_of_another_vae(run, tmp_path, spec, culprit):
    data = tiny.data_folder(tmp_path / "other", spec=dataclasses.replace(tiny.SPEC, **spec))
    refused_on_resume(data, tmp_path, rf"VAE mismatch: .*0000002.pt has {culprit}")


def test_going_on_with_latents_of_another_size(run, tmp_path):
    data = tiny.data_folder(tmp_path / "other", shape=(8, 4, 4))
    refused_on_resume(data, tmp_path, r"was trained on data with moments_shape \[8, 8, 8\], --data-dir has \[8, 4, 4\]")


def test_going_on_with_other_classes(run, data, tmp_path):
    path = data / "vae-sd/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 4}))
    refused_on_resume(data, tmp_path, r"was trained on data with num_classes 3, --data-dir has 4")


def test_going_on_with_classes_in_another_order(data, tmp_path):
    path = data / "vae-sd/manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "class_names": ["cat", "dog", "hen"]}))
    tiny.run_train(data, tmp_path / "exps", max_train_steps=2)
    path.write_text(json.dumps({**content, "class_names": ["dog", "cat", "hen"]}))
    refused_on_resume(data, tmp_path, r"was trained on classes with other names, or in another order")


# -------------------------------------------------------------------------------------------------- the flags


def test_batch_that_the_micro_batches_do_not_divide(data, tmp_path):
    culprit = r"--batch-size 4 is not divisible by 1 processes x --gradient-accumulation-steps 3; .*multiple of 3"
    refused(data, tmp_path, culprit, gradient_accumulation_steps=3)


@pytest.mark.slow
def test_batch_that_the_processes_do_not_divide(data, tmp_path):
    flags = tiny.train_flags(data, tmp_path / "exps", batch_size=3)
    done = programs.run_ranks(2, tiny.ROOT / "train.py", *flags)
    assert done.returncode != 0
    assert "error: --batch-size 3 is not divisible by 2 processes" in done.stderr
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"scale_weight": [1.0]}, r"--scale-weight has 1 values for 2 branches"),
        ({"scale_weight": [0.1, 0.2, 1.0]}, r"--scale-weight has 3 values for 2 branches"),
        ({"df_idxs": "2"}, r"--df-idxs \[2\] .* from 1 to 1"),
        ({"df_idxs": "0"}, r"--df-idxs \[0\] .* from 1 to 1"),
        ({"df_idxs": "[1,9]"}, r"--df-idxs \[1, 9\] .* from 1 to 1"),
        ({"df_idxs": "[1,1]"}, r"--df-idxs \[1, 1\] .* from 1 to 1"),
        ({"trans_depth": 4, "df_idxs": "[2,1]"}, r"--df-idxs \[2, 1\] .* from 1 to 3"),
        ({"df_idxs": "middle"}, r"--df-idxs 'middle' is not a list"),
        ({"trans_depth": 0}, r"--trans-depth 0"),
        ({"model": "DeepFlow-XXL/2"}, r"--model 'DeepFlow-XXL/2' is unknown; choose one of DeepFlow-Ti/2"),
        ({"ssl_align": True}, r"data/images is missing and images are needed"),
        ({"enc_type": "dinov9-vit-b"}, r"--enc-type 'dinov9-vit-b' is unknown"),
        ({"ssl_align": True, "enc_type": "dino"}, r"--enc-type 'dino' is unknown; choose from dinov2-vit-s, "),
        ({"ssl_align": True, "enc_ckpt": "a,b"}, r"--enc-ckpt names 2 files for 1 encoders \(dinov2-vit-b\)"),
        ({"enc_ckpt": "a"}, r"^--enc-ckpt without alignment: pass --ssl-align, or drop it"),
        (
            {"encoder_depth": 1, "enc_type": "None"},
            r"^--encoder-depth without alignment: with --enc-type None .* drop one",
        ),
        ({"ssl_align": True, "enc_type": "None"}, r"--ssl-align has nothing to align with --enc-type None; name an"),
        ({"mixed_precision": "fp16"}, r"--mixed-precision fp16 needs a GPU"),
        ({"cfg_prob": 1.5}, r"--cfg-prob 1.5 is out of range; it must be at least 0 and at most 1"),
        ({"ema_decay": -0.1}, r"--ema-decay -0.1 is out of range; it must be at least 0"),
        ({"tg_upper_bound": "nan"}, r"--tg-upper-bound nan is out of range; it must be at least 0"),
        ({"adam_beta2": 1}, r"--adam-beta2 1.0 is out of range; it must be at least 0 and less than 1"),
        ({"batch_size": 0}, r"--batch-size 0 is out of range; it must be at least 1"),
        ({"learning_rate": 0}, r"--learning-rate 0.0 is out of range; it must be greater than 0"),
        ({"learning_rate": "nan"}, r"--learning-rate nan is out of range; it must be greater than 0"),
        ({"max_grad_norm": -1}, r"--max-grad-norm -1.0 is out of range; it must be greater than 0"),
        ({"max_train_steps": 0}, r"--max-train-steps 0 is out of range; it must be at least 1"),
        ({"learning_rate": "inf"}, r"--learning-rate inf is out of range; it must be greater than 0"),
        ({"scale_weight": [1.0, "nan"]}, r"--scale-weight nan is out of range; it must be finite"),
        ({"seed": -1}, r"--seed -1 is out of range; it must be at least 0"),
    ],
)
def test_flag_values_that_make_no_sense(data, tmp_path, changes, culprit):
    refused(data, tmp_path, culprit, **changes)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("resume", [False, True])
def test_an_output_folder_that_cannot_be_written(data, tmp_path, monkeypatch, number, resume):
    if resume:
        tiny.run_train(data, tmp_path / "exps", max_train_steps=2)

    def fail(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("common.files.tempfile.TemporaryFile", fail)
    monkeypatch.setattr("training.run.create_model", None)  # noticed before
    culprit = rf"--output-dir {tmp_path}.* cannot be written \({os.strerror(number)}\); "
    (refused_on_resume if resume else refused)(data, tmp_path, culprit)


def test_an_output_folder_that_is_a_file(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output-dir .*file.* cannot be written .*; a folder is needed"):
        tiny.run_train(data, tmp_path / "file")


@pytest.mark.parametrize(
    "line",
    [
        ["--weighting", "cosine"],
        ["--path-type", "bent"],
        ["--mixed-precision", "fp8"],
        ["--prediction", "x"],
        ["--report-to", "mail"],
        ["--batch-size", "four"],
        ["--learning-rate"],
    ],
)
def test_values_that_are_not_taken_are_named_with_the_flag(line):
    with pytest.raises(InputError, match=" ".join(line)):
        parse_flags(TrainConfig, ["--exp-name", "x", *line])


def test_a_value_that_is_almost_a_choice_is_suggested():
    with pytest.raises(InputError, match="did you mean lognormal"):
        parse_flags(TrainConfig, ["--weighting", "log-normal"])


@pytest.mark.parametrize("flag", ["--learning", "--no-such-flag"])  # abbreviations would change with a new flag
def test_unknown_flags_are_refused(flag):
    with pytest.raises(InputError, match=f"{flag} is unknown"):
        parse_flags(TrainConfig, ["--exp-name", "x", flag, "1e-4"])


def test_command_ends_with_one_line_and_exit_code_2(data, tmp_path):
    """A run that diverges: found late, in the loop, with threads and progress bar at work."""
    for index in range(12):
        np.save(tiny.moments_file(data, index), np.full((8, 8, 8), np.inf, np.float32))
    flags = tiny.train_flags(data, tmp_path / "exps", max_train_steps=30, log_every=100)
    done = programs.run(tiny.ROOT / "train.py", *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "step/s" not in line]
    assert [line.startswith("error: the loss or its gradients were not finite for 30 steps") for line in lines] == [
        True
    ]


@pytest.mark.slow
def test_an_error_in_the_first_of_two_processes_ends_both(data, tmp_path):
    """Only the first process decodes grids, so only it finds that their VAE is not there; the other must not wait."""
    flags = tiny.train_flags(data, tmp_path / "exps", sampling_steps=2, vae=tmp_path / "nowhere")
    done = programs.run_ranks(2, tiny.ROOT / "train.py", *flags)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [f"cannot load the VAE '{tmp_path}/nowhere'" in line for line in errors] == [True]
    assert not list(tmp_path.glob("exps/run/checkpoints/*"))
