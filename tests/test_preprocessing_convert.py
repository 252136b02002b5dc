"""convert: published layout and labels, odd images, zips, formats, several workers, one line per mistake."""

import errno
import json
import multiprocessing
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import programs
import pytest
from data_helpers import photo, tree, write_class_folders
from PIL import Image

import preprocessing.convert
import preprocessing.sources
import preprocessing.transforms
from common.errors import InputError
from latents.names import NO_LABEL
from preprocessing.convert import convert
from preprocessing.jobs import Job
from preprocessing.options import ConvertFlags
from preprocessing.sources import ImageSource
from preprocessing.transforms import center_crop, center_crop_wide, plain_resize

TOOL = Path(__file__).parent.parent / "preprocessing/dataset_tools.py"


def run_tool(*arguments):
    return programs.run(TOOL, *arguments)


def published_convert(source, dest, side):
    """The published rules, written down independently and slowly: names, order, labels, pixels."""
    files = [os.path.join(root, name) for root, _, names in os.walk(source, followlinks=True) for name in names]
    Image.init()
    files = sorted(f for f in files if "." + f.split(".")[-1].lower() in Image.EXTENSION)
    top = {f: os.path.relpath(f, source).split("/")[0] for f in files}
    index = {name: i for i, name in enumerate(sorted(set(top.values())))}
    labels = []
    for i, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        while min(*image.size) >= 2 * side:
            image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
        scale = side / min(*image.size)
        image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
        pixels = np.array(image)
        y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        name = f"{i:08d}"
        path = Path(dest) / name[:5] / f"img{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[y : y + side, x : x + side]).save(path, format="PNG", compress_level=0)
        labels.append([f"{name[:5]}/img{name}.png", index[top[file]]])
    (Path(dest) / "dataset.json").write_text(json.dumps({"labels": labels}))


def write_tree(root):
    """A source with nested folders, capital extensions, files that are no images, and a linked class folder."""
    for seed, (name, size) in enumerate(
        {
            "n02/deep/er/b.JPEG": (70, 40),
            "n02/a.png": (33, 90),
            "n01/z.PNG": (16, 16),
            "n01/10.bmp": (200, 100),
            "n01/2.webp": (31, 64),
            "n10/only.jpg": (5, 9),
            "readme.txt": None,
            "n01/notes.txt": None,
        }.items()
    ):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed, *size).save(path) if size else path.write_text("not an image")
    other = Path(root).parent / "elsewhere"
    other.mkdir()
    photo(99, 40, 41).save(other / "linked.png")
    (Path(root) / "n07").symlink_to(other)
    return Path(root)


# ----------------------------------------------------------------------------------------- the published layout


@pytest.mark.parametrize("workers", [1, 2])
def test_same_names_labels_and_pixels_as_the_published_rules(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing.convert, "CHUNK", 3)
    source = write_tree(tmp_path / "source")
    published_convert(source, tmp_path / "theirs", 16)
    convert(ConvertFlags(source, tmp_path / "ours", (16, 16), "center-crop-dhariwal", workers=workers))
    assert (tmp_path / "ours/dataset.json").read_bytes() == (tmp_path / "theirs/dataset.json").read_bytes()
    images = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.png"))
    assert images == sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.png"))
    assert len(images) == 7
    for name in images:
        ours, theirs = Image.open(tmp_path / "ours" / name), Image.open(tmp_path / "theirs" / name)
        assert ours.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_manifest_says_what_was_made(tmp_path):
    source = write_tree(tmp_path / "source")
    convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal"))
    manifest = json.loads((tmp_path / "dest/manifest.json").read_text())
    assert manifest["class_names"] == ["n01", "n02", "n07", "n10"] and manifest["num_classes"] == 4
    assert (manifest["count"], manifest["resolution"], manifest["transform"]) == (7, 16, "center-crop-dhariwal")
    names = (tmp_path / "dest/names.txt").read_text().split("\n")
    assert [name.rstrip() for name in names[:2]] == ["n01/10.bmp", "n01/2.webp"]


