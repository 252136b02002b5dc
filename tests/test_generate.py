"""Sampling end to end: exactly N images, the same on any number of processes, resumable, with their manifest."""

import errno
import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import tiny
import torch
from PIL import Image

from common.errors import InputError, exit_on_input_error
from common.flags import parse_flags, shown
from generate import GenerateConfig
from models.codec import LatentCodec
from samplers import sample_labels, sample_noise
from sampling import sampler
from sampling.conditions import ClassLabels
from sampling.stores import PngFiles, pack


def pngs(folder):
    """{name: uint8 array} of a folder's images."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


# ---------------------------------------------------------------------------------------- what is written


def test_exactly_n_images_equal_to_the_npz(reference):
    folder, array, _ = reference
    images = pngs(folder)
    assert list(images) == [f"{i:06d}.png" for i in range(5)]
    assert (array.shape, array.dtype) == ((5, 16, 16, 3), np.uint8)
    assert np.array_equal(np.stack(list(images.values())), array)
    assert len(np.unique(array.reshape(5, -1), axis=0)) == 5
    assert folder.name == "tiny-0000003-sde-4-seed-0"
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


def test_noise_is_that_of_each_image_in_the_order_of_use():
    shape, batches = (4, 2, 2), [range(0, 3), range(3, 6), range(9, 10)]
    drawn = list(sampler.batch_noise(7, batches, 4, shape, torch.device("cpu")))
    expected = [sample_noise(7, indices, draw, shape) for indices in batches for draw in range(4)]
    assert len(drawn) == len(expected) and all(map(torch.equal, drawn, expected))


def test_the_next_noise_is_drawn_while_this_one_is_used(monkeypatch):
    begun = threading.Event()

    def draw(seed, indices, number, shape):
        if number == 1:
            begun.set()
        return sample_noise(seed, indices, number, shape)

    monkeypatch.setattr(sampler, "sample_noise", draw)
    drawn = sampler.batch_noise(7, [range(2)], 3, (4, 2, 2), torch.device("cpu"))
    next(drawn)
    assert begun.wait(60)
    drawn.close()


@pytest.mark.parametrize("batch", [1, 3, 5, 32])
def test_pixels_at_another_batch_size_differ_by_rounding_at_most(reference, ckpt, tmp_path, batch):
    _, array, manifest = tiny.run_generate(ckpt, tmp_path, per_proc_batch_size=batch)
    assert manifest["labels"] == reference[2]["labels"]
    difference = np.abs(array.astype(int) - reference[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_copy_ends_on_the_stream_of_the_tensors_device(monkeypatch):
    place, recorded = torch.device("cuda", 1), []
    tensor = SimpleNamespace(is_cuda=True, device=place, to=lambda *_, **__: "copy")
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(record=lambda *on: recorded.append(on)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    _, copies = sampler.start_copy(tensor, tensor)
    assert copies == ["copy", "copy"] and recorded == [(place,)]


def test_more_images_begin_with_the_same_ones(reference, ckpt, tmp_path):
    _, array, _ = tiny.run_generate(ckpt, tmp_path, num_fid_samples=6)
    assert np.array_equal(array[:4], reference[1][:4])  # whole batches of two
    assert np.abs(array[4].astype(int) - reference[1][4]).max() <= 1


def test_two_processes_make_the_same_pixels(reference, ckpt, tmp_path):
    done = programs.run_ranks(2, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path))
    assert done.returncode == 0, done.stderr
    folder, array, manifest = tiny.results(tmp_path)
    assert np.array_equal(array, reference[1])
    assert manifest == reference[2]
    assert len(pngs(folder)) == 5
    assert "5 of 5" in done.stderr and "4 model evaluations each (20 in all)" in done.stdout


@pytest.mark.slow
def test_seventy_images_at_other_batch_sizes_on_one_and_two_processes(ckpt, tmp_path):
    """Identical files for one batch size; labels the same and pixels within rounding for another."""
    size = {"num_fid_samples": 70, "per_proc_batch_size": 64}
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path / "one", **size)
    done = programs.run_ranks(2, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path / "two", **size))
    assert done.returncode == 0, done.stderr
    assert tiny.file_bytes(tiny.results(tmp_path / "two")[0]) == tiny.file_bytes(folder)
    _, other, other_manifest = tiny.run_generate(ckpt, tmp_path / "b", num_fid_samples=70, per_proc_batch_size=10)
    assert other_manifest["labels"] == manifest["labels"]
    assert np.abs(array.astype(int) - other).max() <= 1


@pytest.mark.slow
def test_four_processes_for_three_batches_make_the_same_pixels(reference, ckpt, tmp_path):
    """One of them has nothing to do."""
    done = programs.run_ranks(4, tiny.ROOT / "generate.py", *tiny.generate_flags(ckpt, tmp_path))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(tiny.results(tmp_path)[1], reference[1])


@pytest.mark.parametrize("changes", [{"cfg_scale": 2.0}, {"mode": "ode", "heun": True}, {"decode": False}])
def test_a_device_is_not_waited_for_before_its_images_are_due(ckpt, monkeypatch, changes):
    """Tensors on "meta" have no values, so reading one fails."""
    copied = []
    monkeypatch.setattr(sampler, "start_copy", lambda *tensors: (copied.append(tensors[0].shape), tensors))
    config = parse_flags(GenerateConfig, tiny.generate_flags(ckpt, "nowhere", **changes)).resolve()
    device = sampler.ImageSampler(config, ClassLabels, torch.device("meta"))
    assert [indices for indices, _ in device.batches(config.batches())] == config.batches()
    shape = (16, 16, 3) if config.decode else (4, 8, 8)
    assert copied == [(2, *shape), (2, *shape), (1, *shape)]


# ----------------------------------------------------------------------------------------------- resuming


def test_deleted_images_are_made_again_and_only_those(ckpt, tmp_path, monkeypatch):
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path)
    kept = {path: os.stat(path).st_mtime_ns for path in folder.glob("*.png") if path.name[5] not in "23"}
    for index in (2, 3):
        (folder / f"{index:06d}.png").unlink()
    rows = tiny.count_calls(monkeypatch)
    _, again, same = tiny.run_generate(ckpt, tmp_path)
    assert rows == [2] * 4
    assert {path: os.stat(path).st_mtime_ns for path in kept} == kept
    assert np.array_equal(again, array)
    assert same == manifest


def test_nothing_is_sampled_twice(ckpt, tmp_path, monkeypatch):
    _, array, _ = tiny.run_generate(ckpt, tmp_path)
    rows = tiny.count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path)[1], array)
    assert rows == []


@pytest.mark.parametrize(
    "output", [{"format": "both"}, {"format": "png"}, {"format": "npz"}, {"decode": False}], ids=str
)
def test_fewer_images_than_there_are_cost_none_of_them(ckpt, tmp_path, output):
    tiny.run_generate_only(ckpt, tmp_path / "samples", **output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"has more images than --num-fid-samples 3; .*another --sample-dir"):
        tiny.run_generate_only(ckpt, tmp_path / "samples", num_fid_samples=3, **output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("changes", [{"labels": "balanced"}, {"dtype": "bf16"}, {"vae_dtype": "bf16"}])
def test_images_of_other_settings_have_their_own_folder(ckpt, tmp_path, changes):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path)
    tiny.run_generate_only(ckpt, tmp_path, **changes)
    (other,) = {*tmp_path.glob("*.npz")} - {folder.with_suffix(".npz")}
    assert np.array_equal(np.load(folder.with_suffix(".npz"))["arr_0"], array)
    shutil.rmtree(other.with_suffix(""))
    folder.rename(other.with_suffix(""))
    (name,) = changes
    with pytest.raises(InputError, match=f"holds images made with other settings: {shown(name)} was "):
        tiny.run_generate_only(ckpt, tmp_path, **changes)


def test_images_of_another_checkpoint_of_the_same_name_are_not_mixed(vae, tmp_path):
    path = tiny.checkpoint(tmp_path / "c.pt", vae)
    tiny.run_generate(path, tmp_path / "samples")
    tiny.checkpoint(path, vae, std=0.06)
    with pytest.raises(InputError, match="holds images made with other settings"):
        tiny.run_generate(path, tmp_path / "samples")


def test_a_copied_checkpoint_goes_on_and_other_weights_of_the_same_name_do_not(ckpt, tmp_path, monkeypatch):
    """Neither place and date of the file nor flags that only repeat what it says decide an image."""
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "samples")
    copy = tmp_path / ckpt.name
    shutil.copyfile(ckpt, copy)
    rows = tiny.count_calls(monkeypatch)
    same = {"model": "DeepFlow-Ti/2", "df_idxs": "[2]", "num_classes": 3, "resolution": 16, "qk_norm": False}
    _, again, manifest = tiny.run_generate(copy, tmp_path / "samples", **same)
    assert rows == [] and np.array_equal(again, array) and manifest["ckpt"] == str(copy)
    content = tiny.load(ckpt)
    content["ema"]["final_layer.1.linear.bias"][0] += 1e-6
    torch.save(content, copy)
    with pytest.raises(InputError, match="other settings: SHA-256 of the weights in --ckpt was "):
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
    assert tiny.file_bytes(folder) == tiny.file_bytes(reference[0])
    assert np.array_equal(again, array)


class Stop(BaseException):
    """What a test raises in the middle of things."""


@pytest.mark.parametrize("format", ["both", "npz"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_sampling_goes_on_where_it_stopped(reference, ckpt, tmp_path, monkeypatch, format, after):
    decode = LatentCodec.start_decoding

    def stop(self, latents, chunk):
        decoded.append(len(latents))
        if len(decoded) > after:
            raise Stop
        return decode(self, latents, chunk)

    decoded = []
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LatentCodec, "start_decoding", stop)
        tiny.run_generate(ckpt, tmp_path, format=format)
    assert not list(tmp_path.glob("*.npz"))
    rows = tiny.count_calls(monkeypatch)
    folder, array, manifest = tiny.run_generate(ckpt, tmp_path, format=format)
    assert sum(rows) == 4 * (5 - 2 * after)  # four steps of what was missing
    assert np.array_equal(array, reference[1])
    assert manifest == {**reference[2], "format": format}
    assert tiny.file_bytes(folder) == (tiny.file_bytes(reference[0]) if format == "both" else {})


@pytest.mark.parametrize("format", ["both", "npz"])
def test_interrupted_packing_goes_on_without_sampling(reference, ckpt, tmp_path, monkeypatch, format):
    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(np.lib.format, "write_array_header_1_0", stop)
        tiny.run_generate(ckpt, tmp_path, format=format)
    assert not list(tmp_path.glob("*.npz"))
    rows = tiny.count_calls(monkeypatch)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, format=format)[1], reference[1])
    assert rows == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["both", "npz"])
def test_killed_runs_of_two_processes_end_with_the_same_files(ckpt, tmp_path, format):
    """SIGKILL as soon as a first file is there, and again while it packs; the third run is left alone."""
    size = {"num_fid_samples": 300, "per_proc_batch_size": 10, "num_steps": 1, "format": format}
    line = tiny.generate_flags(ckpt, tmp_path / "a", **size)
    for pattern in ("*/rows-*.npy" if format == "npz" else "*/*.png", ".*.npz.*.tmp", None):
        pair, _store = programs.start_ranks(2, tiny.ROOT / "generate.py", *line)
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
    assert tiny.file_bytes(folder) == tiny.file_bytes(expected)
    assert not list((tmp_path / "a").rglob("*.tmp"))


def test_no_resume_refuses_a_folder_with_images(ckpt, tmp_path):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, resume=False)
    with pytest.raises(InputError, match=f"{folder} holds finished images; resume with --resume"):
        tiny.run_generate(ckpt, tmp_path, resume=False)
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, resume=True)[1], array)


def test_an_image_that_was_truncated_is_made_again_before_packing(reference, ckpt, tmp_path):
    folder, array, _ = tiny.run_generate(ckpt, tmp_path)
    path = folder / "000001.png"
    path.write_bytes(path.read_bytes()[:-20])
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path)[1], array)
    assert tiny.file_bytes(folder) == tiny.file_bytes(reference[0])


def test_a_full_disk_ends_in_one_line(ckpt, tmp_path, monkeypatch, capsys):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PngFiles, "write", write)
    with pytest.raises(SystemExit), exit_on_input_error():
        tiny.run_generate(ckpt, tmp_path)
    assert f"error: {tmp_path}: No space left on device; free space" in capsys.readouterr().err


@pytest.mark.slow
def test_many_images_need_little_memory(vae, tmp_path):
    """The whole way with a toy model: exactly N images, and 12,000 more take under 240 MB, thus 50,000 under 1 GB."""
    ckpt = tiny.checkpoint(tmp_path / "toy.pt", vae, name="SiT-Ti/2", depth=1, input_size=2)
    code = (
        "import sys, resource, generate; from common.flags import parse_flags\n"
        "for count in ('500', '12500'):\n"
        "    flags = [*sys.argv[1:], '--num-fid-samples', count]\n"
        "    generate.generate(parse_flags(generate.GenerateConfig, flags).resolve())\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    line = tiny.flags(ckpt=ckpt, sample_dir=tmp_path / "s", per_proc_batch_size=500, num_steps=1, decode_batch_size=500)
    done = tiny.run_python("-c", code, *line)
    assert done.returncode == 0, done.stderr
    few, many = (int(text.split()[1]) for text in done.stdout.splitlines() if text.startswith("peak"))
    assert many - few < 240 << 10, (few, many)  # kB
    folder, array, manifest = tiny.results(tmp_path / "s")
    assert array.shape == (12_500, 4, 4, 3) and len(manifest["labels"]) == len(list(folder.glob("*.png"))) == 12_500


def test_a_missing_image_is_not_left_out_of_the_npz(reference, tmp_path):
    folder, _, _ = reference
    with pytest.raises(InputError, match=rf"{folder} lacks image 5; run the same again"):
        pack(PngFiles(folder), tmp_path / "a.npz", 6)
    assert not list(tmp_path.iterdir())


def test_settings_file_lies_beside_the_images(reference):
    settings = json.loads((reference[0] / "settings.json").read_text())
    assert settings["num_steps"] == 4
    assert "per_proc_batch_size" not in settings  # it changes nothing in an image
