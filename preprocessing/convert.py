"""convert: any folder or zip of images → square RGB images of one size, with the published names and labels."""

import concurrent.futures
import dataclasses
import io
import multiprocessing
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import InputError, note
from common.files import write_atomically
from common.flags import FlagTextError, Range, flag, required
from common.look_ahead import ordered_map
from common.versions import versions
from latents.manifest import LABELS_JSON, MANIFEST, NAMES, DataManifest
from latents.names import NO_LABEL, label_json, pack_names, walk
from preprocessing.jobs import Batches, Job
from preprocessing.options import ImageFlags
from preprocessing.sources import ImageSource
from preprocessing.transforms import TRANSFORMS, make_transform

CHUNK = 64  # images that one worker finishes before they are noted as done
FORMATS = {  # measured on 256² photographs: level 1 halves level 0 and writes as fast, higher ones gain 5 %
    "png": (".png", {"format": "PNG", "compress_level": 1}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),
    "webp-lossless": (".webp", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
}


def width_height(text):
    """'256x256' or '256,256' → (256, 256)."""
    match = re.fullmatch(r"(\d+)[x,](\d+)", text)
    if not match or 0 in (size := tuple(map(int, match.groups()))):
        raise FlagTextError(f"{text!r} is not WIDTHxHEIGHT, for example 256x256")
    return size


def usable_cores():
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclasses.dataclass
class ConvertFlags(ImageFlags):
    """images of any size → square RGB images of one size"""

    source: str = required(
        "folder of class folders, or a zip of them; labels by sorted top folder, or by its dataset.json",
        metavar="DIR|ZIP",
        group="data",
    )
    dest: str = required("new or empty folder, or a .zip to make", metavar="DIR|ZIP", group="output")
    resolution: tuple | None = flag(None, "for example 256x256", width_height, metavar="WxH", group="output")
    transform: str | None = flag(
        None, "default: resize without a crop", str, choices=sorted(TRANSFORMS), group="output"
    )
    _: dataclasses.KW_ONLY
    format: str = flag("png", "jpeg loses detail", choices=sorted(FORMATS), group="output")
    workers: int = flag(
        usable_cores(), "processes; by default one per core", range=Range(low=1), group="precision and speed"
    )


def image_name(index, image_format="png"):
    """Published name of image `index`: 00000/img00000000.png; a thousand images per folder."""
    number = f"{index:08d}"
    return f"{number[:5]}/img{number}{FORMATS[image_format][0]}"


def convert(options):
    """Convert every image of the source into a folder or .zip. Raises InputError on bad input.

    Does nothing if the destination is complete.
    """
    make_transform(options.transform, options.resolution)
    images = ImageSource(options.source, options.published_labels, options.max_images)
    dest = Path(options.dest)
    to_zip = dest.suffix.lower() == ".zip"
    job = Job(f"{dest}.work" if to_zip else dest, ticket(images, options))
    if to_zip and _zip_is_complete(dest, job.ticket):
        shutil.rmtree(job.dest, ignore_errors=True)
        return note(f"{dest} is complete: nothing to do")
    if job.begin():
        task = Task(images, job, options)
        _run(task, options.workers)
        _finish(task)
    elif not to_zip:
        return note(f"{dest} is complete: nothing to do")
    if to_zip:
        _write_zip(job.dest, dest, FORMATS[options.format][0])
        shutil.rmtree(job.dest)
    return None


def ticket(images, options):
    """What identifies the work, so that a later run resumes nothing else."""
    return {
        "command": "convert",
        "source": images.fingerprint(),
        "resolution": options.resolution,
        "transform": options.transform,
        "image_format": options.format,
        "chunk": CHUNK,
    }


class Task:
    """What a worker needs to convert a chunk."""

    def __init__(self, images, job, options):
        self.images, self.job, self.options = images, job, options
        self.chunks = Batches(len(images), CHUNK)
        self.transform = make_transform(options.transform, options.resolution)

    def run(self, number):
        """Convert the images of one chunk; returns facts: side (or None) and what was left out, {index: reason}."""
        side, left_out = None, {}
        for index in self.chunks[number]:
            image, reason = self.images.read_or_skip(index, self.options.skip_bad)
            result = None if image is None else self.transform(image)
            if result is None:
                left_out[index] = reason or "too small for the transform"
                continue
            side = self._check_side(index, result, side)
            buffer = io.BytesIO()
            result.save(buffer, **FORMATS[self.options.format][1])
            self.job.put(image_name(index, self.options.format), buffer.getbuffer())
        return {"side": side, "left_out": left_out}

    def _check_side(self, index, image, side):
        width, height = image.size
        path = self.images.where(index)
        if width != height or width & (width - 1):
            raise InputError(f"{path} becomes {width}x{height}; --resolution must lead to a square, a power of two")
        if side not in (None, width):
            raise InputError(f"{path} becomes {width}x{height}, others {side}x{side}; give --resolution")
        return width


def _run(task, workers):
    """Convert all chunks that the journal lacks, in this process or in forked ones."""
    done, chunks = task.job.finished(len(task.chunks)), task.chunks
    todo = np.flatnonzero(~done).tolist()
    initial = sum(len(chunks[number]) for number in np.flatnonzero(done))
    with tqdm(total=len(task.images), initial=initial, unit="img", desc="convert") as bar:
        for number, facts in zip(todo, _results(task, todo, min(workers, len(todo))), strict=True):
            task.job.record(number, **facts)
            bar.update(len(chunks[number]))


def _results(task, todo, workers):
    """Facts of the chunks `todo` as they get ready; at most a few per worker are under way."""
    if workers <= 1:
        yield from map(task.run, todo)
        return
    context = multiprocessing.get_context("fork")  # a fork shares names and labels
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (task, os.getpid())) as pool:
        yield from ordered_map(_run_chunk, todo, ahead=4 * workers, pool=pool)


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