def test_a_second_run_does_nothing(tmp_path, capsys):
    source = write_class_folders(tmp_path / "source")
    arguments = (source, tmp_path / "dest", (16, 16), "center-crop-dhariwal")
    convert(ConvertFlags(*arguments))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "dest").rglob("*")}
    convert(ConvertFlags(*arguments))
    assert "nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "dest").rglob("*")}


def test_another_job_or_foreign_files_are_refused(tmp_path):
    source = write_class_folders(tmp_path / "source")
    convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal"))
    with pytest.raises(InputError, match=r"holds another result \(resolution: \[16, 16\] there, \[8, 8\] now\)"):
        convert(ConvertFlags(source, tmp_path / "dest", (8, 8), "center-crop-dhariwal"))
    photo(0, 9, 9).save(source / "n0000/new.png")
    with pytest.raises(InputError, match=r"holds another result \(source"):
        convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"--dest folder must be empty: .*; name another"):
        convert(ConvertFlags(source, tmp_path / "full", (16, 16), "center-crop-dhariwal"))
    assert Job(tmp_path / "fresh", {}).begin()
    with pytest.raises(InputError, match="half filled by another command"):
        convert(ConvertFlags(source, tmp_path / "fresh", (16, 16), "center-crop-dhariwal"))


def test_one_class_has_null_labels_as_published_and_counts_as_one(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1)
    convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal"))
    assert (tmp_path / "dest/dataset.json").read_text() == '{"labels": null}'
    assert json.loads((tmp_path / "dest/manifest.json").read_text())["num_classes"] == 1
    again = ImageSource(tmp_path / "dest")
    assert again.num_classes == 1 and again.labels.tolist() == [NO_LABEL] * 4 and again.class_names == ["n0000"]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(preprocessing.convert, "CHUNK", 3)


def half_convert(source, dest):
    """Convert until an unreadable image at position 7 (chunk 2) ends it; returns the flags."""
    bad = sorted(source.glob("*/*"))[7]
    content = bad.read_bytes()
    bad.write_bytes(content[:200])
    options = ConvertFlags(source, dest, (16, 16), workers=1)
    with pytest.raises(InputError, match=bad.name):
        convert(options)
    bad.write_bytes(content)
    return options


def repair(source):
    photo(50, 20, 24).save(source / "n0000/1.png")


def remove(source):
    (source / "n0002/3.png").unlink()
    (source / "n0002/2.JPEG").unlink()


def add(source):
    photo(51, 20, 24).save(source / "n0001/0.png")


def add_first(source):
    photo(52, 20, 24).save(source / "n0000/+.png")


def remove_all_after_the_second_chunk(source):
    for path in sorted(source.glob("*/*"))[6:]:  # position 6 is written, its chunk is not finished
        path.unlink()


def remove_most(source):
    for path in (*sorted(source.glob("n0001/*"))[1:], *source.glob("n0002/*")):
        path.unlink()


@pytest.mark.parametrize("change", [repair, remove, add, add_first, remove_most, remove_all_after_the_second_chunk])
def test_after_images_were_repaired_added_or_removed_only_their_chunks_are_redone(
    change, tmp_path, small_chunks, monkeypatch
):
    source = write_class_folders(tmp_path / "source")
    options = half_convert(source, tmp_path / "dest")
    change(source)
    done, put = [], Job.put
    monkeypatch.setattr(Job, "put", lambda job, name, *rest, **more: (done.append(name), put(job, name, *rest, **more)))
    convert(options)
    convert(ConvertFlags(source, tmp_path / "fresh", (16, 16), workers=1))
    assert tree(tmp_path / "dest") == tree(tmp_path / "fresh")
    kept = 3 if change is repair else 0  # the first image of an unchanged chunk
    assert (f"00000/img{kept:08d}.png" in done[: done.index("names.txt")]) == (change is add_first)


def test_an_image_that_is_put_back_is_converted_again(tmp_path, small_chunks, monkeypatch):
    source = write_class_folders(tmp_path / "source")
    options = half_convert(source, tmp_path / "dest")
    (source / "n0000/0.JPEG").rename(tmp_path / "away.JPEG")
    half_convert(source, tmp_path / "dest")
    (tmp_path / "away.JPEG").rename(source / "n0000/0.JPEG")
    convert(options)
    convert(ConvertFlags(source, tmp_path / "fresh", (16, 16), workers=1))
    assert tree(tmp_path / "dest") == tree(tmp_path / "fresh")


