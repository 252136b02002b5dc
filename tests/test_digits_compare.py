"""Samplings of the digits side by side."""

import json

import numpy as np
import pytest
from PIL import Image
from test_digits import write_samples

from common.errors import InputError
from digits import compare
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
    compare.main(["--samples", *samples, "--out", str(out), "--picture", str(picture)])
    report = json.loads(out.read_text())
    assert list(report) == ["right", "wrong"]
    assert report["right"]["agree"] >= 380 and report["right"]["of"] == 400
    assert report["wrong"]["agreement"] < 0.05
    assert report["right"]["frechet"] < 0.1
    assert f"{report['right']['agree']} of 400" in capsys.readouterr().out
    with Image.open(picture) as grid:
        assert grid.size == (20 * 68, 2 * 68)  # two digits of each class, a row per sampling
        rows = np.asarray(grid)
    assert not np.array_equal(rows[:68], rows[68:])  # the labels decide which digits stand where


def test_bad_names_are_refused(files):
    with pytest.raises(InputError, match="NAME=FILE"):
        compare.main(["--samples", "samples.npz"])
    with pytest.raises(InputError, match="a name of its own"):
        compare.main(["--samples", f"a={files['right']}", f"a={files['wrong']}"])
