"""Sampling end to end: exactly N images, the same on any number of processes, resumable, with their manifest."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image

from common.errors import InputError
from generate import BatchNoise
from models import model_config
from models.codec import LatentCodec
from models.deepflow import DeepFlow
from samplers import sample_labels, sample_noise
from sampling.stores import PngFiles, pack


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny.vae_folder(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module")
def ckpt(vae, tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "0000003.pt", vae)


@pytest.fixture(scope="module")
def reference(ckpt, tmp_path_factory):
    """(folder, arr_0, manifest) of five images in batches of two."""
    return tiny.run_generate(ckpt, tmp_path_factory.mktemp("samples"))


def pngs(folder):
    """{name: uint8 array} of a folder's images."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def count_calls(monkeypatch):
    """List that fills with the number of rows of every DeepFlow.velocity call."""
    rows, velocity = [], DeepFlow.velocity

    def counted(self, x, t, y):
        rows.append(len(x))
        return velocity(self, x, t, y)

    monkeypatch.setattr(DeepFlow, "velocity", counted)
    return rows


# ---------------------------------------------------------------------------------------- what is written


def test_exactly_n_images_equal_to_the_npz(reference):
    folder, array, _ = reference
    images = pngs(folder)
    assert list(images) == [f"{i:06d}.png" for i in range(5)]
    assert (array.shape, array.dtype) == ((5, 16, 16, 3), np.uint8)
    assert np.array_equal(np.stack(list(images.values())), array)
    assert len(np.unique(array.reshape(5, -1), axis=0)) == 5
    assert folder.name == "DeepFlow-Ti-2-0000003-size-16-vae-tiny-vae-cfg-1.0-seed-0-sde"
    assert {path.name for path in folder.parent.iterdir()} == {folder.name + end for end in ("", ".npz", ".json")}
    assert {path.suffix for path in folder.iterdir()} == {".png", ".json"}


def test_manifest_says_what_the_images_are_made_of(reference, ckpt, vae):
    _, _, manifest = reference
    expected = {"model": "DeepFlow-Ti/2", "step": 3, "weights": "ema", "mode": "sde", "num_steps": 4, "cfg_scale": 1.0}
    expected.update(global_seed=0, vae=str(vae), ckpt=str(ckpt), num_fid_samples=5, label_mode="random", run="tiny")
    expected.update(path_type="linear", guidance_low=0.0, guidance_high=1.0, heun=False, forward_passes=4)
    assert expected.items() <= manifest.items()
    assert manifest["labels"] == sample_labels(0, range(5), tiny.CLASSES).tolist()
    assert manifest["versions"]["torch"] == torch.__version__


def test_balanced_labels(ckpt, tmp_path):
    _, _, manifest = tiny.run_generate(ckpt, tmp_path, labels="balanced")
    assert manifest["labels"] == [0, 1, 2, 0, 1]


def test_ema_and_raw_weights_differ(reference, ckpt, tmp_path):
    _, array, manifest = tiny.run_generate(ckpt, tmp_path, weights="raw")
    assert manifest["weights"] == "raw"
    assert not np.array_equal(array, reference[1])


def test_seed_changes_every_image(reference, ckpt, tmp_path):
    _, array, _ = tiny.run_generate(ckpt, tmp_path, global_seed=1)
    assert (array != reference[1]).any(axis=(1, 2, 3)).all()


# -------------------------------------------------------- independence of processes and batch size


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    shape, indices = (4, 8, 8), range(7)
    for draw in (0, 1, 4):
        together = sample_noise(3, indices, draw, shape)
        for size in (1, 2, 3):
            batches = [list(indices)[start : start + size] for start in range(0, 7, size)]
            assert torch.equal(torch.cat([sample_noise(3, batch, draw, shape) for batch in batches]), together)
    labels = torch.cat([sample_labels(3, [index], 1000) for index in indices])
    assert torch.equal(labels, sample_labels(3, indices, 1000))
    rank_1_of_2 = sample_noise(3, [2, 3, 6], 2, shape)
    assert torch.equal(rank_1_of_2, sample_noise(3, indices, 2, shape)[[2, 3, 6]])


