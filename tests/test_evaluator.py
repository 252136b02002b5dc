"""The ADM evaluator end to end: what it prints, which arrays it takes, batch sizes, processes, faults."""

import itertools
import json
import re

import numpy as np
import programs
import pytest
import torch
from evaluation_helpers import Broken, Wrong, numbers, pictures, save_npz, script
from PIL import Image

from common.errors import InputError, as_typed
from evaluations import evaluator
from evaluations.metrics import inception
from evaluations.metrics.features import Script
from evaluations.metrics.frechet import frechet_distance, statistics
from evaluations.metrics.kernel import kernel_distance
from evaluations.metrics.precision_recall import precision_recall

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@pytest.fixture
def files(tmp_path):
    """(reference, samples, TorchScript file)."""
    reference = save_npz(tmp_path / "ref.npz", pictures(20, 1))
    samples = save_npz(tmp_path / "samples.npz", pictures(33, 2), {"model": "DeepFlow-Ti/2", "labels": [0] * 33})
    return reference, samples, script(tmp_path / "corners.pt")


def run(capsys, *arguments):
    """(stdout, stderr) of the evaluator in this process."""
    evaluator.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refused(match, *arguments):
    with pytest.raises(InputError) as caught:
        evaluator.main([str(argument) for argument in arguments])
    line = as_typed(str(caught.value))
    assert re.search(match, line) and "\n" not in line


def corners(images):
    """What the TorchScript file computes, in float32 and by hand."""
    n, size = len(images), images.shape[1] // 2
    quarters = images.reshape(n, 2, size, 2, size, 3).astype(np.float64).mean(axis=(2, 4)) / 255
    return torch.from_numpy(quarters.transpose(0, 3, 1, 2).reshape(n, 12)).float()


def test_numbers_of_another_extractor_carry_its_name(files, tmp_path, capsys):
    reference, samples, features = files
    out, err = run(capsys, reference, samples, "--features", features, "--json", tmp_path / "r/result.json")
    rows = corners(pictures(20, 1)), corners(pictures(33, 2))
    expected = {"FD (corners)": frechet_distance(*statistics(rows[1]), *statistics(rows[0]))}
    expected["Precision (corners)"], expected["Recall (corners)"] = precision_recall(*rows)
    expected["KD (corners)"], expected["KD standard error (corners)"] = kernel_distance(*rows)
    assert numbers(out) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert 0 < expected["Precision (corners)"] < 1
    result = json.loads((tmp_path / "r/result.json").read_text())
    names = ("fd", "precision", "recall", "kd", "kd_standard_error")
    assert list(result["metrics"]) == [f"{name}_corners" for name in names]
    assert list(result["metrics"].values()) == list(numbers(out).values())
    assert result["manifest"]["model"] == "DeepFlow-Ti/2" and "labels" not in result["manifest"]
    assert result["count"] == 33 and result["settings"]["precision"] == "float16"
    assert "samples.npz holds 33 images; published numbers use 50000" in err


