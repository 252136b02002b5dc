"""EDM2's metrics end to end: folder, zip and npz, references in either form, any number of processes, faults."""

import functools
import json
import os
import pickle
import re
import zipfile

import numpy as np
import programs
import pytest
from evaluation_helpers import numbers, pictures, save_npz, script
from PIL import Image

from common.errors import InputError, as_typed, exit_on_input_error
from evaluations import calculate_metrics
from evaluations.metrics.features import load_features
from evaluations.metrics.frechet import frechet_distance, statistics
from evaluations.metrics.references import read_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


def save_folder(folder, images):
    """PNGs in two subfolders; the order of names is that of the images."""
    for i, pixels in enumerate(images):
        path = folder / f"{i // 10:02d}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def save_zip(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def files(tmp_path):
    """(reference pickle, folder of 25 samples, TorchScript file)."""
    features = script(tmp_path / "corners.pt")
    make_reference(save_npz(tmp_path / "ref.npz", pictures(30, 1)), tmp_path / "ref.pkl", features)
    return tmp_path / "ref.pkl", save_folder(tmp_path / "samples", pictures(25, 2)), features


def run(*arguments):
    calculate_metrics.main([str(argument) for argument in arguments])


def make_reference(data, dest, features, *more):
    run("ref", "--data", data, "--dest", dest, "--metrics", "", "--features", features, *more)


def calc(capsys, images, ref, features, *more):
    """{metric: printed number} of calc."""
    capsys.readouterr()
    run("calc", "--images", images, "--ref", ref, "--metrics", "", "--features", features, *more)
    lines = capsys.readouterr().out.splitlines()
    return {line.split(" = ")[0]: float(line.split(" = ")[1]) for line in lines if " = " in line}


def refused(match, *arguments):
    with pytest.raises(InputError) as caught:
        run(*arguments)
    line = as_typed(str(caught.value))
    assert re.search(match, line) and "\n" not in line


def flags(images, ref, features):
    return ("calc", "--images", images, "--ref", ref, "--metrics", "", "--features", features, "--num", 25)


def corners(images):
    blocks = images.reshape(len(images), 2, 8, 2, 8, 3).mean(axis=(2, 4)) / 255
    return blocks.transpose(0, 3, 1, 2).reshape(len(images), 12)


def test_folder_zip_and_npz_give_the_distance(files, tmp_path, capsys):
    ref, folder, features = files
    expected = frechet_distance(*statistics(corners(pictures(25, 2))), *statistics(corners(pictures(30, 1))))
    npz = save_npz(tmp_path / "samples25.npz", pictures(25, 2), {"model": "m"})
    for images in (folder, save_zip(tmp_path / "samples.zip", folder), npz):
        found = calc(capsys, images, ref, features, "--num", 25)
        assert found == {"fd_corners": pytest.approx(expected, rel=1e-5)}


def test_stdout_and_result(files, tmp_path, capsys):
    ref, folder, features = files
    folder.with_name("samples.json").write_text(json.dumps({"model": "SiT-B/2", "labels": [1]}))
    capsys.readouterr()
    run(*flags(folder, ref, features), "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert capsys.readouterr().out.splitlines() == [
        f"Loading feature statistics from {ref} ...",
        f"Loading images from {folder} ...",
        f"Setting up {features}...",
        "Calculating feature statistics...",
        "Calculating fd_corners...",
        f"fd_corners = {result['metrics']['fd_corners']:g}",
    ]
    assert result["manifest"]["model"] == "SiT-B/2" and result["count"] == 25


def test_fd_dinov2_says_whose_resize_it_is(files, tmp_path, capsys, monkeypatch):
    _, folder, features = files
    monkeypatch.setattr(calculate_metrics.features, "load_dinov2", lambda weights, device: load_features(str(features)))
    own = ("--metrics", "fd_dinov2")
    run("ref", "--data", folder, "--dest", tmp_path / "own.pkl", *own)
    line = ("calc", "--images", folder, "--ref", tmp_path / "own.pkl", *own, "--num", 25)
    run(*line, "--json", tmp_path / "result.json")
    settings = json.loads((tmp_path / "result.json").read_text())["settings"]
    assert settings["fd_dinov2_resize"].startswith("torch's (bicubic, antialiased), as EDM2; Stein et al.")
    assert f"fd_dinov2: the resize is {settings['fd_dinov2_resize']}" in capsys.readouterr().err


def test_a_reference_of_the_same_images_is_at_no_distance(files, capsys):
    _, folder, features = files
    make_reference(folder, folder / "own.pkl", features)
    assert calc(capsys, folder, folder / "own.pkl", features, "--num", 25)["fd_corners"] == pytest.approx(0, abs=1e-9)
    content = pickle.loads((folder / "own.pkl").read_bytes())
    assert content["num_images"] == 25
    assert {key: value.dtype for key, value in content["fd_corners"].items()} == {"mu": np.float64, "sigma": np.float64}


