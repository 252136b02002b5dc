"""latents/: what a manifest may say, names and labels on disk, and which folders are sets."""

import dataclasses
import json
import os

import numpy as np
import pytest
from data_helpers import SPEC, write_folder_layout

from common.errors import InputError
from latents.manifest import DataManifest, Shard
from latents.names import (
    NO_LABEL,
    Names,
    is_data,
    label_json,
    pack_names,
    parse_label_list,
    read_label_list,
    walk,
    walk_files,
)
from latents.sets import find_set, is_set, is_unfinished, list_sets
from models.specs import LatentSpec
from models.text import TextSpec

SHARDS = [{"file": "rows-00000.bin", "count": 4, "sha256": "a"}, {"file": "rows-00001.bin", "count": 1, "sha256": "b"}]
PACKED = {
    "format": "deepflow-data",
    "version": 1,
    "kind": "moments",
    "latents": {**SPEC, "encoder_sha256": "1" * 64, "decoder_sha256": "2" * 64},
    "flipped": False,
    "arithmetic": "fp32",
    "moments_shape": [8, 4, 4],
    "images": "f" * 64,
    "num_classes": 2,
    "class_names": ["cat", "dog"],
    "resolution": 16,
    "transform": "center-crop",
    "left_out": [["a.png", "the file is empty"]],
    "versions": {"numpy": "2"},
    "layout": "packed",
    "count": 5,
    "shape": [8, 4, 4],
    "dtype": "<f2",
    "shard_size": 4,
    "shards": SHARDS,
    "files": {"names.txt": "c"},
    "job": {"command": "encode", "source": "e" * 64},
}


def parse(**changes):
    return DataManifest.parse(json.dumps({**PACKED, **changes}).encode(), "DATA/manifest.json")


# ----------------------------------------------------------------------------------------------------------- manifest


def test_a_manifest_is_read_as_it_is_written():
    manifest = parse()
    assert manifest.latents == LatentSpec(**PACKED["latents"]) and manifest.moments_spec() is manifest.latents
    assert manifest.shards == tuple(Shard(**shard) for shard in SHARDS) and manifest.shape == (8, 4, 4)
    assert manifest.left_out == (("a.png", "the file is empty"),) and manifest.class_names == ("cat", "dog")
    assert manifest.is_packed and manifest.text is None and manifest.image_set == "f" * 64
    again = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(manifest, path=None))))
    assert {key: again[key] for key in PACKED if key != "format"} == {k: v for k, v in PACKED.items() if k != "format"}


def test_old_manifests_and_unknown_keys_are_read():
    assert parse(novelty={"a": 1}, latents={**SPEC, "hash": "x"}).latents == LatentSpec(**SPEC)
    old = DataManifest.parse(b'{"format": "deepflow-data", "count": 3}', "manifest.json")
    assert (old.count, old.layout, old.flipped, old.left_out, old.job) == (3, "folder", None, (), {})
    assert parse(images=None).image_set == "e" * 64
    assert parse(images=None, job={"command": "pack", "source": "x"}).image_set is None


def test_names_that_are_not_utf8_are_read():
    manifest = parse(class_names=["caf\udce9", "dog"], left_out=[["caf\udce9/1.png", "the file is empty"]])
    assert manifest.class_names[0] == "caf\udce9" and manifest.left_out[0][0] == "caf\udce9/1.png"


def test_text_and_encoder():
    manifest = parse(kind="captions", latents=None, text={"encoder": "x", "family": "x", "tokens": 7, "width": 3})
    assert manifest.text == TextSpec("x", "x", 7, 3)
    encoder = parse(kind="features", latents=None, encoder={"name": "dinov2-vit-b"}).encoder
    assert (encoder.name, encoder.weights) == ("dinov2-vit-b", None)