def test_a_destination_in_the_source_is_refused(tmp_path):
    source = write_class_folders(tmp_path / "source")
    with pytest.raises(InputError, match=r"--dest .*converted lies in --source.*; name another"):
        convert(ConvertFlags(source, source / "converted", (16, 16)))
    assert not (source / "converted").exists()


def test_a_half_filled_folder_is_not_filled_from_elsewhere(tmp_path, small_chunks):
    source, other = (write_class_folders(tmp_path / name, classes=3) for name in ("source", "other"))
    half_convert(source, tmp_path / "dest")
    for path in sorted(other.glob("*/*")):
        path.rename(path.with_stem(f"other{path.stem}"))
    with pytest.raises(InputError, match=r"--dest .*dest is half filled with other images"):
        convert(ConvertFlags(other, tmp_path / "dest", (16, 16), workers=1))


def test_the_end_says_what_was_made_and_splits_are_warned_about(tmp_path, capsys):
    source = write_class_folders(tmp_path / "data/train")
    shutil.copytree(source, tmp_path / "data/val")
    convert(ConvertFlags(tmp_path / "data", tmp_path / "whole", (16, 16)))
    printed = capsys.readouterr().err
    assert "warning: train, val in" in printed and f"--source {tmp_path}/data/train" in printed
    nested = zip_of(tmp_path, tmp_path.with_name("nested.zip"))
    convert(ConvertFlags(f"{nested}:data", tmp_path / "nested", (16, 16)))
    assert f"--source {nested}:data/train takes" in capsys.readouterr().err
    packed = zip_of(tmp_path / "data", tmp_path / "data.zip")
    convert(ConvertFlags(f"{packed}:train", tmp_path / "dest", (16, 16)))
    printed = capsys.readouterr().err
    assert "dest: 12 images, 0 left out, classes: 3 (n0000 … n0002)" in printed and "warning" not in printed


# ------------------------------------------------------------------------------------------------- zips, formats


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_zip_in_and_zip_out_hold_what_folders_hold(workers, tmp_path):
    source = write_class_folders(tmp_path / "source", per_class=30)
    convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal"))
    packed = zip_of(source, tmp_path / "source.zip")
    convert(ConvertFlags(packed, tmp_path / "dest.zip", (16, 16), "center-crop-dhariwal", workers=workers))
    with zipfile.ZipFile(tmp_path / "dest.zip") as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # no trace of the moment
        found = {name: archive.read(name) for name in archive.namelist()}
    folder = tmp_path / "dest"
    assert set(found) == set(tree(folder))
    assert all(found[name] == (folder / name).read_bytes() for name in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "dest.zip", "source", "source.zip"]


def test_zip_out_is_idempotent_and_refuses_other_files(tmp_path, capsys):
    source = write_class_folders(tmp_path / "source", classes=2)
    for _ in range(2):
        convert(ConvertFlags(source, tmp_path / "dest.zip", (16, 16), "center-crop-dhariwal"))
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds something else; name another"):
        convert(ConvertFlags(source, tmp_path / "dest.zip", (8, 8), "center-crop-dhariwal"))
    (tmp_path / "folder.zip").mkdir()
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("folder.zip", "pipe.zip"):
        with pytest.raises(OSError, match=r"directory|regular"):  # before anything is converted
            convert(ConvertFlags(source, tmp_path / name, (16, 16)))
        assert not (tmp_path / f"{name}.work").exists()


def test_broken_zip_is_named(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"bad\.zip is not a readable zip"):
        convert(ConvertFlags(tmp_path / "bad.zip", tmp_path / "dest", (8, 8)))


def test_lossless_formats_have_the_same_pixels(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2, size=(80, 60))
    for image_format in ("png", "webp-lossless", "jpeg"):
        convert(ConvertFlags(source, tmp_path / image_format, (32, 32), "center-crop-dhariwal", format=image_format))
    for k in range(8):
        png, webp, jpeg = (
            np.asarray(Image.open(tmp_path / folder / f"00000/img{k:08d}{suffix}")).astype(int)
            for folder, suffix in (("png", ".png"), ("webp-lossless", ".webp"), ("jpeg", ".jpg"))
        )
        np.testing.assert_array_equal(png, webp)
        assert 0 < abs(png - jpeg).max() < 40


