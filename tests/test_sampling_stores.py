"""Stores and the npz: what is kept, what is missing, and what happens on full disks and with damaged files."""

import errno
import os
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

import common.files
from common.errors import InputError
from common.files import locked
from common.look_ahead import ordered_map
from sampling.stores import PartFiles, PngFiles, pack, prepare_folder, write_npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["png", "parts"])
def store(request, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return PngFiles(folder) if request.param == "png" else PartFiles(folder, "arr_0")


def write_in_threads(write, batches, threads=4):
    """As sampling writes its batches."""
    return ordered_map(lambda batch: write(*batch), batches, ahead=threads - 1, threads=threads, finish=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_in_order_whatever_order_and_batches_they_were_written_in(store):
    assert store.missing(7) == list(range(7))
    for batch in (range(5, 7), range(0, 3), range(2, 6)):
        store.write(batch, IMAGES[batch.start : batch.stop])
    assert store.missing(7) == [] and store.missing(9) == [7, 8]
    assert np.array_equal(np.stack(list(store.rows(7))), IMAGES)
    assert np.array_equal(np.stack(list(store.rows(4))), IMAGES[:4])


def test_npz_holds_exactly_the_first_rows(store, tmp_path):
    store.write(range(7), IMAGES)
    pack(store, tmp_path / "a.npz", 5)
    array = np.load(tmp_path / "a.npz")
    assert array.files == ["arr_0"]
    assert array["arr_0"].dtype == np.uint8 and np.array_equal(array["arr_0"], IMAGES[:5])


def test_the_same_rows_give_the_same_bytes(store, tmp_path, monkeypatch):
    store.write(range(7), IMAGES)
    pack(store, tmp_path / "a.npz", 7)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    pack(store, tmp_path / "b.npz", 7)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_pngs_that_are_there_are_not_written_again(tmp_path):
    store = PngFiles(tmp_path)
    store.write(range(3), IMAGES[:3])
    before = files(tmp_path)
    store.write(range(1, 5), 255 - IMAGES[1:5])
    assert {name: files(tmp_path)[name] for name in before} == before
    assert np.array_equal(store.read(store.path(4))[0], 255 - IMAGES[4])


@pytest.mark.parametrize("keep", [0, 11, 40, -1])
def test_a_truncated_png_is_missing(tmp_path, keep):
    store = PngFiles(tmp_path)
    store.write(range(3), IMAGES[:3])
    whole = store.path(1).read_bytes()
    store.path(1).write_bytes(whole[:keep])
    assert store.missing(3) == [1]
    store.write(range(3), IMAGES[:3])
    assert store.missing(3) == [] and store.path(1).read_bytes() == whole


@pytest.mark.parametrize("damage", ["middle", "size", "mode"])
def test_a_damaged_image_is_named_and_no_npz_is_written(tmp_path, damage):
    store = PngFiles(tmp_path / "images")
    store.write(range(7), IMAGES)
    path = store.path(4)
    if damage == "middle":
        content = bytearray(path.read_bytes())
        content[50:60] = bytes(10)
        path.write_bytes(content)
    else:
        Image.fromarray(IMAGES[4]).resize((9, 9) if damage == "size" else (8, 8)).convert(
            "RGB" if damage == "size" else "L"
        ).save(path)
    with pytest.raises(InputError, match=r"000004\.png is damaged|image 4 is"):
        pack(store, tmp_path / "a.npz", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("cut", [10, 100])
def test_a_damaged_part_is_named(tmp_path, cut):
    store = PartFiles(tmp_path / "rows", "arr_0")
    store.write(range(7), IMAGES)
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=rf"{path} is .*; run the same again"):
        pack(store, tmp_path / "a.npz", 7)
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("name", ["a.npz", None])
def test_rows_that_are_missing_are_named(store, tmp_path, name):
    store.write(range(4), IMAGES[:4])
    with pytest.raises(InputError, match=rf"{store.folder}.* 4; run the same again|000004\.png .*; run the same again"):
        pack(store, name and tmp_path / name, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# ------------------------------------------------------------------------------------------------- seals


def zeroed(path, _other):
    path.write_bytes(bytes(path.stat().st_size))


def cut(path, _other):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path, _other):
    path.write_bytes(b"")


def flipped(path, _other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def exchanged(path, other):
    path.write_bytes(other.read_bytes())


def black(path, _other):
    if path.suffix == ".npy":
        np.save(path, np.zeros_like(IMAGES[:3]))
    else:
        Image.new("RGB", (8, 8)).save(path)


def of_another_kind(path, _other):
    Image.fromarray(IMAGES[0, :, :, 0]).resize((5, 9)).save(path, format="PNG")


@pytest.mark.parametrize("alter", [zeroed, cut, empty, flipped, exchanged, black, of_another_kind])
def test_what_is_not_as_it_was_written_is_made_again(store, alter, capsys):
    batches = [range(0, 3), range(3, 6)]
    for batch in batches:
        store.write(batch, IMAGES[batch.start : batch.stop])
    before = files(store.folder)
    first, second, *_ = sorted(store.folder.iterdir())
    alter(second, first)
    store.sealed = True
    lost = [1] if store.kind == "png" else [3, 4, 5]
    assert store.missing(6) == lost
    assert f"1 damaged or altered files are deleted and made again, the first is {second}" in capsys.readouterr().err
    assert not second.exists()
    for batch in batches:
        store.write(batch, IMAGES[batch.start : batch.stop])
    assert files(store.folder) == before and store.missing(6) == []


def test_files_of_earlier_versions_are_taken_over(store, tmp_path):
    if store.kind == "png":
        for index in range(3):
            Image.fromarray(IMAGES[index]).save(store.path(index))
    else:
        np.save(store.folder / "rows-00000000-00000003.npy", IMAGES[:3])
    assert store.missing(4) == [3]
    store.write(range(3, 7), IMAGES[3:])
    pack(store, tmp_path / "a.npz", 7)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], IMAGES)


def test_a_folder_remembers_whether_all_its_files_have_seals(tmp_path):
    assert prepare_folder(tmp_path / "new", {"mode": "sde"})
    Image.new("RGB", (8, 8)).save(tmp_path / "new/000000.png")
    assert prepare_folder(tmp_path / "new", {"mode": "sde"})
    (tmp_path / "new/settings.json").write_text('{"mode": "sde"}')
    for _ in range(2):
        assert not prepare_folder(tmp_path / "new", {"mode": "sde"})


def test_what_is_no_part_is_left_alone(tmp_path):
    store = PartFiles(tmp_path, "arr_0")
    store.sealed = True
    (tmp_path / "rows-a-b.npy").write_bytes(b"mine")
    assert store.missing(2) == [0, 1]
    store.write(range(2), IMAGES[:2])
    store.finish()
    assert files(tmp_path) == {"rows-a-b.npy": b"mine"}


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)], ids=["folder", "pipe"])
def test_what_is_no_file_is_named_and_left_alone(store, make):
    path = store.folder / ("000001.png" if store.kind == "png" else "rows-00000000-00000002.npy")
    make(path)
    store.sealed = True
    with pytest.raises(InputError, match=f"{path} cannot be read"):
        store.missing(2)
    assert path.exists()


