"""SIGKILL, then the same command again: the result is byte-identical to an undisturbed run."""

import builtins
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import captioned
import programs
import pytest
from data_helpers import photo, tiny_vae, tree, write_class_folders, write_folder_layout

import preprocessing.convert
import preprocessing.pack
from common.files import locked
from models.text import TextEncoder
from preprocessing.convert import convert
from preprocessing.options import CaptionFlags, ConvertFlags, PackFlags
from preprocessing.pack import pack
from preprocessing.text import write_captions

TOOL = Path(__file__).parent.parent / "preprocessing/dataset_tools.py"
IMAGES = 300


class Countdown:
    """Makes this process die by SIGKILL at its n-th change of the disk; a write to a file gets half way."""

    def __init__(self, operations):
        self.left = operations
        for name in ("replace", "pwrite", "open", "fsync", "fdatasync", "rmdir", "unlink", "mkdir"):
            setattr(os, name, self.dying(getattr(os, name)))
        builtins.open = io.open = functools.partial(self.open_for_half, io.open)

    def tick(self):
        self.left -= 1
        return self.left < 0

    def dying(self, call):
        def wrapper(*args, **kwargs):
            if self.tick():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    def open_for_half(self, call, file, mode="r", *args, **kwargs):
        opened = call(file, mode, *args, **kwargs)
        if mode in ("wb", "ab") and self.tick():
            write = opened.write

            def half(data):
                write(data[: len(data) // 2])
                opened.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            return HalfFile(half)
        if mode == "w+b" and self.tick():  # a zip
            os.kill(os.getpid(), signal.SIGKILL)
        return opened


class HalfFile:
    """A file whose first write is its last."""

    def __init__(self, write):
        self.write = write

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def killed_after(operations, job, dest):
    """Run in a forked process that dies at its n-th change of the disk. True where it lived to the end."""

    def body():
        Countdown(operations)
        job(dest)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def only_whole_files(folder, expected):
    """True where every file under a final name is what it will be in the end."""
    files = tree(folder)
    final = [name for name in files if not any(mark in name for mark in (".partial", ".work", ".tmp", ".lock"))]
    return {name: files[name] for name in final}.items() <= expected.items()


def kill_everywhere(job, root, name):
    """Kill `job` at its first change of the disk and run it again; the same at its second, …; returns how many."""
    (root / "undisturbed").mkdir(parents=True)
    job(root / "undisturbed" / name)
    expected = tree(root / "undisturbed")
    for operations in range(2000):
        folder = root / str(operations)
        folder.mkdir()
        if killed_after(operations, job, folder / name):
            return operations
        assert only_whole_files(folder, expected)
        again = min(operations, 15)  # the second run is killed too
        if not killed_after(again, job, folder / name):
            assert only_whole_files(folder, expected)
            job(folder / name)
        assert tree(folder) == expected
    raise AssertionError("the job never ended")


@pytest.mark.parametrize("name", ["dest", "dest.zip"])
def test_convert_killed_at_every_write(name, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing.convert, "CHUNK", 2)
    source = write_class_folders(tmp_path / "source", classes=2, per_class=2)

    def job(dest):
        with locked(dest, "--dest"):
            convert(ConvertFlags(source, dest, (16, 16), "center-crop-dhariwal", workers=1))

    # Enough moments were tried; their number differs between Python versions, which remove folders in other calls.
    assert kill_everywhere(job, tmp_path / "runs", name) > 20


def test_pack_killed_at_every_write(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing.pack, "BATCH", 4)
    source = write_folder_layout(tmp_path / "source", count=18)

    def job(dest):
        pack(PackFlags(source, dest, shard_size=7))

    assert kill_everywhere(job, tmp_path / "runs", "dest") > 20


def test_captions_killed_at_every_write(tmp_path, monkeypatch):
    encoder = TextEncoder(captioned.text_folder(tmp_path / "clip"))
    monkeypatch.setattr("preprocessing.text.TextEncoder", lambda *_: encoder)  # loaded once: that takes longest
    source, annotations = captioned.photos(tmp_path / "photos"), captioned.coco_json(tmp_path / "captions.json")

    def job(dest):
        write_captions(CaptionFlags(source, dest, annotations, batch_size=4, shard_size=6, device="cpu"))

    assert kill_everywhere(job, tmp_path / "runs", "dest") > 20


# ------------------------------------------------------------------------------------- real commands, random moments


def run_until_done(arguments, dest, seed, kills):
    """Start the command, kill it and its children at a random moment of its work, again and again, then let it end."""
    chance, hits = random.Random(seed), 0
    for _ in range(kills):
        process = programs.start(TOOL, *arguments)
        while process.poll() is None and not dest.exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.6) if hits else chance.uniform(0, 0.2))
        hits += process.poll() is None
        process.kill()  # the main process only: its workers must end by themselves
        process.wait()
    assert programs.run(TOOL, *arguments).returncode == 0
    return hits


def commands(root):
    """name → (arguments without --dest)."""
    encode = ["encode", "--source", root / "images", "--vae", tiny_vae(), "--batch-size", "4", "--device", "cpu"]
    size = ["--resolution", "64x64", "--transform", "center-crop-dhariwal"]
    captions = ["--annotations", root / "captions.json", "--text-encoder", root / "clip"]
    return {
        "convert": ["convert", "--source", root / "source", *size, "--workers", "2"],
        "encode": encode,
        "encode-packed": [*encode, "--packed", "--shard-size", "70"],
        "pack": ["pack", "--source", root / "vae-sd", "--shard-size", "70"],
        "captions": ["captions", "--source", root / "images", *captions, "--batch-size", "4", "--device", "cpu"],
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """300 photographs in class folders with captions, converted, and their latents."""
    root = tmp_path_factory.mktemp("sources")
    captions = {f"n{k % 7}/{k}.png": [f"picture {k}", f"number {k} of {IMAGES}"] for k in range(IMAGES)}
    for k, name in enumerate(captions):
        path = root / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(k, 200, 160).save(path)
    (root / "captions.json").write_text(json.dumps(captions))
    captioned.text_folder(root / "clip")
    for name, dest in (("convert", "images"), ("encode", "vae-sd")):
        arguments = [*commands(root)[name], "--dest", root / dest]
        assert programs.run(TOOL, *arguments).returncode == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "encode", "encode-packed", "pack", "captions"])
def test_commands_killed_at_random_moments(name, sources, tmp_path):
    arguments = commands(sources)[name]
    undisturbed = {"convert": sources / "images", "encode": sources / "vae-sd"}.get(name, tmp_path / "undisturbed")
    if not undisturbed.exists():
        assert programs.run(TOOL, *arguments, "--dest", undisturbed).returncode == 0
    dest = tmp_path / "killed"
    hits = run_until_done([*arguments, "--dest", dest], dest, name, kills=6 if name in ("convert", "pack") else 3)
    assert hits >= 1
    assert tree(dest) == tree(undisturbed)
    assert not (dest / ".partial").exists()