# ---------------------------------------------------------------------------------------------------- transforms


def test_center_crop_takes_the_middle_square():
    pixels = np.zeros((10, 21, 3), np.uint8)
    pixels[:, 5:15] = 200  # columns (21 − 10)//2 = 5 … 14
    assert (np.asarray(center_crop(Image.fromarray(pixels), 10, 10)) == 200).all()
    assert center_crop(Image.fromarray(pixels), 4, 8).size == (4, 8)


def test_center_crop_wide_crops_rows_and_pads_black():
    pixels = np.full((12, 20, 3), 9, np.uint8)
    pixels[3:9] = 200  # rows kept: round(10·12/20) = 6, from (12 − 6)//2 = 3
    result = np.asarray(center_crop_wide(Image.fromarray(pixels), 10, 6))
    assert result.shape == (10, 10, 3)
    assert (result[2:8] == 200).all() and not result[:2].any() and not result[8:].any()
    assert center_crop_wide(Image.fromarray(pixels), 21, 6) is None
    assert center_crop_wide(Image.fromarray(pixels), 10, 7) is None


def test_images_too_small_for_wide_leave_holes_in_the_numbering(tmp_path):
    for k, size in enumerate([(16, 16), (8, 8), (16, 16)]):
        (tmp_path / f"source/c{k}").mkdir(parents=True)
        photo(k, *size).save(tmp_path / f"source/c{k}/x.png")
    convert(ConvertFlags(tmp_path / "source", tmp_path / "dest", (16, 16), "center-crop-wide"))
    labels = json.loads((tmp_path / "dest/dataset.json").read_text())["labels"]
    assert labels == [["00000/img00000000.png", 0], ["00000/img00000002.png", 2]]


def test_plain_resize_keeps_equal_sizes():
    image = photo(1, 16, 16)
    np.testing.assert_array_equal(np.asarray(plain_resize(image, 16, 16)), np.asarray(image))


def test_the_published_crop_is_the_default(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=1, per_class=1, size=(20, 40))
    found = {}
    for transform in (None, "center-crop-dhariwal", "resize"):
        dest = tmp_path / str(transform)
        convert(ConvertFlags(source, dest, (16, 16), transform))
        said = json.loads((dest / "manifest.json").read_text())["transform"]
        found[transform] = said, (dest / "00000/img00000000.png").read_bytes()
    assert found[None] == found["center-crop-dhariwal"] and found["resize"][0] == "resize"
    assert found["resize"][1] != found[None][1]


@pytest.mark.parametrize(
    ("resolution", "transform", "message"),
    [
        (None, "center-crop", "--transform center-crop needs --resolution"),
        ((16, 8), "center-crop-dhariwal", "needs equal sides"),
        ((16, 8), "center-crop", "becomes 16x8; --resolution must lead to a square"),
        ((24, 24), "center-crop", "becomes 24x24"),
        (None, None, "becomes 20x24"),
    ],
)
def test_sizes_that_training_cannot_use_are_refused(resolution, transform, message, tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2)
    with pytest.raises(InputError, match=message):
        convert(ConvertFlags(source, tmp_path / "dest", resolution, transform))
    assert not (tmp_path / "dest/manifest.json").exists()


def test_images_of_different_sizes_are_refused(tmp_path):
    for k, side in enumerate([8, 16]):
        (tmp_path / f"source/c{k}").mkdir(parents=True)
        photo(k, side, side).save(tmp_path / f"source/c{k}/x.png")
    with pytest.raises(InputError, match="becomes 16x16, others 8x8; give --resolution"):
        convert(ConvertFlags(tmp_path / "source", tmp_path / "dest"))


# --------------------------------------------------------------------------------------------- unreadable images