@pytest.mark.parametrize("count", [3, 9])
def test_an_npz_of_another_number_of_rows_is_not_written(tmp_path, count):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        write_npz(tmp_path / "a.npz", "arr_0", IMAGES, count)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- full disk, kill


class FullDisk:
    """A file that takes so many bytes and then has no space left."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.fixture
def full_disk(monkeypatch):
    """Function that leaves so many bytes of room in every file that is written from then on."""

    def leave(room):
        monkeypatch.setattr(common.files, "open", lambda path, mode: FullDisk(open(path, mode), room), raising=False)

    return leave


def test_a_full_disk_while_images_are_written_keeps_what_is_finished(store, full_disk):
    store.write(range(3), IMAGES[:3])
    before = files(store.folder)
    full_disk(20)
    with pytest.raises(OSError, match="No space left on device"):
        store.write(range(3, 7), IMAGES[3:])
    assert files(store.folder) == before


@pytest.mark.parametrize("room", [0, 300, 1300])
def test_a_full_disk_while_packing_leaves_the_images_and_no_npz(store, tmp_path, full_disk, room):
    store.write(range(7), IMAGES)
    before = files(store.folder)
    full_disk(room)
    with pytest.raises(OSError, match="No space left on device"):
        pack(store, tmp_path / "a.npz", 7)
    assert files(store.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_full_disk_in_a_thread_reaches_the_caller(tmp_path, full_disk):
    full_disk(0)
    with pytest.raises(OSError, match="No space left"):
        list(write_in_threads(PngFiles(tmp_path).write, [(range(3), IMAGES[:3])]))


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "a"
    prepare_folder(folder, {"mode": "sde"})
    dead = 2**22 + 7  # beyond Linux's largest process id
    for path in (folder / ".000001.png.77.tmp", tmp_path / f".a.npz.{dead}.tmp", tmp_path / ".b.npz.77.tmp"):
        path.write_bytes(b"half")
    with locked(folder, "--sample-dir"):
        prepare_folder(folder, {"mode": "sde"})
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "settings.json", ".b.npz.77.tmp"}


# ------------------------------------------------------------------------------------------- threads, memory


def test_writing_in_threads_bounds_what_waits_and_writes_everything():
    gate, sampled, written = threading.Event(), [], []

    def write(item):
        gate.wait(60)
        written.append(item)

    def batches():
        for item in range(6):
            if item == 2:  # two are being written, and the third is waited for
                gate.set()
            sampled.append(item)
            yield (item,)

    for number, _ in enumerate(write_in_threads(write, batches(), threads=3)):
        assert len(sampled) <= number + 1 + 3
    assert sorted(written) == [0, 1, 2, 3, 4, 5]


class Stop(BaseException):
    """What a test raises in the middle of things."""


@pytest.mark.parametrize("count", range(8))
def test_what_was_sampled_is_written_when_sampling_fails(count):
    written = []

    def write(item):
        time.sleep(0.01)
        written.append(item)

    def batches():
        yield from ((item,) for item in range(count))
        raise Stop

    with pytest.raises(Stop):
        list(write_in_threads(write, batches()))
    assert sorted(written) == list(range(count))


def test_an_error_in_a_write_ends_the_sampling():
    def write(item):
        raise ValueError(f"item {item}")

    items = iter(range(100))
    with pytest.raises(ValueError, match="item 0"):
        list(write_in_threads(write, ((item,) for item in items)))
    assert next(items) < 10


def test_packing_needs_the_memory_of_a_few_images(tmp_path):
    """200 MB go through; a few images of 0.2 MB are held."""
    row = np.zeros((256, 256, 3), np.uint8)
    tracemalloc.start()
    try:
        write_npz(tmp_path / "a.npz", "arr_0", (row.copy() for _ in range(1000)), 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 1000 * row.nbytes
    assert peak < 10 * row.nbytes
