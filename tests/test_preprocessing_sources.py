"""ImageSource: odd and unreadable images, classes, and zips as others write them."""

import io
import json
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_helpers import photo, write_class_folders
from PIL import Image

import preprocessing.sources
from common.errors import InputError
from latents.names import NO_LABEL, label_json, pack_names
from preprocessing.sources import BadImageError, ImageSource, decode


def to_bytes(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- odd images


def deep_rgb_png(values):
    """Bytes of a 1-pixel PNG with three 16-bit samples; Pillow cannot write one."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head, body = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + struct.pack(">HHH", *values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def grey16(value):
    return Image.fromarray(np.full((2, 2), value, np.uint16))


def palette(**options):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return to_bytes(image, "PNG", **options)


def animation():
    frames = [Image.new("RGB", (2, 2), color) for color in ((10, 20, 30), (200, 0, 0))]
    return to_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to display
    image = Image.new("RGB", (4, 2), (10, 20, 30))
    return to_bytes(image, "PNG", exif=exif)


ODD_IMAGES = {
    "grayscale": (to_bytes(Image.new("L", (2, 2), 77)), (77, 77, 77)),
    "one bit": (to_bytes(Image.new("1", (2, 2), 1)), (255, 255, 255)),
    "palette": (palette(), (10, 20, 30)),
    "palette with transparency": (palette(transparency=1), (10, 20, 30)),
    "alpha is dropped": (to_bytes(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), (10, 20, 30)),
    "grayscale with alpha": (to_bytes(Image.new("LA", (2, 2), (77, 5))), (77, 77, 77)),
    "first frame": (animation(), (10, 20, 30)),
    "16-bit grey PNG": (to_bytes(grey16(0x4D12)), (0x4D, 0x4D, 0x4D)),
    "16-bit grey TIFF": (to_bytes(grey16(0x4D12), "TIFF"), (0x4D, 0x4D, 0x4D)),
    "16-bit RGB": (deep_rgb_png((0x0AFF, 0x1400, 0x1E80)), (10, 20, 30)),
    "EXIF rotation is ignored": (rotated(), (10, 20, 30)),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_have_their_stated_treatment(kind):
    data, color = ODD_IMAGES[kind]
    image = decode(data)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == color
    if kind.startswith("EXIF"):
        assert image.size == (4, 2)


UNREADABLE = {
    "zero bytes": (b"", "the file is empty"),
    "text": (b"<html>Not found</html>", "no image format that Pillow knows"),
    "truncated JPEG": (to_bytes(photo(0, 64, 64), "JPEG")[:700], "truncated"),
    "truncated PNG": (to_bytes(photo(0, 64, 64))[:-200], "truncated"),
    "damaged PNG": (to_bytes(photo(0, 64, 64)).replace(b"IDAT", b"IDAX"), "."),
    "32-bit float": (to_bytes(Image.new("F", (2, 2), 0.5), "TIFF"), "32-bit samples have no stated range"),
    "32-bit integer": (to_bytes(Image.new("I", (2, 2), 70000), "TIFF"), "32-bit samples"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_say_why(kind):
    data, reason = UNREADABLE[kind]
    with pytest.raises(BadImageError, match=reason):
        decode(data)


# ------------------------------------------------------------------------------------------------------- classes


def test_hundreds_of_classes_sort_as_text(tmp_path):
    for c in range(300):
        (tmp_path / f"source/{c}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (c % 256, 0, 0)).save(tmp_path / f"source/{c}/x.png")
    source = ImageSource(tmp_path / "source")
    assert source.class_names == sorted(map(str, range(300))) and source.labels.tolist() == list(range(300))


def test_a_folder_that_links_to_its_parent_ends(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2)
    (source / "n0000/loop").symlink_to(source)
    assert len(ImageSource(source)) == 8


@pytest.mark.parametrize("text", ["[1]", "{}", '{"labels": [1]}', '{"labels": [["n0000/0.JPEG", 1.5]]}', "{"])
def test_a_damaged_dataset_json_is_named(text, tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2)
    (source / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"source/dataset\.json"):
        ImageSource(source)


def test_labels_of_a_dataset_json_are_numbers_from_zero(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1, per_class=2)
    (source / "dataset.json").write_bytes(label_json(["n0000/1.png", "n0000/0.JPEG", "gone.png"], [3, 0, 7]))
    assert ImageSource(source).labels.tolist() == [0, 3] and ImageSource(source).num_classes == 4
    (source / "dataset.json").write_bytes(label_json(["n0000/1.png"], [-1]))
    with pytest.raises(InputError, match="integers from 0"):
        ImageSource(source)


LEFT_BEHIND = ("__MACOSX/{}/._0.png", ".ipynb_checkpoints/{}.png", "@eaDir/{}/x.png", "{}/.thumbs/x.png", "{}/._1.png")
LEFT_BEHIND += ("lost+found/{}.png", "$RECYCLE.BIN/{}.png", "Thumbs.db/{}.png", "{}/DESKTOP.INI/x.png")


@pytest.mark.parametrize("kind", ["folder", "zip", "folder of a zip"])
def test_what_systems_leave_behind_is_neither_image_nor_class(kind, tmp_path):
    image, names = to_bytes(Image.new("RGB", (2, 2))), ["ant/0.png", "bee/0.png", "__bee__/x.png"]
    content = [name.format(folder) for name in LEFT_BEHIND for folder in ("ant", "bee")] + names
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in content:
            archive.writestr(f".hidden/{name}" if kind == "folder of a zip" else name, image)
    place = {"zip": tmp_path / "a.zip", "folder": tmp_path / "a"}.get(kind, f"{tmp_path}/a.zip:.hidden/")
    if kind == "folder":
        zipfile.ZipFile(tmp_path / "a.zip").extractall(place)
    source = ImageSource(place)
    assert source.names == sorted(names) and source.class_names == ["__bee__", "ant", "bee"]
    assert source.read(0).size == (2, 2)


def test_names_in_a_zip_as_some_tools_write_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("./ant/0.png", "/bee/0.png", "cat\\0.png", "../dog/0.png"):
            archive.writestr(name, to_bytes(Image.new("RGB", (2, 2))))
    assert ImageSource(tmp_path / "a.zip").names == ["ant/0.png", "bee/0.png", "cat/0.png"]
    with pytest.raises(InputError, match=r"a\.zip:ape holds no images"):
        ImageSource(f"{tmp_path}/a.zip:ape")


def test_links_to_nothing_and_to_themselves_are_no_images(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1)
    (source / "n0000/gone.png").symlink_to(tmp_path / "gone.png")
    (source / "n0000/loop.png").symlink_to(source / "n0000/loop.png")
    os.mkfifo(source / "n0000/pipe.png")
    assert len(ImageSource(source)) == 4


def test_images_and_labels_that_do_not_meet_are_counted(tmp_path, capsys):
    source = write_class_folders(tmp_path / "source", classes=1, per_class=3)
    (source / "dataset.json").write_bytes(label_json(["n0000/1.png", "gone.png", "n0000/x.png"], [3, 0, 7]))
    assert ImageSource(source).labels.tolist().count(NO_LABEL) == 2
    printed = capsys.readouterr().err
    assert "2 images without a label, the first is n0000/0.JPEG" in printed
    assert "2 labels without an image, the first is gone.png" in printed


@pytest.mark.parametrize(
    "labels", [[["../a.png", 0]], [["/a.png", 0]], [["a/../../b.png", 0]], [["a.png", 0]] * 2, [["a.png", 10**12]]]
)
def test_names_and_labels_of_a_dataset_json_that_make_no_sense(labels, tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1)
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(InputError, match=r"source/dataset\.json"):
        ImageSource(source)


def test_a_source_without_images_or_half_filled_is_refused(tmp_path):
    (tmp_path / "n01440764.tar").touch()
    for path, fault in ((tmp_path, "holds no images"), (tmp_path / "n01440764.tar", "is neither a folder nor a .zip")):
        with pytest.raises(InputError, match=rf"--source {path} {fault}.* unpack tar files"):
            ImageSource(path)
    source = write_class_folders(tmp_path / "source")
    (source / ".partial").mkdir()
    with pytest.raises(InputError, match="source is not finished; run the same"):
        ImageSource(source, published_labels=True)


def test_a_line_break_in_a_name_is_noticed_first(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1)
    (source / "n0000/0.JPEG").rename(source / "n0000/a\nb.png")
    with pytest.raises(InputError, match=r"a\\nb\.png.*rename"):
        ImageSource(source)


# ---------------------------------------------------------------------------------------------------------- zips

CONTENT = {f"c{k % 3}/ü{k}.png": random.Random(k).randbytes(50 * k) for k in range(12)}


def write_zip(path, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in CONTENT.items():
            archive.writestr(name, data)
    return path


def read_zip(path):
    source = ImageSource(path)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(source.names, pool.map(source._read, source.names), strict=True))
    assert [size for size, _ in source._versions] == [len(data) for data in found.values()]
    return found


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zips_of_others_are_read_by_several_threads(compression, tmp_path):
    path = write_zip(tmp_path / "a.zip", compression=compression)
    assert read_zip(path) == CONTENT
    path.write_bytes(b"#!/bin/sh\n" * 10 + path.read_bytes())  # as zips that unpack themselves begin
    assert read_zip(path) == CONTENT


@pytest.mark.parametrize("published_labels", [False, True])
def test_a_zip_of_moments_is_refused_as_what_it_is(published_labels, tmp_path):
    """As others' preprocessing writes it, vae-sd.zip."""
    names = [f"0000{i}/img-mean-std-0000000{i}.npy" for i in range(2)]
    with zipfile.ZipFile(tmp_path / "vae-sd.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
        archive.writestr("dataset.json", label_json(names, np.arange(2)))
    with pytest.raises(InputError, match=r"--source .*vae-sd\.zip holds arrays \(\.npy\).*unpack .*DATA/vae-sd.*pack"):
        ImageSource(tmp_path / "vae-sd.zip", published_labels)
    zipfile.ZipFile(tmp_path / "vae-sd.zip").extractall(tmp_path / "vae-sd")
    with pytest.raises(InputError, match=r"vae-sd holds arrays"):
        ImageSource(tmp_path / "vae-sd", published_labels)


def test_zips_of_many_members_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 4)  # from here on the directory is that of zip64
    path = write_zip(tmp_path / "a.zip")
    assert b"PK\6\6" in path.read_bytes() and read_zip(path) == CONTENT


def test_of_equal_names_the_last_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("a.png", to_bytes(Image.new("RGB", (2, 2), "red")))
        with pytest.warns(UserWarning):
            archive.writestr("a.png", to_bytes(Image.new("RGB", (3, 3), "blue")))
        archive.comment = b"a comment " * 100
    source = ImageSource(tmp_path / "a.zip")
    assert source.names == ["a.png"] and source.read(0).size == (3, 3)


def change_directory(path, offset, value):
    """Overwrite two bytes in the first directory entry, and in its local header."""
    content = bytearray(path.read_bytes())
    for start, shift in ((content.index(b"PK\1\2"), 2), (0, 0)):
        content[start + offset + shift : start + offset + shift + 2] = value
    path.write_bytes(content)


@pytest.mark.parametrize(("offset", "value"), [(6, b"\x01\x08"), (8, b"\x61\x00")], ids=["encrypted", "unknown method"])
def test_members_that_cannot_be_read_are_bad_images(offset, value, tmp_path):
    path = write_zip(tmp_path / "a.zip")
    change_directory(path, offset, value)
    with pytest.raises(BadImageError, match="unreadable in the zip"):
        ImageSource(path).read(0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_are_bad_images(compression, tmp_path):
    path = write_zip(tmp_path / "a.zip", compression=compression)
    content = bytearray(path.read_bytes())
    at = content.index(list(CONTENT)[-1].encode()) + 30
    content[at + 8 : at + 60] = bytes(52)
    path.write_bytes(content)
    source = ImageSource(path)
    with pytest.raises(BadImageError, match="unreadable in the zip"):
        source.read(source.names.index(list(CONTENT)[-1]))


def test_a_truncated_zip_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a\.zip is not a readable zip"):
        ImageSource(path)


# -------------------------------------------------------------------------------------------------------- memory


def test_memory_of_names_and_labels(tmp_path, monkeypatch):
    """ImageNet's 1,281,167 images under 2 GB: at most 1,500 bytes per image."""
    count = 5000
    names = [f"n{k % 100:08d}/{k:08d}.JPEG" for k in range(count)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    monkeypatch.setattr(
        preprocessing.sources, "walk", lambda _: ((name, (7, 10**18 + k)) for k, name in enumerate(names))
    )
    ImageSource(tmp_path)  # what is made once and stays
    tracemalloc.start()
    for path in (tmp_path, tmp_path / "a.zip"):
        tracemalloc.reset_peak()
        source = ImageSource(path)
        source.fingerprint()
        written = label_json(source.names, source.labels), pack_names(source.names)
        assert len(source) == count and written and tracemalloc.get_traced_memory()[1] < 1500 * count
        del source, written
    tracemalloc.stop()
