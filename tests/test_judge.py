"""The judge of CIFAR-10's classes: its training, its file, and the report on samples."""

import json
import zipfile

import numpy as np
import pytest
import torch
from data_helpers import write_images
from evaluation_helpers import pictures, save_npz
from safetensors.torch import save_file

from common.errors import InputError
from common.flags import ROOT
from dataset import open_dataset
from evaluations import table
from evaluations.metrics.images import read_split
from evaluations.metrics.results import Result
from preprocessing import options
from preprocessing.convert import convert
from preprocessing.encode import encode
from studies import features, judge, report, train_judge

NAMES = [f"{split}/class{c}/{i}.png" for split in ("train", "test") for c in range(10) for i in range(4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with train and test: ten classes of four images; in order, image i of 80 has pixels i and 100 + i."""
    return write_folder(tmp_path_factory.mktemp("data"), NAMES)


def write_folder(folder, names):
    write_images(folder, names, side=32)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A judge of one epoch on them."""
    dest = tmp_path_factory.mktemp("judge") / "judge"
    train_judge.main(["--data", str(data), "--dest", str(dest), "--epochs", "1", "--batch-size", "20"])
    return dest


@pytest.fixture
def samples(tmp_path):
    """Twenty smooth pictures with two of each class."""
    return save_npz(tmp_path / "samples.npz", pictures(20, 0, 32), {"labels": [i % 10 for i in range(20)], "step": 7})


def test_a_split_of_a_folder_and_of_a_zip(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in NAMES:
            archive.write(data / name, name)
    images, labels, names = read_split(data, "test", 32)
    assert images.shape == (40, 32, 32, 3) and images[:, 0, -1, 0].tolist() == list(range(40, 80))
    assert names == [f"class{c}" for c in range(10)] and labels.tolist() == [c for c in range(10) for _ in range(4)]
    np.testing.assert_array_equal(read_split(tmp_path / "data.zip", "test", 32)[0], images)
    few, of, _ = read_split(data, "test", 32, 20)
    assert of.tolist() == [c for c in range(10) for _ in range(2)] and few[:, 0, -1, 0].tolist() == [*range(40, 80, 2)]
    assert len(read_split(data, "test", 32, 1000)[0]) == 40


def test_training_writes_what_the_report_reads_and_never_overwrites(trained, data):
    network, (mean, covariance, rows) = judge.load_judge(trained)
    features, classes = network.judge(read_split(data, "train", 32)[0])
    assert features.shape == rows.shape == (40, 128) and covariance.shape == (128, 128)
    torch.testing.assert_close(rows, features, atol=0.02, rtol=0.01)  # kept in half precision
    torch.testing.assert_close(mean, features.mean(0), atol=1e-4, rtol=1e-4)
    assert features.square().mean().item() == pytest.approx(1, abs=0.05)
    about = json.loads((trained / "trained_on.json").read_text())
    assert about["classes"] == [f"class{c}" for c in range(10)] and about["held-out images"] == 40
    assert about["of held-out images"].keys() >= {"label agreement", "fd_cifar10_cnn", "kd_cifar10_cnn"}
    assert set(classes.tolist()) <= set(range(10))
    with pytest.raises(InputError, match=r"--dest .*exists"):
        train_judge.main(["--data", str(data), "--dest", str(trained)])


def test_an_image_and_its_mirror_image_have_the_same_features(trained):
    network, _ = judge.load_judge(trained)
    images = pictures(6, 1, 32)
    torch.testing.assert_close(network.judge(images)[0], network.judge(images[:, :, ::-1].copy())[0])


def test_scaling_the_features_changes_no_class():
    torch.manual_seed(0)
    network, images = judge.Judge().eval(), pictures(30, 2, 32)
    before, logits = network.judge(images)[0], network.head(network.judge(images)[0])
    train_judge.normalise(network, torch.from_numpy(images).permute(0, 3, 1, 2))
    after = network.judge(images)[0]
    assert after.square().mean().item() == pytest.approx(1, rel=1e-4) and before.square().mean().item() != 1
    torch.testing.assert_close(network.head(after), logits, atol=1e-4, rtol=1e-4)


def test_the_first_convolution_whitens_patches():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32)).astype(np.uint8))
    network = judge.Judge()
    with torch.no_grad():
        train_judge.set_patches(network, images)
        rows = network.patches(images / 127.5 - 1).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(rows[:, :12], -rows[:, 12:])
    torch.testing.assert_close(torch.cov(rows[:, :12].T), torch.eye(12), atol=0.01, rtol=0)


def test_the_judge_of_the_repository():
    folder = ROOT / "assets/cifar10-judge"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    about = json.loads((folder / "trained_on.json").read_text())
    assert about["held-out images"] == 10_000 and about["of held-out images"]["label agreement"] >= 0.85
    network, reference = judge.load_judge("assets/cifar10-judge")
    assert reference[2].shape == (5000, 128) and reference[2].square().mean().item() == pytest.approx(1, abs=0.1)
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    found = judge.measure(network, reference, noise, np.arange(20) % 10)
    assert found["fd_cifar10_cnn"] > 10 * about["of held-out images"]["fd_cifar10_cnn"]