def test_noise_is_drawn_ahead_and_is_that_of_each_image():
    shape, batches = (4, 2, 2), [range(0, 3), range(3, 6), range(9, 10)]
    noise = BatchNoise(7, batches, 4, shape, torch.device("cpu"))
    for number, indices in enumerate(batches):
        for draw in range(4):
            assert torch.equal(noise.of(number)(draw), sample_noise(7, indices, draw, shape))
            (ahead,) = noise.ahead.ahead.items()
            assert ahead[0] == 4 * number + draw + 1
            assert (ahead[1].result() is None) == (ahead[0] == 12)  # nothing after the last
    noise.close()


@pytest.mark.parametrize("batch", [1, 3, 5, 32])
def test_pixels_at_another_batch_size_differ_by_rounding_at_most(reference, ckpt, tmp_path, batch):
    _, array, manifest = tiny.run_generate(ckpt, tmp_path, per_proc_batch_size=batch)
    assert manifest["labels"] == reference[2]["labels"]
    difference = np.abs(array.astype(int) - reference[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_more_images_begin_with_the_same_ones(reference, ckpt, tmp_path):
    _, array, _ = tiny.run_generate(ckpt, tmp_path, num_fid_samples=6)
    assert np.array_equal(array[:4], reference[1][:4])  # whole batches of two
    assert np.abs(array[4].astype(int) - reference[1][4]).max() <= 1


def test_two_processes_make_the_same_pixels(reference, ckpt, tmp_path):
    done = tiny.run_torchrun(2, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path))
    assert done.returncode == 0, done.stderr
    folder, array, manifest = tiny.results(tmp_path)
    assert np.array_equal(array, reference[1])
    assert manifest == reference[2]
    assert len(pngs(folder)) == 5
    assert "5/5" in done.stderr and "4 model evaluations each (20 in all)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("batch", [7, 64])
def test_seventy_images_at_other_batch_sizes_on_one_and_two_processes(ckpt, tmp_path, batch):
    """Identical files for one batch size; labels the same and pixels within rounding for another."""
    size = {"num_fid_samples": 70, "per_proc_batch_size": batch}
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path / "one", **size)
    done = tiny.run_torchrun(2, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path / "two", **size))
    assert done.returncode == 0, done.stderr
    assert file_bytes(tiny.results(tmp_path / "two")[0]) == file_bytes(folder)
    _, other, other_manifest = tiny.run_generate(ckpt, tmp_path / "b", num_fid_samples=70, per_proc_batch_size=10)
    assert other_manifest["labels"] == manifest["labels"]
    assert np.abs(array.astype(int) - other).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_any_number_of_processes_makes_the_same_pixels(reference, ckpt, tmp_path, processes):
    """Four processes for three batches: one of them has nothing to do."""
    done = tiny.run_torchrun(processes, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(tiny.results(tmp_path)[1], reference[1])


# ----------------------------------------------------------------------------------------------- resuming


def test_deleted_images_are_made_again_and_only_those(ckpt, tmp_path, monkeypatch):
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path)
    kept = {path: os.stat(path).st_mtime_ns for path in folder.glob("*.png") if path.name[5] not in "23"}
    for index in (2, 3):
        (folder / f"{index:06d}.png").unlink()
    rows = count_calls(monkeypatch)
    _, again, same = tiny.run_generate(ckpt, tmp_path)
    assert rows == [2] * 4
    assert {path: os.stat(path).st_mtime_ns for path in kept} == kept
    assert np.array_equal(again, array)
    assert same == manifest


def test_nothing_is_sampled_twice(ckpt, tmp_path, monkeypatch):
    _, array, _ = tiny.run_generate(ckpt, tmp_path)
    rows = count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path)[1], array)
    assert rows == []


def test_fewer_images_than_there_are_give_an_npz_of_as_many(ckpt, tmp_path):
    _, array, _ = tiny.run_generate(ckpt, tmp_path)
    _, fewer, manifest = tiny.run_generate(ckpt, tmp_path, num_fid_samples=3)
    assert np.array_equal(fewer, array[:3])
    assert len(manifest["labels"]) == 3


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [({"num_steps": 5}, "num_steps"), ({"weights": "raw"}, "weights"), ({"labels": "balanced"}, "labels")],
)
def test_images_of_other_settings_are_not_mixed(ckpt, tmp_path, changes, culprit):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path)
    with pytest.raises(InputError, match=f"{folder} holds images made with another {culprit} "):
        tiny.run_generate(ckpt, tmp_path, **changes)
    assert np.array_equal(tiny.results(tmp_path)[1], array)