WRONG = {
    "version": "1",
    "count": -1,
    "kind": "moment",
    "layout": "zip",
    "num_classes": 10**12,
    "class_names": "cat",
    "resolution": 16.0,
    "transform": 3,
    "latents": {**SPEC, "scale": 0},
    "text": {"tokens": "77"},
    "encoder": {"weights": "x"},
    "flipped": "no",
    "shape": [8, True],
    "dtype": "<i4",
    "shard_size": None,
    "shards": [{"file": "../x", "count": 5, "sha256": ""}],
    "files": {"../names.txt": ""},
    "image_count": 0,
    "left_out": [["a"]],
    "versions": [],
    "job": "encode",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named_with_file_key_and_remedy(key):
    with pytest.raises(InputError, match=rf"DATA/manifest\.json.*'{key}[.'].* again") as caught:
        parse(**{key: WRONG[key]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [[], [1.0] * 3, [1.0, 1.0, 1.0, 0.0], "much"])
def test_a_scale_is_one_number_or_one_for_each_channel(scale):
    each = {**SPEC, "scale": [1.0, 2.0, 3.0, 4.0], "shift": [0.0, 1.0, 0.0, -1.0]}
    spec = parse(latents=each).latents
    assert (spec.scale, spec.shift) == ((1.0, 2.0, 3.0, 4.0), (0.0, 1.0, 0.0, -1.0))
    with pytest.raises(InputError, match=r"DATA/manifest\.json.*scale.* again") as caught:
        parse(latents={**SPEC, "scale": scale})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", [SHARDS[:1], [SHARDS[1], SHARDS[0]], [{**SHARDS[0], "count": 5}, SHARDS[1]]])
def test_shards_must_add_up(shards):
    with pytest.raises(InputError, match="'shards' do not add up"):
        parse(shards=shards)


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a/b", "a\\b", "a\0b"])
def test_shards_lie_in_the_folder(name):
    with pytest.raises(InputError, match=r"manifest\.json.*'shards\.0\.file'.* again"):
        parse(shards=[{**SHARDS[0], "file": name}, SHARDS[1]])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": "other", "count": 1}'])
def test_what_is_no_manifest_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        DataManifest.read(tmp_path)


def test_a_newer_format_says_so_before_anything_else():
    with pytest.raises(InputError, match=r"format version 2.*update the code"):
        parse(version=2, layout="new")


def test_moments_spec_of_other_kinds_is_refused():
    with pytest.raises(InputError, match="does not say which VAE"):
        parse(latents=None).moments_spec()
    with pytest.raises(InputError, match="features data, not VAE moments"):
        parse(latents=None, kind="features").moments_spec()


# ------------------------------------------------------------------------------------------------------- dataset.json

ODD = ["0", "a/b", "a b", "Z", "\U0001f600", 'qu"ote', "ü", "a\udc80/x"]


def test_labels_are_written_as_json_writes_them_and_read_again():
    labels = np.arange(len(ODD)) - 2
    data = label_json(ODD, labels)
    pairs = list(zip(ODD, labels.tolist(), strict=True))
    assert data == json.dumps({"labels": pairs}).encode()
    names, again = parse_label_list(data, "dataset.json")
    assert names == sorted(ODD) and again.dtype == np.int64
    assert dict(zip(names, again.tolist(), strict=True)) == dict(pairs)
    assert label_json([], []) == b'{"labels": []}'


def test_one_image_without_a_label_makes_the_list_null():
    data = label_json(["a", "b"], [0, NO_LABEL])
    assert data == b'{"labels": null}' and parse_label_list(data, "dataset.json") == (None, None)


def test_names_are_sorted_and_a_byte_order_mark_is_skipped():
    names, labels = parse_label_list('\ufeff{"x": [1], "labels": [["b", 1], ["a", 2], ["c", 3]]}'.encode(), "x")
    assert names == ["a", "b", "c"] and labels.tolist() == [2, 1, 3]


def test_null_labels_are_for_sources_only(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": [["b", null], ["a", 2]]}')
    assert parse_label_list((tmp_path / "dataset.json").read_bytes(), "x")[1].tolist() == [2, NO_LABEL]
    with pytest.raises(InputError, match=r"dataset\.json: the label of b is null"):
        read_label_list(tmp_path)


BROKEN = ["", "{", '{"labels": [1,]}', "[" * 100_000, "[1]", "{}", '{"labels": 3}', '{"labels": [["a"]]}']
BROKEN += ['{"labels": [5]}', '{"labels": [["a", "0"]]}', '{"labels": [["a", true]]}', '{"labels": [["a", 1.0]]}']
NO_NAMES = ("", "/a", "../a", "a/../../b", "a/..", r"a\u0000b", r"\ud800.png")
BROKEN += [f'{{"labels": [["{name}", 1]]}}' for name in NO_NAMES]
BROKEN += ['{"labels": [["a", 1], ["b", 1], ["a", 2]]}', f'{{"labels": [["a", {10**12}]]}}']
BROKEN += [f'{{"labels": [["a", {2**63}]]}}', f'{{"labels": [["a", {-(2**63)}]]}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_list_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json.*; (restore|prepare)") as caught:
        read_label_list(tmp_path)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- names and folders


def test_names_are_padded_to_one_width_and_read_by_index(tmp_path):
    names = ["a", "longer/name.png", "ü", "a\udc80"]
    (tmp_path / "names.txt").write_bytes(pack_names(names))
    (tmp_path / "other.txt").write_bytes(pack_names([*names[1:], "a"]))
    assert (tmp_path / "names.txt").read_bytes().startswith(b"a              \nlonger/name.png\n")
    found = Names(tmp_path / "names.txt", 4)
    assert list(found) == names and found.same(found) and not found.same(Names(tmp_path / "other.txt", 4))
    assert pack_names([]) == b""
    with pytest.raises(InputError, match="line break"):
        pack_names(["a", "b\nc"])


def test_walk_follows_links_but_not_back_to_a_parent(tmp_path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path, size in ((root / "a/b/1.PNG", 3), (root / "2.txt", 0), (tmp_path / "elsewhere/3.png", 5)):
        path.write_bytes(b"x" * size)
    os.symlink(root, root / "a/back")
    os.symlink(tmp_path / "elsewhere", root / "z")
    os.symlink(root / "loop", root / "loop")
    os.symlink(root / "nothing", root / "a/gone.png")
    for left in (".hidden.png", "a/__MACOSX", "lost+found"):
        (root / left).write_bytes(b"")
    files = sorted((name, size, changed) for name, (size, changed) in walk(root))
    assert [file[:2] for file in files] == [("2.txt", 0), ("a/b/1.PNG", 3), ("z/3.png", 5)]
    assert files[1][2] == (root / "a/b/1.PNG").stat().st_mtime_ns
    assert walk_files(root, {".png"}) == ["a/b/1.PNG", "z/3.png"]


DATA = ("a.png", "a/b.png", "__a__/x.npy", "a.b/c", "macosx/x.png", "Thumbs/x.png")
LEFT = (".a.png", "a/._b.png", ".git/x.png", "__MACOSX/a.png", "a/@eaDir/x.png", "THUMBS.DB", "lost+found/x.npy")


def test_what_systems_leave_behind_is_no_data():
    assert [name for name in DATA + LEFT if is_data(name)] == list(DATA)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing cannot be read"):
        list(walk(tmp_path / "nothing"))


def test_sets_of_a_data_folder(tmp_path):
    data = write_folder_layout(tmp_path / "data")
    (data / "images").mkdir()
    (data / "text/.partial").mkdir(parents=True)
    assert is_set(data / "vae-sd") and not is_set(data) and not is_set(data / "text") and is_unfinished(data / "text")
    assert list_sets(data) == [data / "text", data / "vae-sd"]
    assert list_sets(data / "vae-sd") == [data / "vae-sd"] and list_sets(data / "text") == [data / "text"]
    assert find_set(data, "vae-sd") == find_set(data / "vae-sd", "vae-sd") == data / "vae-sd"
    with pytest.raises(InputError, match="text is not finished"):
        find_set(data, "text")
