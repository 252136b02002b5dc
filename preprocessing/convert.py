"""convert: any folder or zip of images → square RGB images of one size, with the published names and labels."""

import collections
import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import InputError, note
from common.versions import versions
from latents.manifest import LABELS_JSON, MANIFEST, NAMES
from latents.names import pack_names
from listing import NO_LABEL, Kept, NameTable, label_json, walk
from preprocessing.jobs import Batches, Job
from preprocessing.sources import BadImageError, ImageSource
from preprocessing.transforms import make_transform
from preprocessing.zips import ZipReader, create_zip

CHUNK = 64  # images that one worker finishes before they are noted as done
FORMATS = {  # measured on 256² photographs: level 1 halves level 0 and writes as fast, higher ones gain 5 %
    "png": (".png", {"format": "PNG", "compress_level": 1}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),
    "webp-lossless": (".webp", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
}


def image_name(index, image_format="png"):
    """Published name of image `index`: 00000/img00000000.png; a thousand images per folder."""
    number = f"{index:08d}"
    return f"{number[:5]}/img{number}{FORMATS[image_format][0]}"


def convert(
    source,
    dest,
    resolution=None,
    transform=None,
    max_images=None,
    workers=1,
    image_format="png",
    published_labels=False,
    skip_bad=False,
):
    """Convert every image of `source` into `dest`, a folder or .zip; resolution is (width, height) or None.

    Raises InputError on bad input. Does nothing where `dest` is complete.
    """
    make_transform(transform, resolution)
    images = ImageSource(source, published_labels, max_images)
    dest = Path(dest)
    to_zip = dest.suffix.lower() == ".zip"
    ticket = {
        "command": "convert",
        "source": images.fingerprint(),
        "resolution": list(resolution) if resolution else None,
        "transform": transform,
        "image_format": image_format,
        "chunk": CHUNK,
    }
    job = Job(f"{dest}.work" if to_zip else dest, ticket)
    if to_zip and _zip_is_complete(dest, job.ticket):
        shutil.rmtree(job.dest, ignore_errors=True)
        return note(f"{dest} is complete: nothing to do")
    if job.begin():
        task = Task(images, job, make_transform(transform, resolution), image_format, skip_bad)
        _run(task, Batches(len(images), CHUNK), workers)
        _finish(task, transform)
    elif not to_zip:
        return note(f"{dest} is complete: nothing to do")
    if to_zip:
        _write_zip(job.dest, dest)
        shutil.rmtree(job.dest)
    return None


class Task:
    """What a worker needs to convert a chunk."""

    def __init__(self, images, job, transform, image_format, skip_bad):
        self.images, self.job, self.transform = images, job, transform
        self.image_format, self.skip_bad = image_format, skip_bad

    def run(self, chunk):
        """Convert the images of one chunk; returns facts: side (or None) and what was left out, {index: reason}."""
        side, left_out = None, {}
        for index in chunk:
            try:
                result = self.transform(self.images.read(index))
            except BadImageError as error:
                if not self.skip_bad:
                    path = f"{self.images.path}/{self.images.names[index]}"
                    raise InputError(f"{path} cannot be read ({error}); repair it, or pass --skip-bad") from None
                left_out[index] = str(error)
                continue
            if result is None:
                left_out[index] = "too small for the transform"
                continue
            side = self._check_side(index, result, side)
            buffer = io.BytesIO()
            result.save(buffer, **FORMATS[self.image_format][1])
            self.job.put(image_name(index, self.image_format), [buffer.getbuffer()])
        return {"side": side, "left_out": left_out}

    def _check_side(self, index, image, side):
        width, height = image.size
        path = f"{self.images.path}/{self.images.names[index]}"
        if width != height or width & (width - 1):
            raise InputError(f"{path} becomes {width}x{height}; --resolution must lead to a square, a power of two")
        if side not in (None, width):
            raise InputError(f"{path} becomes {width}x{height}, others {side}x{side}; give --resolution")
        return width


def _run(task, chunks, workers):
    """Convert all chunks that the journal lacks, in this process or in forked ones, with a progress bar."""
    done = task.job.finished(len(chunks))
    todo = ((number, chunk) for number, chunk in enumerate(chunks) if not done[number])
    initial = sum(len(chunks[number]) for number in np.flatnonzero(done))
    with tqdm(total=len(task.images), initial=initial, unit="img", desc="convert") as bar:
        for number, facts in _results(task, todo, workers):
            task.job.record(number, **facts)
            bar.update(len(chunks[number]))


def _results(task, todo, workers):
    """(chunk number, facts) as chunks get ready; at most a few per worker are under way."""
    if workers <= 1:
        yield from ((number, task.run(chunk)) for number, chunk in todo)
        return
    context = multiprocessing.get_context("fork")  # a fork shares the table of names
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (task, os.getpid())) as pool:
        pending, rest = collections.deque(), iter(todo)
        try:
            for number, chunk in rest:
                pending.append((number, pool.submit(_run_chunk, chunk)))
                if len(pending) >= 4 * workers:
                    number, future = pending.popleft()
                    yield number, future.result()
            while pending:
                number, future = pending.popleft()
                yield number, future.result()
        finally:
            for _, future in pending:
                future.cancel()