def test_npz_references_serve_for_fid(files, tmp_path):
    _, folder, features = files
    mu, sigma = statistics(corners(pictures(30, 1)))
    np.savez(tmp_path / "adm.npz", arr_0=pictures(5, 1), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    found, size = read_reference(tmp_path / "adm.npz")
    assert list(found) == ["fid"] and size == (16, 16)
    np.testing.assert_array_equal(found["fid"][1], sigma)
    refused("--metrics leaves nothing to measure", *flags(folder, tmp_path / "adm.npz", features))
    only_dinov2 = ("--metrics", "fd_dinov2", "--num", 25)  # whose weights are not asked for
    refused(
        "--metrics leaves nothing to measure", "calc", "--images", folder, "--ref", tmp_path / "adm.npz", *only_dinov2
    )
    np.savez(tmp_path / "images.npz", arr_0=pictures(5, 1))
    refused("images.npz holds no statistics", *flags(folder, tmp_path / "images.npz", features))
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    assert read_reference(tmp_path / "statistics.npz")[1] is None


def test_a_reference_of_another_size_is_refused_unless_asked_for(files, tmp_path, capsys):
    ref, folder, features = files
    make_reference(save_npz(tmp_path / "large.npz", pictures(30, 1, size=32)), tmp_path / "large.pkl", features)
    mu, sigma = statistics(corners(pictures(30, 1)))
    np.savez(tmp_path / "adm.npz", arr_0=pictures(5, 1, size=32), mu=mu, sigma=sigma)
    says = "samples of 16x16 are compared with a reference of 32x32"
    for other in ("large.pkl", "adm.npz"):
        refused(f"{says}; .*pass --other-size", *flags(folder, tmp_path / other, features))
    assert "Setting up" not in capsys.readouterr().out.split("wrote")[-1]  # before any network is loaded
    run(*flags(folder, tmp_path / "large.pkl", features), "--other-size", "--json", tmp_path / "odd.json")
    (warning,) = json.loads((tmp_path / "odd.json").read_text())["warnings"]
    assert warning.startswith(says)
    out, err = capsys.readouterr()
    assert "fd_corners = " in out and f"warning: {says}" in err
    content = pickle.loads(ref.read_bytes())
    assert content.pop("image_size") == (16, 16)
    ref.write_bytes(pickle.dumps(content))  # as others publish them
    assert calc(capsys, folder, ref, features, "--num", 25)


@pytest.mark.parametrize("number", [10, 25])
def test_a_subset_is_drawn_as_published(files, tmp_path, capsys, number):
    ref, folder, features = files
    chosen = calculate_metrics.choose_subset(25, number, 1)
    expected = statistics(corners(pictures(25, 2)[chosen]))
    value = frechet_distance(*expected, *statistics(corners(pictures(30, 1))))
    npz = save_npz(tmp_path / "samples25.npz", pictures(25, 2))
    for images in (folder, npz):
        found = calc(capsys, images, ref, features, "--num", number, "--seed", 1, "--batch", 4)
        assert found["fd_corners"] == pytest.approx(value, rel=1e-5)


def test_batches_and_processes_do_not_show(files, tmp_path, capsys):
    ref, folder, features = files
    expected = calc(capsys, folder, ref, features, "--num", 25)["fd_corners"]
    for batch in (1, 7):
        assert calc(capsys, folder, ref, features, "--num", 25, "--batch", batch)["fd_corners"] == pytest.approx(
            expected, rel=1e-5
        )
    result = tmp_path / "two.json"
    command = ("-m", "evaluations.calculate_metrics", *flags(folder, ref, features)[:-2], "--num-images", 25)
    done = programs.run_ranks(2, *command, "--json", result)
    assert done.returncode == 0, done.stderr
    one = frechet_distance(*statistics(corners(pictures(25, 2))), *statistics(corners(pictures(30, 1))))
    assert json.loads(result.read_text())["metrics"]["fd_corners"] == pytest.approx(one, rel=1e-5)
    name, printed = done.stdout.splitlines()[-1].split(" = ")
    assert name == "fd_corners" and float(printed) == pytest.approx(expected, rel=1e-5)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_any_protocol_are_read(tmp_path, protocol):
    sigma = np.asfortranarray(np.arange(9.0).reshape(3, 3) + np.arange(9.0).reshape(3, 3).T)
    content = {"num_images": np.int64(7), "fid": {"mu": np.arange(3.0), "sigma": sigma}}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found, size = read_reference(tmp_path / "ref.pkl")
    assert list(found) == ["fid"] and size is None
    np.testing.assert_array_equal(found["fid"][1], sigma)


def test_pickles_of_numpy_1_are_read(tmp_path):
    content = pickle.dumps({"fid": {"mu": np.arange(3.0), "sigma": np.eye(3)}}, protocol=3)
    (tmp_path / "ref.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert list(read_reference(tmp_path / "ref.pkl")[0]) == ["fid"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (pickle.dumps({"fid": Evil()}), "holds (posix|nt).system, which is not loaded: it could run code"),
        (pickle.dumps({"fid": {"mu": np.array([Evil()], dtype=object)}}), "system, which is not loaded"),
        (pickle.dumps({"num_images": 3}), "holds no statistics"),
        (pickle.dumps([1, 2]), "cannot be read as a dict"),
        (pickle.dumps({"fid": {"mu": np.zeros(3)}}), "fid does not hold both mu and sigma"),
        (pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(4)}}), r"not finite \(D,\) and \(D, D\)"),
        (pickle.dumps({"fid": {"mu": np.full(3, np.inf), "sigma": np.eye(3)}}), "not finite"),
        (pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}}), "not symmetric.*copy it again"),
        (pickle.dumps({"fid": {"mu": "x", "sigma": np.eye(3)}}), "is not numeric"),
        (pickle.dumps({"image_size": 3, "fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}), "image_size"),
        (pickle.dumps({"fd_corners": {"mu": np.zeros(3), "sigma": np.eye(3)}}), "does not fit fd_corners"),
        (pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}})[:60], "cannot be read as a dict"),
        (b"hello", "cannot be read as a dict"),
    ],
    ids="code objects nothing list half shapes inf zeroed words size width cut text".split(),
)
def test_bad_references_are_refused(files, tmp_path, content, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(content)
    refused(f"bad.pkl.*{match}", *flags(files[1], tmp_path / "bad.pkl", files[2]))
    assert not (tmp_path / "evil").exists()


def test_check_only_needs_no_images(files, tmp_path, capsys):
    ref, _, features = files
    run(*flags(tmp_path / "none", ref, features), "--check-only")
    assert " = " not in capsys.readouterr().out
    refused("nowhere.pkl", *flags(tmp_path / "none", tmp_path / "nowhere.pkl", features), "--check-only")
    refused("--features", *flags(tmp_path / "none", ref, tmp_path / "corners.pth"), "--check-only")


def test_a_reference_of_incomplete_samples_is_refused(files, tmp_path):
    _, folder, features = files
    folder.with_name("samples.json").write_text(json.dumps({"num_fid_samples": 26}))
    named = ("--data", folder, "--dest", tmp_path / "own.pkl", "--metrics", "", "--features", features)
    refused("holds 25 samples.*26.*--incomplete", "ref", *named)
    run("ref", *named, "--incomplete")


def test_bad_images_are_named(files, tmp_path):
    ref, folder, features = files
    (folder / "01/015.png").write_bytes((folder / "01/015.png").read_bytes()[:80])
    refused("samples/01/015.png cannot be read as an image", *flags(folder, ref, features))
    Image.fromarray(pictures(1, 0, size=32)[0]).save(folder / "01/015.png")
    refused(r"01/015.png is \(32, 32, 3\), the first image \(16, 16, 3\)", *flags(folder, ref, features))
    (tmp_path / "empty").mkdir()
    refused("--images .*empty holds no images", *flags(tmp_path / "empty", ref, features))
    refused("--images .*nowhere is neither a folder nor a .zip", *flags(tmp_path / "nowhere", ref, features))


def test_bad_flags_are_named(files, tmp_path):
    ref, folder, features = files
    refused("Found 25 images, but expected at least 26", *flags(folder, ref, features)[:-1], 26)
    refused('Invalid metric "is"', "calc", "--images", folder, "--ref", ref, "--metrics", "fid,is", "--num", 25)
    none = ("--metrics", "", "--num", 25)
    refused("--metrics leaves nothing to measure", "calc", "--images", folder, "--ref", ref, *none)
    refused("--num 1 is out of range", *flags(folder, ref, features)[:-1], 1)
    refused(f"--dest {tmp_path} is a folder", "ref", "--data", folder, "--dest", tmp_path, "--features", features)
    refused(r"--dest own\.npz .*\.pkl", "ref", "--data", folder, "--dest", "own.npz", "--features", features)
    refused("download the file first", *flags(folder, "https://host/ref.pkl", features))
    refused("nowhere.pkl cannot be read", *flags(folder, tmp_path / "nowhere.pkl", features))


def test_a_reference_that_a_full_disk_refuses_ends_in_one_line(files, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pickle.dump", fail)
    with pytest.raises(SystemExit), exit_on_input_error():
        make_reference(files[1], tmp_path / "own.pkl", files[2])
    assert "own.pkl: No space left on device; free space" in capsys.readouterr().err


def test_dinov2_weights_that_are_missing_end_in_one_line(files, tmp_path, monkeypatch, capsys):
    small = functools.partial(calculate_metrics.features.load_dinov2, name="vit_small_patch14_dinov2.lvd142m")
    monkeypatch.setattr(calculate_metrics.features, "load_dinov2", small)  # the large one takes ten seconds to build
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "dino.pkl").write_bytes(pickle.dumps({"fd_dinov2": {"mu": np.zeros(1024), "sigma": np.eye(1024)}}))
    line = ("calc", "--images", files[1], "--ref", tmp_path / "dino.pkl", "--num", 25, "--metrics", "fd_dinov2")
    refused(r"dinov2_vitl14_pretrain\.pth .* --dinov2-weights", *line)
    assert numbers(capsys.readouterr().out) == {}
