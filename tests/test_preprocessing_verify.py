"""verify: nothing to say about a good folder, and every injected fault found and named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import programs
import pytest
from data_helpers import photo, tiny_vae, write_class_folders, write_folder_layout, write_images

from common.errors import InputError
from common.files import sha256_of_files
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.options import ConvertFlags, EncodeFlags, MirrorFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.verify import verify

TOOL = Path(__file__).parent.parent / "preprocessing/dataset_tools.py"
LATENT = "vae-sd/00000/img-mean-std-0000000{}.npy"
IMAGE = "images/00000/img0000000{}.png"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole data folder: images, vae-sd, vae-sd-mirror of nine 16×16 images; and the same packed."""
    root = tmp_path_factory.mktemp("good")
    source = write_class_folders(root / "source", per_class=3)
    convert(ConvertFlags(source, root / "data/images", (16, 16), "center-crop-dhariwal"))
    encode(EncodeFlags(root / "data/images", root / "data/vae-sd", tiny_vae()))
    encode(MirrorFlags(root / "data/images", root / "data/vae-sd-mirror", tiny_vae(), packed=True))
    pack(PackFlags(root / "data", root / "packed", shard_size=4))
    shutil.copytree(root / "data/images", root / "packed/images")
    return root


@pytest.fixture
def data(good, tmp_path):
    return shutil.copytree(good / "data", tmp_path / "data")


@pytest.fixture
def packed(good, tmp_path):
    return shutil.copytree(good / "packed", tmp_path / "packed")


def test_good_folders_have_no_faults(data, packed):
    for folder in (data, packed, data / "vae-sd", packed / "vae-sd", data / "images"):
        assert verify(folder, decode=True).faults == {}
    for folder in (data, packed):
        assert verify(folder, vae=tiny_vae()).faults == {}


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_manifest(folder, **values):
    change_json(folder / "manifest.json", lambda manifest: manifest.update(values))


def set_label(path, row, label):
    change_json(path, lambda content: content["labels"][row].__setitem__(1, label))


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def spoil(path, value):
    array = np.load(path)
    array[0, 0, 0] = value
    np.save(path, array)


def other_vae(folder, **changes):
    def change(manifest):
        manifest["latents"].update(changes)

    change_json(folder / "manifest.json", change)


FOLDER_FAULTS = {  # what is done → kind of fault, and what the line names
    "missing latent": (lambda d: (d / LATENT.format(4)).unlink(), "missing", r"img-mean-std-00000004\.npy"),
    "missing image": (lambda d: (d / IMAGE.format(4)).unlink(), "missing", r"img00000004\.png"),
    "truncated latent": (
        lambda d: (d / LATENT.format(4)).write_bytes((d / LATENT.format(4)).read_bytes()[:200]),
        "unreadable row",
        r"img-mean-std-00000004\.npy is truncated",
    ),
    "label out of range": (
        lambda d: set_label(d / "vae-sd/dataset.json", 5, 3),
        "label range",
        "label 3 of .*0005.png",
    ),
    "other label": (lambda d: set_label(d / "vae-sd/dataset.json", 5, 0), "labels differ", r"img00000005\.png"),
    "label against folder": (lambda d: set_label(d / "images/dataset.json", 5, 0), "label", "n0001/2.JPEG has label 0"),
    "whole numbers": (
        lambda d: np.save(d / LATENT.format(4), np.zeros((8, 4, 4), np.int64)),
        "unreadable row",
        r"00000004\.npy holds int64",
    ),
    "complex numbers first": (
        lambda d: np.save(d / LATENT.format(0), np.zeros((8, 4, 4), complex)),
        "unreadable",
        r"00000000\.npy holds complex128",
    ),
    "name outside": (
        lambda d: change_json(d / "vae-sd/dataset.json", lambda c: c["labels"][0].__setitem__(0, "../x.npy")),
        "unreadable",
        r"dataset\.json: '\.\./x\.npy' leaves the folder",
    ),
    "label beyond all classes": (
        lambda d: set_label(d / "vae-sd/dataset.json", 5, 10**12),
        "unreadable",
        "dataset.json",
    ),
    "number of classes": (lambda d: change_manifest(d / "vae-sd", num_classes=10**12), "unreadable", "'num_classes'"),
    "NaN": (lambda d: spoil(d / LATENT.format(7), np.nan), "not finite", r"img-mean-std-00000007\.npy"),
    "infinity": (lambda d: spoil(d / LATENT.format(7), np.inf), "not finite", r"img-mean-std-00000007\.npy"),
    "other shape": (
        lambda d: np.save(d / LATENT.format(2), np.zeros((4, 4, 4), np.float32)),
        "unreadable row",
        r"00000002\.npy has shape",
    ),
    "a number first": (
        lambda d: np.save(d / LATENT.format(0), np.float32(1)),
        "unreadable",
        r"latents have shape \(\)",
    ),
    "VAE id": (lambda d: other_vae(d / "vae-sd", vae="stabilityai/sd-vae-ft-ema"), "wrong VAE", "latents is"),
    "VAE family": (lambda d: other_vae(d / "vae-sd", family="sd-vae-ft"), "wrong VAE", "latents is"),
    "stray latent": (lambda d: np.save(d / "vae-sd/00000/x.npy", 0), "stray file", r"00000/x\.npy"),
    "stray image": (lambda d: photo(0, 16, 16).save(d / "images/x.png"), "stray file", r"images/x\.png"),
    "image size": (lambda d: photo(0, 8, 8).save(d / IMAGE.format(3)), "image size", r"img00000003\.png is 8x8"),
    "empty image": (lambda d: (d / IMAGE.format(3)).write_bytes(b""), "unreadable image", r"img00000003\.png"),
    "class order": (
        lambda d: change_manifest(d / "vae-sd", class_names=["n0001", "n0000", "n0002"]),
        "class order",
        "class names are not 3 sorted",
    ),
    "count": (lambda d: change_manifest(d / "vae-sd", count=8), "unreadable", "holds 9 latents"),
    "no dataset.json": (lambda d: (d / "vae-sd/dataset.json").unlink(), "unreadable", r"vae-sd/dataset\.json"),
    "broken manifest": (lambda d: (d / "vae-sd/manifest.json").write_text("{"), "unreadable", "manifest.json"),
    "unfinished": (lambda d: (d / "vae-sd/.partial").mkdir(), "unfinished", "run its command again"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faults_of_the_folder_layout_are_found(fault, data):
    break_it, kind, named = FOLDER_FAULTS[fault]
    break_it(data)
    report = verify(data)
    assert kind in report.faults, report.lines()
    assert re.search(named, report.faults[kind][0])


def flip_byte(path, position=1000):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def swap_rows(folder):
    path = folder / "rows-00000.bin"
    content, size = path.read_bytes(), 8 * 4 * 4 * 2
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])


