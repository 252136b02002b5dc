"""Crops and labels of the published preparation: every case of crop.json."""

import base64
import io
import json

import numpy as np
import pytest
from parity import FIXTURES, OWN_FIXTURES, evaluation_inputs
from PIL import Image

from common.errors import InputError
from preprocessing.convert import convert
from preprocessing.options import ConvertFlags
from preprocessing.sources import ImageSource, decode
from preprocessing.transforms import center_crop_dhariwal


def load_cases():
    path = FIXTURES / "crop.json"
    if not path.exists() and FIXTURES != OWN_FIXTURES:
        return {"array_cases": {"rows": []}, "label_cases": [], "cmyk_synthetic": None}
    return json.loads(path.read_text())


CASES = load_cases()


@pytest.mark.parametrize("case", CASES["array_cases"]["rows"], ids=lambda c: f"{c['width']}x{c['height']}-{c['size']}")
def test_parity_crop(case):
    make = evaluation_inputs()
    pixels = make.image(case["height"], case["width"], case["phase"])
    assert make.sha256(pixels) == case["input_sha256"]
    result = np.asarray(center_crop_dhariwal(Image.fromarray(pixels), case["size"], case["size"]))
    assert result.shape == (case["size"], case["size"], 3)
    assert make.sha256(result) == case["sha256"]


@pytest.mark.skipif(CASES["cmyk_synthetic"] is None, reason="the folder has no crop.json")
def test_parity_cmyk():
    case, sha256 = CASES["cmyk_synthetic"], evaluation_inputs().sha256
    image = decode(base64.b64decode(case["base64"]))
    assert sha256(np.asarray(image)) == case["decoded_rgb_sha256"]
    assert sha256(np.asarray(center_crop_dhariwal(image, 64, 64))) == case["sha256_64"]


def write_source(folder, case):
    folder.mkdir()
    for name in case["files"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(buffer, format="PNG")
        path.write_bytes(buffer.getvalue())
    if "source_dataset_json" in case:
        (folder / "dataset.json").write_text(json.dumps(case["source_dataset_json"]))
    return folder


@pytest.mark.parametrize("number", range(len(CASES["label_cases"])))
def test_parity_labels(number, tmp_path):
    case = CASES["label_cases"][number]
    source = write_source(tmp_path / "source", case)
    count = case.get("max_images")
    convert(
        ConvertFlags(source, tmp_path / "dest", (8, 8), "center-crop-dhariwal", max_images=count, published_labels=True)
    )
    assert (tmp_path / "dest/dataset.json").read_text() == json.dumps({"labels": case["labels"]})
    if "order" in case:
        assert list(ImageSource(source).names) == case["order"]


@pytest.mark.parametrize("number", range(len(CASES["label_cases"])))
def test_parity_labels_by_default(number, tmp_path):
    """Without --published-labels the same, but a file beside class folders and an empty source are refused."""
    case = CASES["label_cases"][number]
    source = write_source(tmp_path / "source", case)
    stray = [name for name in case["files"] if "/" not in name]
    if not case["files"] or 0 < len(stray) < len(case["files"]):
        with pytest.raises(InputError, match=stray[0] if stray else "holds no images"):
            convert(ConvertFlags(source, tmp_path / "dest", (8, 8), "center-crop-dhariwal"))
        assert not (tmp_path / "dest").exists()
        return
    convert(ConvertFlags(source, tmp_path / "dest", (8, 8), "center-crop-dhariwal", max_images=case.get("max_images")))
    assert json.loads((tmp_path / "dest/dataset.json").read_text()) == {"labels": case["labels"]}