def test_images_of_another_checkpoint_of_the_same_name_are_not_mixed(vae, tmp_path):
    path = tiny.checkpoint(tmp_path / "c.pt", vae)
    tiny.run_generate(path, tmp_path / "samples")
    tiny.checkpoint(path, vae, steps=4)
    with pytest.raises(InputError, match="holds images made with another"):
        tiny.run_generate(path, tmp_path / "samples")


def test_a_copied_checkpoint_goes_on_and_other_weights_of_the_same_name_do_not(ckpt, tmp_path, monkeypatch):
    """Neither place and date of the file nor flags that only repeat what it says decide an image."""
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "samples")
    copy = tmp_path / ckpt.name
    shutil.copyfile(ckpt, copy)
    rows = count_calls(monkeypatch)
    same = {"model": "DeepFlow-Ti/2", "df_idxs": "[2]", "num_classes": 3, "resolution": 16, "qk_norm": False}
    _, again, manifest = tiny.run_generate(copy, tmp_path / "samples", **same)
    assert rows == [] and np.array_equal(again, array) and manifest["ckpt"] == str(copy)
    content = tiny.load(ckpt)
    content["ema"]["final_layer.1.linear.bias"][0] += 1e-6
    torch.save(content, copy)
    with pytest.raises(InputError, match="holds images made with another weights_sha256 "):
        tiny.run_generate(copy, tmp_path / "samples")


def test_images_of_unknown_settings_are_not_taken_over(reference, ckpt, tmp_path):
    folder = tmp_path / reference[0].name
    folder.mkdir()
    (folder / "000000.png").write_bytes((reference[0] / "000000.png").read_bytes())
    with pytest.raises(InputError, match=rf"{folder} holds images of unknown settings"):
        tiny.run_generate(ckpt, tmp_path)


def test_a_half_finished_batch_is_completed_with_the_same_files(reference, ckpt, tmp_path):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path)
    kept = os.stat(folder / "000002.png").st_mtime_ns
    (folder / "000003.png").unlink()
    _, again, _ = tiny.run_generate(ckpt, tmp_path)
    assert os.stat(folder / "000002.png").st_mtime_ns == kept
    assert file_bytes(folder) == file_bytes(reference[0])
    assert np.array_equal(again, array)


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


class Stop(BaseException):
    """What a test raises in the middle of things."""


@pytest.mark.parametrize("format", ["both", "npz"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_sampling_goes_on_where_it_stopped(reference, ckpt, tmp_path, monkeypatch, format, after):
    decode = LatentCodec.decode

    def stop(self, latents, chunk):
        decoded.append(len(latents))
        if len(decoded) > after:
            raise Stop
        return decode(self, latents, chunk)

    decoded = []
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LatentCodec, "decode", stop)
        tiny.run_generate(ckpt, tmp_path, format=format)
    assert not list(tmp_path.glob("*.npz"))
    rows = count_calls(monkeypatch)
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path, format=format)
    assert sum(rows) == 4 * (5 - 2 * after)  # four steps of what was missing
    assert np.array_equal(array, reference[1])
    assert manifest == {**reference[2], "format": format}
    assert file_bytes(folder) == (file_bytes(reference[0]) if format == "both" else {})


@pytest.mark.parametrize("format", ["both", "npz"])
def test_interrupted_packing_goes_on_without_sampling(reference, ckpt, tmp_path, monkeypatch, format):
    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(np.lib.format, "write_array_header_1_0", stop)
        tiny.run_generate(ckpt, tmp_path, format=format)
    assert not list(tmp_path.glob("*.npz"))
    rows = count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format=format)[1], reference[1])
    assert rows == []


