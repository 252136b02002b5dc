"""The digits, their VAE, and the report on samples of them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from data_helpers import write_images
from PIL import Image
from sklearn.datasets import load_digits

from common.errors import InputError
from digits import judge, train_vae
from digits.data import load_digits_split, upsample, write_image_folder
from digits.report import class_grid, main
from evaluations import table
from models.codec import LatentCodec
from models.specs import LatentSpec

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_SHA256 = "f3c09072673c0ccb"  # of the held-out indices; another split would show the VAE its own training data


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


@pytest.fixture(scope="module")
def held_images(split):
    return upsample(split[1].images)


@pytest.fixture(scope="module")
def codec():
    return LatentCodec.load(ROOT / "assets" / "tiny-vae")


def run(*command):
    """A command of the repository, from its root."""
    return programs.run(*command)


def write_samples(folder, images, labels):
    """An npz and its manifest, as generate.py leaves them; returns the path of the npz."""
    np.savez(folder / "samples.npz", arr_0=images)
    (folder / "samples.json").write_text(json.dumps({"labels": [int(label) for label in labels]}))
    return folder / "samples.npz"


# Data


def test_split_is_fixed_disjoint_and_balanced(split):
    train, held_out = split
    assert len(train.labels) == 1397 and len(held_out.labels) == 400
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    assert np.bincount(held_out.labels).tolist() == [40] * 10
    assert hashlib.sha256(held_out.indices.astype("<i8").tobytes()).hexdigest().startswith(HELD_OUT_SHA256)


def test_grey_values_and_labels_are_those_of_the_data_set(split):
    source = load_digits()
    table = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255])
    for digits in split:
        np.testing.assert_array_equal(digits.images, table[source.images[digits.indices].astype(int)])
        np.testing.assert_array_equal(digits.labels, source.target[digits.indices])


def test_command_writes_the_training_digits_once(tmp_path, split):
    train, dest = split[0], tmp_path / "raw"
    first = run("-m", "digits.data", "--dest", dest)
    assert first.returncode == 0, first.stderr
    files = sorted(dest.rglob("*.png"))
    assert len(files) == 1397 and {path.parent.name for path in files} == set("0123456789")
    for row in (0, 700, 1396):
        picture = Image.open(dest / str(train.labels[row]) / f"{train.indices[row]:04d}.png")
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), train.images[row][..., None].repeat(3, axis=-1))
    times = [path.stat().st_mtime_ns for path in files]
    assert write_image_folder(train, dest) is False
    assert [path.stat().st_mtime_ns for path in files] == times
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_command_writes_the_held_out_digits_apart(tmp_path, split):
    result = run("-m", "digits.data", "--dest", tmp_path / "raw", "--held-out", tmp_path / "held")
    assert result.returncode == 0, result.stderr
    held, trained = ({path.stem for path in (tmp_path / name).rglob("*.png")} for name in ("held", "raw"))
    assert held == {f"{index:04d}" for index in split[1].indices} and not held & trained
    (tmp_path / "held/notes.txt").write_text("mine")
    result = run("-m", "digits.data", "--dest", tmp_path / "raw", "--held-out", tmp_path / "held")
    assert result.returncode == 2 and "--held-out" in result.stderr and "notes.txt" in result.stderr


def test_a_failed_write_leaves_nothing(tmp_path, split):
    few = split[0].take(np.arange(5))
    broken = dataclasses.replace(few, images=[*few.images[:4], np.zeros((8, 8), dtype=complex)])
    with pytest.raises(TypeError):
        write_image_folder(broken, tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("-m", "digits.data", "--dest", tmp_path)
    assert result.returncode == 2 and "notes.txt" in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_picture_is_not_taken_for_the_written_one(tmp_path, split):
    few = split[0].take(np.arange(5))
    write_image_folder(few, tmp_path / "raw")
    path = min((tmp_path / "raw").rglob("*.png"))
    for content in (path.read_bytes()[:40], b"\0" * 80, b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"--dest .*{path.name}.*name a new folder"):
            write_image_folder(few, tmp_path / "raw")


def test_a_file_as_dest_is_refused(tmp_path, split):
    (tmp_path / "raw").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_image_folder(split[0], tmp_path / "raw")


def test_upsample_gives_the_bytes_of_convert(tmp_path, split):
    few = split[0].take(np.arange(20))
    write_image_folder(few, tmp_path / "raw")
    flags = ["--resolution", "32x32", "--transform", "center-crop-dhariwal", "--workers", "1"]
    result = run(
        "-m",
        "preprocessing.dataset_tools",
        "convert",
        "--source",
        tmp_path / "raw",
        "--dest",
        tmp_path / "images",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    converted = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "images").rglob("*.png")}
    assert converted == {image.tobytes() for image in upsample(few.images)}


def test_pixels_undo_an_enlargement_by_repetition(split):
    images = split[0].images[:3]
    enlarged = np.kron(images, np.ones((1, 4, 4), np.uint8))[..., None].repeat(3, axis=-1)
    np.testing.assert_allclose(judge.pixels(enlarged), images.reshape(3, 64) / 255, rtol=1e-15)


# VAE


def encode(codec, images):
    return codec.encode(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def test_vae_is_small_and_has_the_shape_of_the_quickstart(codec):
    assert sum(path.stat().st_size for path in (ROOT / "assets" / "tiny-vae").iterdir()) <= 2e6
    assert (codec.spec.channels, codec.spec.factor, codec.spec.shift) == (4, 4, 0.0)
    assert codec.vae.dtype == torch.float32
    assert "/" not in (ROOT / "assets" / "tiny-vae" / "config.json").read_text()


def test_latents_of_the_training_digits_have_unit_std(codec, split):
    moments = encode(codec, upsample(split[0].images[:400]))
    noise = torch.randn(400, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = codec.spec.sample(moments, noise)
    assert latents.std().item() == pytest.approx(1, abs=0.03)
    spread = moments[:, 4:].mean().item() * codec.spec.scale  # of the posterior: neither zero nor all noise
    assert 0.01 < spread < 0.2


def test_reconstructed_held_out_digits_keep_their_class(codec, split, held_images):
    train, held_out = split
    mean, _std = encode(codec, held_images).chunk(2, dim=1)
    decoded = codec.decode((mean - codec.spec.shift) * codec.spec.scale).numpy()
    assert abs(decoded.astype(float) - held_images).mean() < 3  # of 255 grey levels
    classifier = judge.train_classifier(train)
    assert classifier.score(judge.pixels(held_images), held_out.labels) >= 0.975  # a good judge
    assert classifier.score(judge.pixels(decoded), held_out.labels) >= 0.975


def test_the_vae_of_photographs_is_small_and_keeps_colours():
    folder = ROOT / "assets/cifar10-vae"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    codec, about = LatentCodec.load(folder), json.loads((folder / "trained_on.json").read_text())
    assert codec.spec.channels == 8 and codec.spec.factor == 4
    assert about["psnr"]["images"] == 10_000 and about["psnr"]["drawn latent"] > 27
    ramp = np.linspace(0, 255, 32)
    images = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.full((32, 32), 80)], -1).astype(np.uint8)
    images = np.stack([images, images[..., ::-1], 255 - images])
    mean, _std = encode(codec, images).chunk(2, dim=1)
    decoded = codec.decode((mean - codec.spec.shift) * codec.spec.scale).numpy()
    assert np.corrcoef(decoded.ravel(), images.ravel())[0, 1] > 0.9


def test_a_vae_of_other_images_is_described(tmp_path):
    data, dest = tmp_path / "pictures", tmp_path / "vae"
    write_images(data, [f"{split}/a/{i}.png" for split in ("train", "test") for i in range(4)], side=32)
    train_vae.main(["--data", str(data), "--dest", str(dest), "--steps", "1", "--batch-size", "2"])
    assert LatentCodec.load(dest).spec.channels == 8
    about = json.loads((dest / "trained_on.json").read_text())
    assert about["colour"] and about["resolution"] == 32 and about["psnr"]["images"] == 4
    assert str(tmp_path) not in str(about)


def test_psnr_is_the_mean_over_images(monkeypatch):
    """Decoded images that are off by 1 in the first half and by 10 in the second."""

    class Codec:
        spec = LatentSpec(channels=1)

        def encode(self, images):
            self.images = images
            return torch.zeros(len(images), 2, 1, 1)

        def decode(self, _):
            by = torch.where(torch.arange(len(self.images)) < 2, 1, 10)[:, None, None, None]
            return (self.images + by).permute(0, 2, 3, 1)

    monkeypatch.setattr(train_vae.LatentCodec, "load", lambda _: Codec())
    found = train_vae.psnr("folder", torch.full((4, 3, 8, 8), 50, dtype=torch.uint8), seed=0)
    assert found == pytest.approx(dict.fromkeys(found, 20 * np.log10(255) - 10)) and len(found) == 2


@pytest.mark.slow
def test_training_script_makes_a_folder_that_loads_and_never_overwrites(tmp_path):
    command = ["-m", "digits.train_vae", "--dest", tmp_path / "vae", "--steps", "2", "--batch-size", "4"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert LatentCodec.load(tmp_path / "vae").spec.factor == 4
    again = run(*command)
    assert again.returncode == 2 and "exists" in again.stderr


# Report


def test_held_out_digits_as_samples_score_as_held_out_digits(split, held_images):
    report = judge.build_report(held_images, split[1].labels)
    assert report["agreement"]["samples"] == report["agreement"]["held_out_digits"]
    assert report["agreement"]["samples"]["agree"] >= 380 and report["agreement"]["samples"]["of"] == 400
    assert report["frechet"]["samples"] == report["frechet"]["held_out_digits"] > 0
    assert report["frechet"]["images_a_side"] == 400


def test_bad_samples_score_badly(split, held_images):
    wrong_labels = (split[1].labels + 1) % 10
    assert judge.build_report(held_images, wrong_labels)["agreement"]["samples"]["agree"] < 10
    blurred = (held_images // 2 + held_images.mean(axis=(1, 2), keepdims=True) / 2).astype(np.uint8)
    frechet = judge.build_report(blurred, split[1].labels)["frechet"]
    assert frechet["samples"] > 5 * frechet["held_out_digits"]
    one_class = held_images[split[1].labels == 3].repeat(10, axis=0)  # mode collapse
    frechet = judge.build_report(one_class, split[1].labels)["frechet"]
    assert frechet["samples"] > 5 * frechet["held_out_digits"]


def test_counts_are_equal_on_both_sides(split, held_images):
    few = np.arange(0, 400, 4)
    report = judge.build_report(held_images[few], split[1].labels[few])
    assert report["frechet"]["images_a_side"] == 100 and report["agreement"]["samples"]["of"] == 100
    many = np.concatenate([held_images, held_images])
    report = judge.build_report(many, np.concatenate([split[1].labels] * 2))
    assert report["frechet"]["images_a_side"] == 400 and report["agreement"]["samples"]["of"] == 800


def test_many_samples_are_compared_in_sets_of_400(split, held_images):
    labels = split[1].labels
    good, bad = held_images, held_images // 2
    one = [judge.build_report(images, labels)["frechet"]["samples"] for images in (good, bad)]
    both = judge.build_report(np.concatenate([good, bad]), np.concatenate([labels, labels]))["frechet"]["samples"]
    assert both == pytest.approx(sum(one) / 2)


def test_stratified_rows():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    rows = judge.stratified_rows(labels, 23)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 3]
    assert len(set(rows)) == 23 and rows.tolist() == sorted(rows)
    np.testing.assert_array_equal(rows, judge.stratified_rows(labels, 23))
    assert rows.tolist() != judge.stratified_rows(labels, 23, seed=1).tolist()
    assert judge.stratified_rows(labels, 83).tolist() == list(range(83))


def test_command_writes_report_grid_and_curve(tmp_path, split, held_images):
    samples = write_samples(tmp_path, held_images, split[1].labels)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": s, "loss": 1 / s, "loss_v1": 2 / s, "lr": 1}) + "\n" for s in (1, 2, 4)))
    out, grid, curve = (tmp_path / name for name in ("report.json", "grid.png", "curve.png"))
    result = run("-m", "digits.report", "--samples", samples, "--out", out, "--grid", grid, "--curve", log, curve)
    assert result.returncode == 0, result.stderr
    agree = json.loads(out.read_text())["agreement"]["samples"]["agree"]
    assert f"samples: {agree} of 400 carry their label" in result.stdout and "400 images a side" in result.stdout
    assert Image.open(grid).size == (13 + 658, 658)  # digits of rows; images of 64 pixels, 2 between
    assert len(np.unique(np.asarray(Image.open(curve).convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_the_table_of_results_takes_reports(tmp_path, split, held_images, capsys):
    samples = write_samples(tmp_path, held_images, split[1].labels)
    main(["--samples", str(samples), "--out", str(tmp_path / "report.json")])
    main(["--samples", f"map, 1={samples}", f"flow, 50.5={samples}", "--out", str(tmp_path / "several.json")])
    capsys.readouterr()
    table.main([str(tmp_path / name) for name in ("report.json", "several.json")])
    header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert {"label agreement", "Fréchet distance of digits"} < {cell.strip("| ") for cell in header}
    names = [row[0].strip("| ") for row in rows[:3]]
    assert names == ["report", "map, 1 of several", "flow, 50.5 of several"]
    assert len({tuple(row[1:]) for row in rows[:3]}) == 1


def test_reports_of_several_folders_have_a_row_each(tmp_path, split, held_images, capsys):
    """The same quickstart with other STEPS and another WORK."""
    for work, step in (("a", 4), ("b", 300)):
        (tmp_path / work).mkdir()
        samples = write_samples(tmp_path / work, held_images[:100], split[1].labels[:100])
        record = samples.with_suffix(".json")
        record.write_text(json.dumps({**json.loads(record.read_text()), "step": step}))
        main(["--samples", str(samples), "--out", str(tmp_path / work / "report.json")])
        main(["--samples", f"x={samples}", f"y={samples}", "--out", str(tmp_path / work / "several.json")])
    capsys.readouterr()
    table.main([str(tmp_path / work / name) for name in ("report.json", "several.json") for work in "ab"])
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()[2:8]]
    steps = {name: step for name, _, step in rows}
    expected = {f"{tmp_path}/{work}/report": step for work, step in (("a", "4 steps"), ("b", "300 steps"))}
    assert expected.items() < steps.items() and len(steps) == 6
    assert steps[f"x of {tmp_path}/b/several"] == "300 steps"


@pytest.mark.parametrize(
    "images, labels, culprit",
    [
        (None, None, "samples.npz"),
        (np.zeros((4, 32, 32, 3), np.uint8), None, "samples.json: labels is None"),
        (np.zeros((4, 32, 32, 3), np.uint8), {"seed": 0}, "samples.json: labels is None"),
        (np.zeros((4, 32, 32, 3), np.uint8), {"labels": [1, 2]}, "2 labels for 4 samples"),
        (np.zeros((4, 32, 32, 3), np.uint8), {"labels": [0, 1, 2, 10]}, "samples.json: label '10' names no digit"),
        (np.zeros((4, 32, 32, 3), np.uint8), {"labels": [0, 1, 2, None]}, "samples.json: labels: '3.int' is None"),
        (np.zeros((4, 16, 16, 3), np.uint8), {"labels": [0] * 4}, "samples.npz holds 4 images of 16x16"),
        (np.zeros((4, 32, 32, 3), np.float32), {"labels": [0] * 4}, "arr_0 is float32"),
    ],
)
def test_bad_samples_are_refused_by_name(tmp_path, images, labels, culprit):
    if images is not None:
        np.savez(tmp_path / "samples.npz", arr_0=images)
    if labels is not None:
        (tmp_path / "samples.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=culprit):
        main(["--samples", str(tmp_path / "samples.npz")])


def test_samples_of_another_manifest_are_refused(tmp_path, split, held_images):
    samples = write_samples(tmp_path, held_images, split[1].labels)
    manifest = json.loads(samples.with_suffix(".json").read_text())
    samples.with_suffix(".json").write_text(json.dumps({**manifest, "npz_sha256": "0" * 64}))
    with pytest.raises(
        InputError,
        match=r"samples.npz is not the file that .*samples.json describes; complete them",
    ):
        main(["--samples", str(samples)])


def test_truncated_npz_ends_in_one_line(tmp_path, split, held_images):
    samples = write_samples(tmp_path, held_images, split[1].labels)
    samples.write_bytes(samples.read_bytes()[:1000])
    result = run("-m", "digits.report", "--samples", samples, "--out", tmp_path / "report.json")
    assert result.returncode == 2 and "samples.npz" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "report.json").exists()


# Pictures


def test_class_grid_has_a_class_a_row():
    labels = np.array([2, 0, 0, 1, 2, 2])
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 4, 4, 3), np.uint8)
    grid = class_grid(images, labels, columns=2)
    assert grid[:6, 2, 2, 0].tolist() == [1, 2, 3, 255, 0, 4] and grid.shape == (20, 4, 4, 3)