class TinyInception(torch.nn.Module):
    """What the evaluator uses of InceptionV3, in widths that take no time: 12 pool and 7·2·2 spatial features."""

    def __init__(self):
        super().__init__()
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1)
        self.fc = torch.nn.Linear(12, 10)
        self.requires_grad_(False)

    def forward(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        self.Mixed_6d.branch1x1(small)
        return (small.flatten(1),)


@pytest.fixture
def small_inception(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyInception()
    monkeypatch.setattr(inception, "load_network", lambda *_: network)
    return network


CLOSING = ("Inception Score", "FID", "sFID", "Precision", "Recall")  # then KID, which it lacks


def test_stdout_is_that_of_the_published_evaluator(files, small_inception, capsys):
    out, err = run(capsys, *files[:2])
    lines = out.splitlines()
    assert lines[:5] == [
        "computing reference batch activations...",
        "computing/reading reference batch statistics...",
        "computing sample batch activations...",
        "computing/reading sample batch statistics...",
        "Computing evaluations...",
    ]
    assert [line.split(": ")[0] for line in lines[5:]] == [*CLOSING, "KID", "KID standard error"]
    assert all(np.isfinite(float(line.split(": ")[1])) for line in lines[5:])
    assert "20 images of 16x16; statistics from them" in err


def test_numbers_are_of_the_right_features(files, small_inception, capsys):
    found = numbers(run(capsys, *files[:2])[0])
    pool = corners(pictures(20, 1)), corners(pictures(33, 2))
    weight, bias = (value.flatten() for value in small_inception.Mixed_6d.branch1x1.parameters())
    spatial = [rows.view(-1, 3, 4).transpose(1, 2) @ weight.view(9, 3)[:7].T + bias[:7] for rows in pool]
    spatial = [rows.flatten(1) for rows in spatial]
    expected = {"Inception Score": inception.inception_score(pool[1], small_inception.fc.weight.T)}
    for name, (reference, sample) in (("FID", pool), ("sFID", spatial)):
        expected[name] = frechet_distance(*statistics(sample), *statistics(reference))
    expected["Precision"], expected["Recall"] = precision_recall(*pool)
    expected["KID"], expected["KID standard error"] = kernel_distance(*pool)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_stored_statistics_take_the_place_of_computed_ones(files, small_inception, tmp_path, capsys):
    reference, samples, _ = files
    plain = numbers(run(capsys, reference, samples)[0])
    moments = {}
    for mean, sigma, width in (("mu", "sigma", 12), ("mu_s", "sigma_s", 28)):
        moments.update({mean: np.full(width, 3.0), sigma: np.eye(width)})
    stored = save_npz(tmp_path / "stored.npz", pictures(20, 1), **moments)
    out, err = run(capsys, stored, samples)
    changed = numbers(out)
    assert f"reference {stored}: 20 images of 16x16; statistics from mu, sigma, mu_s, sigma_s of the file" in err
    assert changed["FID"] > 50 and changed["sFID"] > 50
    for name in ("Inception Score", "Precision", "Recall", "KID"):  # between images all the same
        assert changed[name] == plain[name]
    stored_sample = save_npz(tmp_path / "stored_sample.npz", pictures(33, 2), **moments)
    out, err = run(capsys, stored, stored_sample)
    assert numbers(out)["FID"] == pytest.approx(0, abs=1e-6)
    assert "warning:" in err and "stored_sample.npz holds statistics: FID and sFID use them" in err


def test_statistics_of_another_network_are_refused(files, small_inception, tmp_path):
    moments = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(28), "sigma_s": np.eye(28)}
    other = save_npz(tmp_path / "other.npz", pictures(9, 1), **moments)
    refused(r"other.npz .*\(64,\).*\(12,\)", other, files[1])
    refused(r"other.npz .*\(64,\).*\(12,\)", other, tmp_path / "none.npz", "--check-only")


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_does_not_show(files, tmp_path, capsys, batch):
    reference, samples, features = files
    expected = numbers(run(capsys, reference, samples, "--features", features, "--batch-size", 16)[0])
    found = numbers(run(capsys, reference, samples, "--features", features, "--batch-size", batch)[0])
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_do_not_show(files, capsys, processes):
    reference, samples, features = files
    expected = numbers(run(capsys, reference, samples, "--features", features)[0])
    flags = (reference, samples, "--features", features, "--batch-size", 5)
    done = programs.run_ranks(processes, "-m", "evaluations.evaluator", *flags)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) == pytest.approx(expected, rel=1e-9)
    assert done.stdout.count("computing sample batch activations...") == 1


def test_a_process_may_have_no_images(files, tmp_path, capsys):
    reference, samples = (save_npz(tmp_path / f"{seed}.npz", pictures(2, seed)) for seed in (1, 2))
    flags = (reference, samples, "--features", files[2], "--neighbors", 1)
    expected = numbers(run(capsys, *flags)[0])
    done = programs.run_ranks(3, "-m", "evaluations.evaluator", *flags)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) == pytest.approx(expected, rel=1e-9)


def test_a_compressed_file_gives_the_same(files, tmp_path, capsys):
    reference, samples, features = files
    expected = numbers(run(capsys, reference, samples, "--features", features)[0])
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=pictures(33, 2))
    assert numbers(run(capsys, reference, tmp_path / "compressed.npz", "--features", features)[0]) == expected


def test_folders_are_measured_like_an_npz_of_their_images(files, small_inception, tmp_path, capsys):
    expected = run(capsys, *files[:2])[0]
    for name, images in (("reference", pictures(20, 1)), ("samples", pictures(33, 2))):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:06d}.png")
    out, err = run(capsys, tmp_path / "reference", tmp_path / "samples", "--json", tmp_path / "r.json")
    assert out == expected
    assert "reference: 20 images of 16x16; statistics from them" in err
    assert json.loads((tmp_path / "r.json").read_text())["count"] == 33


def test_kid_is_left_out_with_its_reason_where_images_are_too_few(files, small_inception, tmp_path, capsys):
    few = save_npz(tmp_path / "few.npz", pictures(3, 1))
    for pair in ((few, files[1]), (files[0], few)):
        out, err = run(capsys, *pair, "--neighbors", 1)
        assert tuple(numbers(out)) == CLOSING and "left out: it needs 4 images a side" in err
        out, _ = run(capsys, *pair, "--neighbors", 1, "--features", files[2])
        assert list(numbers(out))[-1] == "Recall (corners)"