def test_the_training_images_have_no_distance_to_themselves(trained, data):
    images, labels, _ = read_split(data, "train", 32)
    found = judge.measure(*judge.load_judge(trained), images, labels)
    other = judge.measure(*judge.load_judge(trained), 255 - images, labels)
    assert found["fd_cifar10_cnn"] < 1e-2 < other["fd_cifar10_cnn"]
    agreement = judge.measure(*judge.load_judge(trained), images, (labels + 1) % 10)["label agreement"]
    assert agreement + found["label agreement"] <= 1


def test_report_of_samples_and_of_as_many_held_out_images(trained, data, samples, tmp_path, capsys):
    out = tmp_path / "report.json"
    report.main(["--samples", samples, "--data", str(data), "--judge", str(trained), "--out", str(out)])
    result = Result.read(out)
    assert result.metrics.keys() == result.settings["held-out images"].keys() and result.count == 20
    assert result.metrics["fd_cifar10_cnn"] > result.settings["held-out images"]["fd_cifar10_cnn"]
    assert result.manifest.step == 7 and "held-out images: label agreement" in capsys.readouterr().out
    table.main([str(out)])
    assert "kd_cifar10_cnn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "images, labels, culprit",
    [
        (pictures(8, 0, 16), [0] * 8, "samples.npz.*16x16.*32x32"),
        (pictures(2, 0, 32), [0] * 2, "samples.npz.* 2 images.* 4 or more"),
        (pictures(4, 0, 32), [0, 1, 2, 10], "label 10 is no class"),
        (pictures(4, 0, 32), [0, 1, 2, -1], "label -1 is no class"),
        (pictures(4, 0, 32), ["cat"] * 4, "labels"),
        (pictures(4, 0, 32), [0] * 3, "3 labels for 4 samples"),
        (pictures(4, 0, 32), None, "samples.json"),
    ],
)
def test_bad_samples_are_refused_by_name(images, labels, culprit, trained, tmp_path):
    path = save_npz(tmp_path / "samples.npz", images, None if labels is None else {"labels": labels})
    with pytest.raises(InputError, match=culprit):
        report.main(["--samples", path, "--judge", str(trained), "--out", str(tmp_path / "report.json")])
    assert not (tmp_path / "report.json").exists()


def test_bad_data_and_judges_are_refused_by_name(data, samples, trained, tmp_path):
    with pytest.raises(InputError, match=r"none.*judge\.safetensors"):
        report.main(["--samples", samples, "--judge", str(tmp_path / "none")])
    with pytest.raises(InputError, match=r"--data .*none"):
        report.main(["--samples", samples, "--judge", str(trained), "--data", str(tmp_path / "none")])
    write_images(tmp_path / "large", ["train/a/0.png", "test/a/0.png"], side=64)
    with pytest.raises(InputError, match=r"--data .*64, 64.*32x32"):
        train_judge.main(["--data", str(tmp_path / "large"), "--dest", str(tmp_path / "new")])
    write_images(tmp_path / "few", ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"], side=32)
    with pytest.raises(InputError, match=r"--data .*10 class folders"):
        train_judge.main(["--data", str(tmp_path / "few"), "--dest", str(tmp_path / "new")])
    with pytest.raises(InputError, match=r"--batch-size 41.* 40 training"):
        train_judge.main(["--data", str(data), "--dest", str(tmp_path / "new"), "--batch-size", "41"])
    assert not (tmp_path / "new").exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / judge.WEIGHTS).write_bytes((trained / judge.WEIGHTS).read_bytes()[:5000])
    with pytest.raises(InputError, match=r"judge\.safetensors"):
        report.main(["--samples", samples, "--judge", str(damaged)])
    save_file({name: torch.zeros(1) for name in ("mean", "covariance", "rows", "weight")}, damaged / judge.WEIGHTS)
    with pytest.raises(InputError, match=r"damaged.judge\.safetensors is no judge"):
        report.main(["--samples", samples, "--judge", str(damaged)])


def test_the_judges_features_are_a_set_that_the_probe_opens(data, trained, tmp_path, vae):
    source = tmp_path / "data/images"
    convert(options.ConvertFlags(str(data / "train"), str(source), (32, 32), workers=1))
    encode(options.EncodeFlags(str(source), str(tmp_path / "data/vae-sd"), str(vae), device="cpu"))
    dest = tmp_path / "data/features-cifar10_cnn"
    features.main(["--source", str(source), "--dest", str(dest), "--judge", str(trained), "--stored-dtype", "fp32"])
    dataset = open_dataset(str(tmp_path / "data"), features=[judge.NAME])
    (rows,) = dataset.gather(np.arange(len(dataset)))[3:]
    pixels, _, _ = read_split(data, "train", 32)
    torch.testing.assert_close(rows[:, 0], judge.load_judge(trained)[0].judge(pixels)[0], rtol=1e-4, atol=1e-4)


def test_the_judges_features_are_of_images_of_its_size(trained, tmp_path):
    write_images(tmp_path / "images", ["a/0.png"], side=16)
    with pytest.raises(InputError, match=r"--source .* 16 pixels; the judge needs 32"):
        features.main(["--source", str(tmp_path / "images"), "--dest", str(tmp_path / "f"), "--judge", str(trained)])