def start_two_processes(line):
    """Two processes of generate.py as another launcher than torchrun starts them, so that both can be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, tiny.ROOT / "generate.py", *line]
    return [subprocess.Popen(command, env={**shared, "RANK": rank}, cwd=tiny.ROOT) for rank in "01"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["both", "npz"])
def test_killed_runs_of_two_processes_end_with_the_same_files(ckpt, tmp_path, format):
    """SIGKILL as soon as a first file is there, and again while it packs; the third run is left alone."""
    size = {"num_fid_samples": 300, "per_proc_batch_size": 4, "format": format}
    line = tiny.generate_flags(ckpt, tmp_path / "a", **size)
    for pattern in ("*/rows-*.npy" if format == "npz" else "*/*.png", ".*.npz.*.tmp", None):
        pair = start_two_processes(line)
        try:
            while any(p.poll() is None for p in pair) and not (pattern and any((tmp_path / "a").glob(pattern))):
                time.sleep(0.001)
        finally:
            for process in pair:
                process.kill()
            codes = [process.wait() for process in pair]
        assert pattern or codes == [0, 0]
    folder, array, _ = tiny.results(tmp_path / "a")
    expected, undisturbed, _ = tiny.run_generate(ckpt, tmp_path / "b", **size)
    assert np.array_equal(array, undisturbed)
    assert file_bytes(folder) == file_bytes(expected)
    assert not list((tmp_path / "a").rglob("*.tmp"))


def test_no_resume_refuses_a_folder_with_images(ckpt, tmp_path):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, resume=False)
    with pytest.raises(InputError, match=f"{folder} holds finished images; go on with --resume"):
        tiny.run_generate(ckpt, tmp_path, resume=False)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, resume=True)[1], array)


def test_an_image_that_was_truncated_is_made_again_before_packing(reference, ckpt, tmp_path):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path)
    path = folder / "000001.png"
    path.write_bytes(path.read_bytes()[:-20])
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path)[1], array)
    assert file_bytes(folder) == file_bytes(reference[0])


@pytest.mark.slow
def test_fifty_thousand_images_need_little_memory(vae, tmp_path):
    """The whole way with a toy model: exactly N images, peak memory under 1 GB above that of 64 images."""
    ckpt = tiny.checkpoint(tmp_path / "toy.pt", vae, name="SiT-Ti/2", depth=1, input_size=2)
    code = (
        "import sys, resource, generate; from training.config import parse_flags\n"
        "for count in ('64', '50000'):\n"
        "    flags = [*sys.argv[1:], '--num-fid-samples', count]\n"
        "    generate.generate(parse_flags(generate.GenerateConfig, flags))\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    line = tiny.flags(ckpt=ckpt, sample_dir=tmp_path / "s", per_proc_batch_size=500, num_steps=2, decode_batch_size=500)
    done = tiny.run_python("-c", code, *line)
    assert done.returncode == 0, done.stderr
    few, many = (int(text.split()[1]) for text in done.stdout.splitlines() if text.startswith("peak"))
    assert many - few < 1 << 20  # kB
    folder, array, manifest = tiny.results(tmp_path / "s")
    assert array.shape == (50_000, 4, 4, 3) and len(manifest["labels"]) == len(list(folder.glob("*.png"))) == 50_000


# ----------------------------------------------------------------------------------- formats, labels, pictures


def test_png_alone_writes_no_npz(reference, ckpt, tmp_path):
    tiny.run_generate_only(ckpt, tmp_path, format="png")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert file_bytes(folder) == file_bytes(reference[0])
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, folder.name + ".json"}


def test_npz_alone_leaves_no_images_and_is_not_made_twice(reference, ckpt, tmp_path, monkeypatch):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, format="npz")
    assert np.array_equal(array, reference[1])
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    rows = count_calls(monkeypatch)
    npz = folder.with_name(folder.name + ".npz")
    os.utime(npz, (0, 0))
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format="npz")[1], array)
    assert rows == []
    assert npz.stat().st_mtime > 0  # the newest, which script/measure.sh takes
    assert tiny.run_generate(ckpt, tmp_path, format="npz", num_fid_samples=3)[1].shape[0] == 3


def test_an_npz_of_other_settings_is_not_taken_over_where_its_folder_was_deleted(ckpt, tmp_path):
    """The error that refuses other settings says: delete the folder."""
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, format="npz")
    shutil.rmtree(folder)
    _, other, manifest = tiny.run_generate(ckpt, tmp_path, format="npz", num_steps=3)
    assert manifest["num_steps"] == 3 and not np.array_equal(other, array)


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


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images(reference, ckpt, tmp_path):
    _, array, _ = tiny.run_generate(ckpt, tmp_path, compile=True)
    assert np.abs(array.astype(int) - reference[1]).max() <= 1


def test_labels_are_taken_in_turn_from_a_list_or_a_file(ckpt, tmp_path):
    (tmp_path / "labels.txt").write_text("2\n0\n0\n1\n2\n")
    for text, expected in (("2,0", [2, 0, 2, 0, 2]), (tmp_path / "labels.txt", [2, 0, 0, 1, 2])):
        _, _, manifest = tiny.run_generate(ckpt, tmp_path / f"{len(expected)}{expected[2]}", labels=text)
        assert manifest["labels"] == expected
    (tmp_path / "labels.txt").write_text("2\n1\n")
    with pytest.raises(InputError, match="made with another labels_sha256"):
        tiny.run_generate(ckpt, tmp_path / "50", labels=tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [("0,3", "'3' is no class of 0 ... 2"), ("nowhere.txt", "nor a readable text file"), ("", "nor a readable")],
)
def test_labels_that_are_none_are_refused(ckpt, tmp_path, labels, message):
    with pytest.raises(InputError, match=f"--labels {labels}.*{message}"):
        tiny.run_generate(ckpt, tmp_path, labels=labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1 x", "-1"])
def test_label_files_that_hold_something_else_are_refused(ckpt, tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=r"labels\.txt: .* is no class of 0 ... 2"):
        tiny.run_generate(ckpt, tmp_path / "s", labels=tmp_path / "labels.txt")


def test_a_picture_of_chosen_classes(ckpt, tmp_path):
    out = tmp_path / "pictures/a.png"
    tiny.run_generate_only(ckpt, tmp_path / "none", grid="2x3", classes="2,0", seed=5, out=out)
    manifest = json.loads(out.with_suffix(".json").read_text())
    assert (manifest["labels"], manifest["global_seed"]) == ([2, 2, 2, 0, 0, 0], 5)
    assert not (tmp_path / "none").exists()
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "many", labels="2,2,2,0,0,0", num_fid_samples=6, global_seed=5)
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture[16:, 32:], array[5]) and picture.shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"grid": "8"}, "--grid '8' is not of the form 8x8"),
        ({"grid": "0x8"}, "--grid '0x8'"),
        ({"grid": "1x2", "classes": "0,1,2"}, "--classes names 3 classes for 2 images"),
        ({"grid": "1x2", "classes": "0,x"}, "--labels 0,x"),
        ({"grid": "1x2", "out": "a.json"}, "--out a.json must end in .png"),
        ({"classes": "0"}, "--classes and --out belong to --grid"),
        ({"out": "a.png"}, "--classes and --out belong to --grid"),
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
    rows = count_calls(monkeypatch)
    _, _, manifest = tiny.run_generate(ckpt, tmp_path, num_fid_samples=2, **changes)
    assert len(rows) == calls == manifest["forward_passes"]
    assert rows.count(4) == guided == manifest["guided_passes"]
    assert rows.count(2) == calls - guided
    assert manifest["model_evaluations"] == calls + guided


def test_default_steps(ckpt):
    from generate import GenerateConfig

    for mode, steps in (("sde", 250), ("ode", 50)):
        config = GenerateConfig(ckpt=str(ckpt), mode=mode)
        config.check()
        assert config.num_steps == steps


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
    assert folder.name.startswith("DeepFlow-Ti-2-released-size-")
    flags["df_idxs"] = "[2]"  # the same parameters with the branches ending elsewhere
    assert not np.array_equal(tiny.run_generate(path, tmp_path / "other", **flags)[1], array)


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
    done = tiny.run_python(tiny.ROOT / "generate.py", *tiny.generate_flags(nan_ckpt, tmp_path / "samples"))
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
    ("changes", "culprit"), [({}, "--sample-dir: FILE.* cannot be written"), ({"grid": "1x1"}, "--out FILE/grid.png")]
)
def test_a_place_that_cannot_be_written_is_named_before_sampling(ckpt, tmp_path, monkeypatch, changes, culprit):
    file = tmp_path / "file"
    file.touch()
    rows = count_calls(monkeypatch)
    out = {"out": file / "grid.png"} if changes else {}
    with pytest.raises(InputError, match=culprit.replace("FILE", str(file))):
        tiny.run_generate_only(ckpt, file, **changes, **out)
    assert rows == []


def test_a_missing_image_is_not_left_out_of_the_npz(reference, tmp_path):
    folder, _, _ = reference
    with pytest.raises(InputError, match=rf"{folder}: 1 of 6 images are missing, the first is 5"):
        pack(PngFiles(folder), tmp_path / "a.npz", 6)
    assert not list(tmp_path.iterdir())


def test_settings_file_lies_beside_the_images(reference):
    settings = json.loads((reference[0] / "settings.json").read_text())
    assert settings["num_steps"] == 4
    assert "per_proc_batch_size" not in settings  # it changes nothing in an image