def test_inception_score_of_equal_splits(files, small_inception, tmp_path, capsys):
    """33 images in ten splits: 3 or 4 each, ends at i·33/10 rounded down, as Salimans et al. cut them."""
    out, _ = run(capsys, *files[:2], "--splits", 10)
    rows, classifier = corners(pictures(33, 2)), small_inception.fc.weight.T
    ends = [0, 3, 6, 9, 13, 16, 19, 23, 26, 29, 33]
    parts = [inception.inception_score(rows[a:b], classifier) for a, b in itertools.pairwise(ends)]
    assert numbers(out)["Inception Score"] == pytest.approx(sum(parts) / 10, rel=1e-6)
    assert abs(numbers(out)["Inception Score"] - inception.inception_score(rows, classifier)) > 1e-6
    refused("--splits 34: .*samples.npz holds only 33 images", *files[:2], "--splits", 34)
    refused("--splits 0 is out of range", *files[:2], "--splits", 0)


def test_options_of_the_arithmetic(files, capsys):
    reference, samples, features = files
    default = numbers(run(capsys, reference, samples, "--features", features)[0])
    published = numbers(run(capsys, reference, samples, "--features", features, "--sqrtm")[0])
    assert published["FD (corners)"] == pytest.approx(default["FD (corners)"], rel=1e-6)
    more = numbers(run(capsys, reference, samples, "--features", features, "--neighbors", 7)[0])
    assert more["Precision (corners)"] > default["Precision (corners)"]
    for precision in ("float32", "float64"):
        out = run(capsys, reference, samples, "--features", features, "--precision", precision, "--block", 6)[0]
        rows = corners(pictures(20, 1)), corners(pictures(33, 2))
        assert numbers(out)["Recall (corners)"] == precision_recall(*rows, precision=precision)[1]


def test_another_resolution_gives_numbers_only_where_they_are_asked_for(files, tmp_path, capsys):
    other = save_npz(tmp_path / "large.npz", pictures(20, 1, size=32))
    says = "samples of 16x16 are compared with a reference of 32x32"
    refused(f"{says}; take the reference of that size, or pass --other-size", other, files[1], "--features", files[2])
    assert "Computing" not in capsys.readouterr().out
    out, err = run(capsys, other, files[1], "--features", files[2], "--other-size")
    assert f"warning: {says}" in err and "FD (corners)" in numbers(out)


# ------------------------------------------------------------------------------------------------ faults


def test_a_file_cut_short_is_named(files, tmp_path):
    whole = open(files[1], "rb").read()
    cut = tmp_path / "cut.npz"
    for size in (len(whole) - 30, len(whole) // 2, 0):
        cut.write_bytes(whole[:size])
        refused("cut.npz .*truncated", files[0], cut, "--features", files[2])


def test_damage_in_the_pixels_is_noticed(files, tmp_path):
    data = bytearray(open(files[1], "rb").read())
    data[5000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(data)
    refused("damaged.npz .*CRC", files[0], tmp_path / "damaged.npz", "--features", files[2])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"arr_0": np.array([{"a": 1}, None], dtype=object)}, "arr_0 is object"),
        ({"arr_0": pictures(8, 0) / np.float32(255)}, r"arr_0 is float32 \(8, 16, 16, 3\); images must be uint8"),
        ({"arr_0": pictures(8, 0)[..., :1]}, r"\(8, 16, 16, 1\)"),
        ({"arr_0": pictures(8, 0).transpose(0, 3, 1, 2).copy()}, r"\(8, 3, 16, 16\)"),
        ({"arr_0": pictures(8, 0)[:0]}, r"\(0, 16, 16, 3\)"),
        ({"arr_0": np.asfortranarray(pictures(8, 0))}, "Fortran order"),
        ({"images": pictures(8, 0)}, "missing arr_0 in npz file"),
        ({"arr_0": pictures(3, 0)}, "holds 3 images; --neighbors 3 needs more"),
        ({"arr_0": pictures(8, 0), "mu": np.zeros(3)}, "does not hold both mu and sigma"),
        ({"arr_0": pictures(8, 0), **dict.fromkeys(STATISTICS, np.zeros(3))}, r"not finite \(D,\) and \(D, D\)"),
        (
            {
                "arr_0": pictures(8, 0),
                "mu": np.full(3, np.nan),
                "sigma": np.eye(3),
                "mu_s": np.zeros(3),
                "sigma_s": np.eye(3),
            },
            "not finite",
        ),
    ],
    ids=[
        "objects",
        "floats",
        "grey",
        "channels first",
        "empty",
        "Fortran",
        "no images",
        "few",
        "half",
        "shapes",
        "nan",
    ],
)
@pytest.mark.parametrize("side", ["reference", "samples"])
def test_bad_arrays_are_refused(files, tmp_path, arrays, match, side):
    bad = tmp_path / "bad.npz"
    np.savez(bad, **arrays)
    pair = (bad, files[1]) if side == "reference" else (files[0], bad)
    refused(f"bad.npz.*{match}", *pair)