def test_unreadable_images_stop_or_are_listed_and_left_out(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2, per_class=2)
    (source / "n0000/1.png").write_bytes(b"<html>Not found</html>")
    arguments = (source, tmp_path / "dest", (16, 16), "center-crop-dhariwal")
    with pytest.raises(InputError, match=r"n0000/1\.png cannot be read .*--skip-bad"):
        convert(ConvertFlags(*arguments))
    assert not (tmp_path / "dest/manifest.json").exists()
    convert(ConvertFlags(*arguments, skip_bad=True))  # resumes in the same folder
    left_out = json.loads((tmp_path / "dest/manifest.json").read_text())["left_out"]
    assert [name for name, _ in left_out] == ["n0000/1.png"]
    labels = json.loads((tmp_path / "dest/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 1, 1]


def test_everything_that_cannot_be_read_is_skipped(tmp_path, monkeypatch):
    source = write_class_folders(tmp_path / "source", classes=2, per_class=3)
    Image.new("L", (1, 60_000)).save(source / "n0000/thin.png")  # its crop would be 16 × 960,000
    monkeypatch.setattr(preprocessing.transforms, "LARGEST", 10**6)
    with open(source / "n0000/huge.png", "wb") as file:
        file.truncate(preprocessing.sources.LARGEST + 1)
    (source / "junk").mkdir()
    (source / "junk/x.png").write_text("<html>")
    read = Path.read_bytes

    def denied(path):
        if path.name == "2.JPEG":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    convert(ConvertFlags(source, tmp_path / "dest", (16, 16), skip_bad=True, workers=1))
    manifest = json.loads((tmp_path / "dest/manifest.json").read_text())
    left_out = dict(manifest["left_out"])
    assert sorted(left_out) == ["junk/x.png", "n0000/2.JPEG", "n0000/huge.png", "n0000/thin.png", "n0001/2.JPEG"]
    assert left_out["n0001/2.JPEG"] == "Permission denied"
    assert (manifest["class_names"], manifest["num_classes"]) == (["n0000", "n0001"], 2)  # a class has images
    labels = json.loads((tmp_path / "dest/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 0, 1, 1]


def test_too_many_open_files_are_no_bad_image(tmp_path, monkeypatch):
    source = write_class_folders(tmp_path / "source", classes=1)

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match="Too many"):
        convert(ConvertFlags(source, tmp_path / "dest", (16, 16), skip_bad=True, workers=1))


@pytest.mark.parametrize("where", [(Path, "read_bytes"), (preprocessing.sources, "to_rgb")], ids=["read", "decode"])
def test_an_image_that_does_not_fit_in_memory_is_no_bad_image(where, tmp_path, monkeypatch):
    source = write_class_folders(tmp_path / "source", classes=1)

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(*where, refuse)
    with pytest.raises(MemoryError):
        convert(ConvertFlags(source, tmp_path / "dest", (16, 16), skip_bad=True, workers=1))


def test_workers_stop_at_an_unreadable_image_too(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing.convert, "CHUNK", 3)
    source = write_class_folders(tmp_path / "source", classes=2)
    (source / "n0001/1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"n0001/1\.png cannot be read \(the file is empty\)"):
        convert(ConvertFlags(source, tmp_path / "dest", (16, 16), "center-crop-dhariwal", workers=2))


def test_workers_end_with_a_command_that_fails(tmp_path, small_chunks, monkeypatch):
    source = write_class_folders(tmp_path / "source")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Job, "record", full)
    with pytest.raises(OSError, match="space") as caught:
        convert(ConvertFlags(source, tmp_path / "dest", (16, 16), workers=2))
    assert caught.tb and not multiprocessing.active_children()  # a traceback keeps what its frames hold


# -------------------------------------------------------------------------------------------------- command line


def test_command_line_ends_in_one_line_on_a_mistake(tmp_path):
    source = write_class_folders(tmp_path / "source", classes=2)
    photo(0, 9, 9).save(source / "stray.png")
    common = ("--source", source, "--dest", tmp_path / "dest", "--transform", "center-crop-dhariwal")
    result = run_tool("convert", *common, "--resolution", "16x16")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "stray.png lies beside the class folders" in result.stderr
    result = run_tool("convert", *common, "--resolution", "16,16", "--published-labels", "--workers", "1")
    assert result.returncode == 0, result.stderr
    labels = json.loads((tmp_path / "dest/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert "--source is empty" in run_tool("convert", "--source", "", "--dest", tmp_path / "empty").stderr
    assert "not WIDTHxHEIGHT" in run_tool("convert", *common, "--resolution", "big").stderr
