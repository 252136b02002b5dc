"""Samplings of the digits side by side."""

import json

import numpy as np
import pytest
from PIL import Image
from test_digits import write_samples

from common.errors import InputError
from digits import report
from digits.data import load_digits_split, upsample


@pytest.fixture
def files(tmp_path):
    """{name: npz} of held-out digits under their labels and under wrong ones."""
    held_out = load_digits_split()[1]
    images, paths = upsample(held_out.images), {}
    for name, labels in (("right", held_out.labels), ("wrong", (held_out.labels + 1) % 10)):
        (tmp_path / name).mkdir()
        paths[name] = write_samples(tmp_path / name, images, labels)
    return paths


def test_numbers_and_picture_of_two_samplings(files, tmp_path, capsys):
    samples = [f"{name}={path}" for name, path in files.items()]
    out, picture = tmp_path / "report.json", tmp_path / "rows.png"
    report.main(["--samples", *samples, "--out", str(out), "--grid", str(picture)])
    found = json.loads(out.read_text())
    assert list(found) == ["right", "wrong"]
    agreement = {name: part["agreement"]["samples"] for name, part in found.items()}
    assert agreement["right"]["agree"] >= 380 and agreement["right"]["of"] == 400
    assert agreement["wrong"]["agree"] < 20
    assert found["right"]["frechet"]["samples"] < 0.1
    assert f"{agreement['right']['agree']} of 400" in capsys.readouterr().out
    with Image.open(picture) as grid:
        # two digits of each class, a row per sampling; digits above the columns, names beside the rows
        assert grid.size == (7 * 5 + 6 + 20 * 66 - 2, 16 + 2 * 66 - 2)
        rows = np.asarray(grid)[16:, 41:]
    assert not np.array_equal(rows[:64], rows[66:])  # the labels decide which digits stand where


def test_bad_names_are_refused(files):
    with pytest.raises(InputError, match="NAME=FILE"):
        report.main(["--samples", "samples.npz", "a=other.npz"])
    with pytest.raises(InputError, match="NAME=FILE"):
        report.main(["--samples", f"a={files['right']}", f"a={files['wrong']}"])


def test_samplings_of_different_numbers_are_refused(files, tmp_path):
    held_out = load_digits_split()[1]
    fewer = write_samples(tmp_path, upsample(held_out.images[:100]), held_out.labels[:100])
    with pytest.raises(InputError, match=r"--samples.* 400.* 100.*equal numbers"):
        report.main(["--samples", f"all={files['right']}", f"some={fewer}"])