def test_missing_files_and_values_are_named(files, tmp_path):
    reference, samples, _ = files
    refused("REFERENCE .*nowhere.npz", tmp_path / "nowhere.npz", samples)
    refused(r"nowhere\.pt.* TorchScript file", reference, samples, "--features", tmp_path / "nowhere.pt")
    refused("--batch-size 0 is out of range", reference, samples, "--batch-size", 0)
    refused("--features wrong returns", reference, samples, "--features", script(tmp_path / "wrong.pt", Wrong()))


def test_check_only_needs_no_samples(files, small_inception, tmp_path, capsys):
    result = tmp_path / "r.json"
    out, _ = run(capsys, files[0], tmp_path / "none.npz", "--check-only", "--json", result)
    assert "ref.npz: 20 images" in out and "Computing" not in out and not result.exists()


def test_check_only_finds_what_would_end_the_measuring(files, tmp_path):
    def lacks(match, reference, *flags):
        refused(match, reference, tmp_path / "none.npz", "--check-only", *flags)

    lacks("nowhere.npz", tmp_path / "nowhere.npz")
    lacks("none.pth", files[0], "--inception-weights", tmp_path / "none.pth")
    lacks("--json", files[0], "--json", files[0] + "/r.json")
    features = ("--features", files[2])
    data = bytearray(open(files[0], "rb").read())
    data[5000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(data)
    lacks("damaged.npz .*CRC", tmp_path / "damaged.npz", *features)
    lacks("--features wrong", files[0], "--features", script(tmp_path / "wrong.pt", Wrong()))


def test_a_smaller_last_split_is_said(files, small_inception, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "SPLIT", 15)
    assert "the last 3 images weigh as much" in run(capsys, *files[:2])[1]
    assert "weigh as much" not in run(capsys, *files[:2], "--splits", 3)[1]


def test_features_that_are_not_finite_give_no_number(files, tmp_path, capsys):
    images = pictures(12, 3)
    images[9, 0, 0] = 0
    samples, broken = save_npz(tmp_path / "black.npz", images), script(tmp_path / "broken.pt", Broken())
    refused(
        r"black.npz: features of images 8 to 11 are not finite",
        samples,
        files[1],
        "--features",
        broken,
        "--batch-size",
        4,
    )
    assert "FD" not in capsys.readouterr().out


def test_without_weights_the_line_says_which_file_from_where_and_which_flag(files, tmp_path):
    done = programs.run("-m", "evaluations.evaluator", *files[:2], TORCH_HOME=str(tmp_path), http_proxy="http://0.0.0.0:9",
                           https_proxy="http://0.0.0.0:9")  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/",
        "--inception-weights",
        str(tmp_path),
    ):
        assert part in last


def test_weights_of_another_network_are_refused(files, tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    refused(
        "other.pth holds another network; download .*weights-inception",
        *files[:2],
        "--inception-weights",
        tmp_path / "other.pth",
    )
    refused("none.pth does not exist", *files[:2], "--inception-weights", tmp_path / "none.pth")


def test_bare_json_flag_writes_beside_other_results(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluator.main([files[0], files[1], "--features", files[2], "--json"])
    assert json.loads((tmp_path / "results/samples-corners.json").read_text())["samples"] == files[1]


def test_results_of_models_that_differ_after_the_point_have_files_of_their_own(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "load_features", lambda name, _: Script(name, torch.jit.load(files[2])))
    for name in ("vit_base_patch16_224.dino", "hf-hub:timm/vit_base_patch16_224.mae"):
        evaluator.main([*files[:2], "--features", name, "--json"])
    found = sorted(path.name for path in tmp_path.glob("results/*"))
    assert found == [f"samples-vit_base_patch16_224.{name}.json" for name in ("dino", "mae")]


def test_a_full_disk_leaves_the_numbers_in_one_line(files, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluations.metrics.results.write_json", fail)
    result = tmp_path / "r.json"
    refused(f"{result} cannot be written .No space left", *files[:2], "--features", files[2], "--json", result)
    assert "FD (corners): " in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_named_before_the_work(files, tmp_path, capsys):
    for place in (tmp_path, files[0] + "/r.json"):
        refused(f"--json {place}", *files[:2], "--features", files[2], "--json", place)
    assert "computing" not in capsys.readouterr().out
