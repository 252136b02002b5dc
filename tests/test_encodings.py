"""Prompts and labels in any kind of UTF-8 are read alike in any locale; other encodings are refused."""

import json
import locale

import pytest

from common.errors import InputError
from sampling.conditions import read_labels, read_prompts

TEXT = "a caf\u00e9\nzwei rote Busse \U0001f68c\n\u732b\n"
PROMPTS = TEXT.split("\n")[:3]


@pytest.fixture(params=["C", None])
def in_locale(request):
    """Where files are ASCII unless their readers say otherwise, and as it is."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, request.param or before)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def lines_of_json(texts):
    return "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)


def coco(texts):
    images = [{"id": i, "file_name": f"{i}.png"} for i, _ in enumerate(texts)]
    annotations = [{"id": i, "image_id": i, "caption": text} for i, text in enumerate(texts)]
    return json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", TEXT.encode()),
        ("mark.txt", TEXT.encode("utf-8-sig")),
        ("windows.txt", TEXT.replace("\n", "\r\n").encode()),
        ("both.txt", TEXT.replace("\n", "\r\n").encode("utf-8-sig")),
        ("old-mac.txt", TEXT.replace("\n", "\r").encode()),
        ("a.jsonl", lines_of_json(PROMPTS).encode()),
        ("mark.jsonl", lines_of_json(PROMPTS).encode("utf-8-sig")),
        ("windows.jsonl", lines_of_json(PROMPTS).replace("\n", "\r\n").encode()),
        ("a.json", coco(PROMPTS).encode()),
        ("mark.json", coco(PROMPTS).encode("utf-8-sig")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompts_in_utf8_are_read_alike(tmp_path, in_locale, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_prompts([str(tmp_path / name)], 0).texts == PROMPTS


@pytest.mark.parametrize(
    ("suffix", "encoding", "text"),
    [("txt", "utf-16", TEXT), ("jsonl", "utf-16", TEXT)]  # JSON may be UTF-16
    + [(suffix, "gbk", "\u732b\u72d7\n") for suffix in ("txt", "jsonl", "json")]
    + [(suffix, "latin-1", "caf\u00e9\n") for suffix in ("txt", "jsonl", "json")],
)
def test_prompts_in_other_encodings_are_refused(tmp_path, in_locale, suffix, encoding, text):
    content = {"txt": text, "jsonl": lines_of_json([text]), "json": coco([text])}[suffix]
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content.encode(encoding))
    with pytest.raises(InputError, match=r"prompts\.\w+.*(?i:utf-8)"):
        read_prompts([str(path)], 0)


@pytest.mark.parametrize("data", [b"1\n2\n", b"\xef\xbb\xbf1\r\n2\r\n", b"1\r2\r", b" 1 2"])
def test_labels_are_read_alike(tmp_path, in_locale, data):
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    assert read_labels(str(path), 10) == ([1, 2], str(path))


@pytest.mark.parametrize(
    "data", ["1\n2\n".encode("utf-16"), b"cat\n", b"1,2\n", b"-1\n", b"10\n", "\u0663\n".encode(), b"", b"1.0\n"]
)
def test_labels_that_are_no_classes_are_refused(tmp_path, in_locale, data):
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"--labels .*labels\.txt"):
        read_labels(str(path), 10)