def _run_chunk(number):
    return _TASK.run(number)


def _finish(task):
    images, left_out, image_format = task.images, task.job.left_out(), task.options.format
    sides = {record["side"] for record in task.job.records()} - {None}
    if len(sides) > 1:
        raise InputError(f"{images.path} gives images of different sizes {sorted(sides)}; give --resolution")
    kept = [index for index in range(len(images)) if index not in left_out]
    if images.names and not kept:
        raise InputError(f"{images.path}: not one image could be used; the first: {next(iter(left_out.values()))}")
    for index, reason in left_out.items():
        note(f"left out: {images.names[index]} ({reason})")
    labels = images.labels[kept]
    manifest = {
        "kind": "images",
        "layout": "folder",
        "count": len(kept),
        "resolution": next(iter(sides), None),
        "transform": task.options.transform,
        "image_format": image_format,
        "num_classes": images.num_classes,
        "class_names": images.class_names,
        "left_out": [[images.names[index], reason] for index, reason in left_out.items()],
        "versions": versions(),
    }
    sources = pack_names([images.names[index] for index in kept])
    files = {NAMES: sources, LABELS_JSON: label_json([image_name(index, image_format) for index in kept], labels)}
    task.job.finish(files, manifest)
    note(f"{task.job.dest}: {len(kept)} images, {_say_classes(labels, images)}")


def _say_classes(labels, images):
    if not (labels == NO_LABEL).any():
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
        with zipfile.ZipFile(dest) as archive:
            found = DataManifest.parse(archive.read(MANIFEST), dest / MANIFEST).job
    except (zipfile.BadZipFile, KeyError, InputError):
        found = None
    if found != ticket:
        raise InputError(f"--dest {dest} exists and holds something else; remove it, or name another")
    return True


def _write_zip(folder, dest, suffix):
    """Pack a finished folder into a stored zip, images in order, and rename it into place."""
    images = sorted(name for name, _ in walk(folder) if name.endswith(suffix))

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in tqdm([*images, LABELS_JSON, NAMES, MANIFEST], unit="file", desc="zip"):
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # a fixed date: the same images give the same zip
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, (folder / name).read_bytes())

    write_atomically(dest, write, temporary=f"{dest}.tmp")
