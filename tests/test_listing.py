"""Names and labels on disk: sorted, found and written as lists in memory would be, in memory that does not grow."""

import io
import json
import random
import tracemalloc

import numpy as np
import pytest

import listing
from latents.names import pack_names
from listing import NO_LABEL, Kept, NameTable, integers_on_disk, label_json, read_labels, sorted_on_disk
from preprocessing.sources import ImageSource

ODD = ["", "a/b", "a b", "a", "Z", "\udcff", "\ue000", "\U0001f600", "line\nbreak", "end ", "nul\0", "ü", "a\udc80/x"]


@pytest.fixture
def small_runs(monkeypatch):
    monkeypatch.setattr(listing, "RUN", 5)
    monkeypatch.setattr(listing, "BLOCK", 2)


def test_sorts_as_a_list_does_and_keeps_the_order_of_equal_names(small_runs):
    rng = random.Random(0)
    entries = [(rng.choice(ODD), k) for k in range(123)]
    assert list(sorted_on_disk(entries)) == sorted(entries, key=lambda entry: entry[0])
    assert list(sorted_on_disk([])) == []


def test_table_holds_what_a_sorted_list_would(small_runs):
    table = NameTable(((name, k, -k) for k, name in enumerate(ODD)), columns=2)
    assert list(table) == sorted(ODD)
    assert [ODD[k] for k in table.column(0)] == sorted(ODD) and (table.column(1) == -table.column(0)).all()
    for name in random.Random(1).sample(ODD, len(ODD)) + sorted(ODD):
        assert table[table.find(name)] == name
    assert table.find("b") is None and "b" not in table and "Z" in table
    with pytest.raises(IndexError):
        table[len(ODD)]
    table.cut(3)
    assert list(table) == sorted(ODD)[:3] and len(table.column(0)) == 3 and sorted(ODD)[3] not in table


def test_unique_table_keeps_the_last_of_equal_names(small_runs):
    rng = random.Random(2)
    entries = [(rng.choice(ODD), k) for k in range(40)]
    table = NameTable(entries, columns=1, unique=True)
    assert dict(zip(table, table.column(0).tolist(), strict=True)) == dict(entries)


def test_empty_table():
    table = NameTable(())
    assert not table and list(table) == [] and table.find("a") is None and len(integers_on_disk(0)) == 0


def test_integers_on_disk_can_be_written():
    numbers = integers_on_disk(1000)
    assert numbers.dtype == np.int64 and numbers.shape == (1000,) and not numbers.any()
    numbers[:] = range(1000)
    assert numbers.sum() == 499500


def test_kept_can_be_gone_through_again():
    kept = Kept(5, {1: "bad", 3: "bad"}).of("abcde".__getitem__)
    assert len(kept) == 3 and list(kept) == list(kept) == ["a", "c", "e"]


# ----------------------------------------------------------------------------------------------------- dataset.json

TEXTS = [
    '{"labels": [["a/b.png", 0], ["c\\"],[.png", 12345678901234567890], ["\\ud83d\\ude00\\udc80", -1.5e3]]}',
    ' {"x" : {"labels": [[1, 2]]},\n\t"labels":[ ["ü", null]\r\n, [] , 17 ] , "y": 12.25, "z": "" } ',
    '\ufeff{"labels": []}',
    '{"n": 123, "labels": null, "m": [1]}',
    '{"labels": [12, 345, 6789]}',
]
BROKEN = ["", "{", '{"labels": [["a", 0]', '{"labels": [["a", 0]]', '{"labels": [["a", 0]]}}', '{"labels": [1,]}']
BROKEN += ['{"labels": [1 2]}', '{"labels" [1]}', '{"labels": [1], "x"}', '{"labels": [1], }', '{"labels": nul}', "\0"]


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize("text", TEXTS)
def test_labels_are_read_as_json_reads_them(text, piece, monkeypatch):
    monkeypatch.setattr(listing.JsonText, "PIECE", piece)
    found = read_labels(io.BytesIO(text.encode()))
    assert (None if found is None else list(found)) == json.loads(text.encode())["labels"]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_json_is_refused(text):
    with pytest.raises(ValueError):
        json.loads(text)
    with pytest.raises(ValueError):
        list(read_labels(io.BytesIO(text.encode())) or ())


@pytest.mark.parametrize(
    ("text", "error"),
    [("{}", KeyError), ('{"x": 1}', KeyError), ("[1]", KeyError), ('{"labels": 3}', TypeError)],
)
def test_json_without_a_label_list_is_refused(text, error):
    with pytest.raises(error):
        read_labels(io.BytesIO(text.encode()))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_labels_are_written_as_json_writes_them(count):
    names, labels = ODD[:count], list(range(count))
    assert b"".join(label_json(names, np.array(labels))) == json.dumps({"labels": list(zip(names, labels))}).encode()  # noqa: B905
    if count:
        assert b"".join(label_json(names, [*labels[1:], NO_LABEL])) == b'{"labels": null}'


# ----------------------------------------------------------------------------------------------------------- memory


def synthetic_tree(count):
    """What walk gives for `count` images, in no order."""
    return ((f"n{k % 100:08d}/{k:08d}.JPEG", k) for k in (i * 7919 % count for i in range(count)))


def peak_of_listing(count, monkeypatch, folder):
    """Peak bytes of listing a source, writing names.txt and dataset.json, and reading the labels again."""
    monkeypatch.setattr("preprocessing.sources.walk", lambda path: synthetic_tree(count))
    tracemalloc.start()
    try:
        source = ImageSource(folder)
        source.fingerprint()
        for name, pieces in {
            "dataset.json": label_json(source.names, source.labels),
            "names.txt": pack_names(source.names),
        }.items():
            with open(folder / name, "wb") as file:
                file.writelines(pieces)
        again = ImageSource(folder)
        assert np.array_equal(again.labels, source.labels) and len(again) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        (folder / "dataset.json").unlink()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RUN", 1000)
    monkeypatch.setattr(listing, "BLOCK", 4)
    monkeypatch.setattr(listing.JsonText, "PIECE", 4096)
    peak_of_listing(2_000, monkeypatch, tmp_path)  # what is made once and stays
    small, large = (peak_of_listing(count, monkeypatch, tmp_path) for count in (2_000, 20_000))
    assert (large - small) / 18_000 < 16  # bytes per image, mostly of the open runs; one str of such a name has 72
