"""Zips read and written without their directory in memory: what zipfile reads and writes."""

import pickle
import random
import zipfile

import pytest

import preprocessing.zips
from preprocessing.zips import ZipReader, create_zip

CONTENT = {f"f{k % 3}/ü{k}.bin": random.Random(k).randbytes(50 * k) for k in range(12)}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(preprocessing.zips, "SLICE", 5)


def read_all(path):
    reader = ZipReader(path)
    found = {name: (size, reader.read(position)) for name, size, position in reader.entries()}
    assert all(size == len(data) for size, data in found.values())
    return {name: data for name, (_, data) in found.items()}


def write(path, create, **options):
    with create(path, **options) as archive:
        for name, data in CONTENT.items():
            archive.writestr(zipfile.ZipInfo(name), data, options.get("compression"))
    return path


def plain(path, **options):
    return zipfile.ZipFile(path, "w", **options)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_reads_what_zipfile_writes(compression, tmp_path):
    path = write(tmp_path / "a.zip", plain, compression=compression)
    assert read_all(path) == CONTENT
    path.write_bytes(b"#!/bin/sh\n" * 10 + path.read_bytes())  # as zips that unpack themselves begin
    assert read_all(path) == CONTENT


@pytest.mark.parametrize("limit", [zipfile.ZIP_FILECOUNT_LIMIT, 4])
def test_writes_the_bytes_of_zipfile_also_as_zip64(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limit)
    ours, theirs = write(tmp_path / "ours.zip", create_zip), write(tmp_path / "theirs.zip", plain)
    assert ours.read_bytes() == theirs.read_bytes()
    assert (preprocessing.zips.END_64 in ours.read_bytes()) == (limit == 4)
    assert read_all(ours) == CONTENT


def test_comments_folders_and_equal_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else archive.writestr("folder/", b"")
        for data in (b"first", b"second"):
            with pytest.warns(UserWarning) if data == b"second" else pytest.MonkeyPatch.context():
                archive.writestr("name", data)
        archive.comment = b"a comment " * 100
    assert [name for name, _, _ in ZipReader(tmp_path / "a.zip").entries()] == ["name", "name"]
    assert ZipReader(tmp_path / "a.zip").read_by_name("name") == b"second"
    assert ZipReader(tmp_path / "a.zip").read_by_name("nam") is None


def test_empty_zip(tmp_path):
    create_zip(tmp_path / "a.zip").close()
    assert read_all(tmp_path / "a.zip") == {}


def test_damage_is_a_bad_zip(tmp_path):
    path = write(tmp_path / "a.zip", plain)
    whole = path.read_bytes()
    start = whole.index(preprocessing.zips.ENTRY)
    for damaged in (whole[:-30], whole[:start] + b"XXXX" + whole[start + 4 :], whole[: start // 2] + whole[start:]):
        path.write_bytes(damaged)
        with pytest.raises(zipfile.BadZipFile):
            read_all(path)


def test_the_spooled_directory_outlives_pickling():
    info = zipfile.ZipInfo("a/b.png", (1980, 1, 1, 0, 0, 0))
    info.header_offset, info.CRC = 1 << 40, 7
    again = pickle.loads(pickle.dumps(info))
    assert all(getattr(again, field, None) == getattr(info, field, None) for field in zipfile.ZipInfo.__slots__)