_TASK = None  # set in a worker process


def _start_worker(task, parent):
    global _TASK
    _TASK = task
    task.images.reopen()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent):
    """End this worker when the main process is gone: a killed command must leave nobody behind."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run_chunk(chunk):
    return _TASK.run(chunk)


def _finish(task, transform):
    images, left_out = task.images, task.job.left_out()
    sides = {record["side"] for record in task.job.records()} - {None}
    if len(sides) > 1:
        raise InputError(f"{images.path} gives images of different sizes {sorted(sides)}; give --resolution")
    kept = Kept(len(images), left_out)
    if images.names and not kept:
        raise InputError(f"{images.path}: not one image could be used; the first: {next(iter(left_out.values()))}")
    for index, reason in left_out.items():
        note(f"left out: {images.names[index]} ({reason})")
    names = kept.of(lambda index: image_name(index, task.image_format))
    labels = kept.of(images.labels.__getitem__)
    manifest = {
        "kind": "images",
        "layout": "folder",
        "count": len(kept),
        "resolution": next(iter(sides), None),
        "transform": transform,
        "image_format": task.image_format,
        "num_classes": images.num_classes,
        "class_names": images.class_names,
        "left_out": [[images.names[index], reason] for index, reason in left_out.items()],
        "versions": versions(),
    }
    files = {NAMES: pack_names(kept.of(images.names.__getitem__)), LABELS_JSON: label_json(names, labels)}
    task.job.finish(files, manifest)
    note(f"{task.job.dest}: {len(kept)} images, {_say_classes(labels, images)}")


def _say_classes(labels, images):
    if all(label != NO_LABEL for label in labels):
        return f"{images.num_classes} classes"
    if images.num_classes == 1:
        return f"one class ({images.class_names[0]}), so no labels (null), as published"
    unlabelled = images.names[int(np.argmax(images.labels == NO_LABEL))]
    where = f"{unlabelled} is in no class folder and in no {LABELS_JSON}"
    return f"WITHOUT LABELS: {where}; training needs labels or captions"


def _zip_is_complete(dest, ticket):
    if not dest.is_file():
        return False
    try:
        found = json.loads(ZipReader(dest).read_by_name(MANIFEST))["job"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
        found = None
    if found != ticket:
        raise InputError(f"--dest {dest} exists and holds something else; remove it, or name another")
    return True


def _write_zip(folder, dest):
    """Pack a finished folder into a stored zip, images in order, and rename it into place."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    temporary, suffix = Path(f"{dest}.tmp"), FORMATS[manifest["image_format"]][0]
    images = NameTable((name,) for name, _ in walk(folder) if name.endswith(suffix))
    last = (LABELS_JSON, NAMES, MANIFEST)
    with create_zip(temporary) as archive:
        for name in tqdm(itertools.chain(images, last), total=len(images) + len(last), unit="file", desc="zip"):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # a fixed date: the same images give the same zip
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (folder / name).read_bytes())
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, dest)