def relabel(folder, label):
    labels = np.load(folder / "labels.npy")
    labels[5] = label
    np.save(folder / "labels.npy", labels)


def put_nan(folder):
    """A NaN with the checksum made to match: found by its value."""
    path = folder / "rows-00001.bin"
    content = np.frombuffer(path.read_bytes(), np.float16).copy()
    content[130] = np.nan
    path.write_bytes(content.tobytes())
    change_json(folder / "manifest.json", lambda manifest: manifest["shards"][1].update(sha256=sha256_of_files(path)))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


PACKED_FAULTS = {
    "truncated shard": (lambda d: truncate(d / "rows-00001.bin"), "checksum", r"rows-00001\.bin"),
    "missing shard": (lambda d: (d / "rows-00001.bin").unlink(), "missing", r"rows-00001\.bin"),
    "flipped byte": (lambda d: flip_byte(d / "rows-00002.bin", 100), "checksum", r"rows-00002\.bin"),
    "swapped pair": (swap_rows, "checksum", r"rows-00000\.bin"),
    "label out of range": (lambda d: relabel(d, 3), "label range", "label 3 of 00000/img00000005.png"),
    "another label": (lambda d: relabel(d, 0), "checksum", r"labels\.npy"),
    "NaN": (put_nan, "not finite", "row 5 holds NaN"),
    "stray file": (lambda d: (d / "rows-00009.bin").write_bytes(b"x"), "stray file", r"rows-00009\.bin"),
    "names": (lambda d: flip_byte(d / "names.txt", 10), "checksum", r"names\.txt"),
    "VAE id": (lambda d: other_vae(d, vae="x/random-vae"), "wrong VAE", "x/random-vae"),
}


@pytest.mark.parametrize("fault", PACKED_FAULTS)
def test_faults_of_packed_data_are_found(fault, packed):
    break_it, kind, named = PACKED_FAULTS[fault]
    break_it(packed / "vae-sd")
    report = verify(packed)
    assert kind in report.faults, report.lines()
    assert re.search(named, report.faults[kind][0])


def test_a_swapped_pair_in_the_folder_layout_is_found_by_encoding_again(data):
    swap(data / LATENT.format(1), data / LATENT.format(2))
    assert verify(data).faults == {}
    report = verify(data, vae=tiny_vae())
    assert len(report.faults["pairs"]) == 2 and "00000/img00000001.png" in report.faults["pairs"][0]


def test_another_vae_is_found(data, tmp_path):
    renamed = shutil.copytree(tiny_vae(), tmp_path / "other-vae")
    assert verify(data, vae=renamed).faults == {}
    change_json(renamed / "config.json", lambda config: config.update(scaling_factor=0.5))
    report = verify(data, vae=renamed)
    assert len(report.faults["wrong VAE"]) == 2 and "VAE mismatch" in report.faults["wrong VAE"][0]


def test_latents_at_another_scale_are_found(data):
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, np.load(path) * 0.05)
    assert "statistics" in verify(data).faults


def test_a_mirrored_set_is_known_by_its_name_if_its_manifest_does_not_say(data):
    change_json(data / "vae-sd-mirror/manifest.json", lambda manifest: (manifest.pop("flipped"), manifest.pop("job")))
    assert verify(data, vae=tiny_vae()).faults == {}


def test_published_layout_without_manifests(tmp_path):
    folder = write_folder_layout(tmp_path / "data")
    write_images(folder / "images", [f"00000/img{i:08d}.png" for i in range(12)], side=32)
    assert verify(folder).faults == {}
    write_images(folder / "images", ["00000/stray.png"], side=32)
    assert "count" in verify(folder).faults


def test_fewer_images_than_latents_are_a_fault_beside_a_vae_too(tmp_path):
    folder = write_folder_layout(tmp_path / "data")
    write_images(folder / "images", [f"00000/img{i:08d}.png" for i in range(11)], side=32)
    assert {"count", "pairs"} <= verify(folder, str(tiny_vae())).faults.keys()  # made by no VAE


def test_exit_codes(data):
    def run(*arguments):
        return programs.run(TOOL, "verify", *arguments)

    good = run(data)
    assert good.returncode == 0 and "no fault found" in good.stdout
    (data / LATENT.format(4)).unlink()
    bad = run(data)
    assert bad.returncode == 1 and "FAULT missing (1)" in bad.stdout and "Traceback" not in bad.stderr
    nothing = run(data / "nothing")
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1
    with pytest.raises(InputError, match="holds no set"):
        verify(data.parent / "data/images/00000")
