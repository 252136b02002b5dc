"""convert: any folder or zip of images → square RGB images of one size, with the published names and labels."""

import concurrent.futures
import functools
import io
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
from pathlib import Path

from common.errors import InputError, note
from common.files import regular, write_atomically
from common.look_ahead import cores_of_process
from common.progress import Progress
from common.versions import versions
from latents.manifest import LABELS_JSON, MANIFEST, NAMES, DataManifest
from latents.names import NO_LABEL, label_json, pack_names, walk
from preprocessing.jobs import Job, batches_of
from preprocessing.sources import ImageSource
from preprocessing.transforms import DEFAULT, make_transform

CHUNK = 64  # images that one worker finishes before they are noted as done
TOO_SMALL = "too small for the transform"
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation")
FORMATS = {  # measured on 256² photographs: level 1 halves level 0 and writes as fast, higher ones gain 5 %
    "png": (".png", {"format": "PNG", "compress_level": 1}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),
    "webp-lossless": (".webp", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
}


def image_name(index, image_format):
    """Published name of image `index`: 00000/img00000000.png; a thousand images per folder."""
    return f"{index // 1000:05d}/img{index:08d}{FORMATS[image_format][0]}"


def convert(options):
    """Convert every image of the source into a folder or .zip, unless it is complete. Raises InputError."""
    transform_name = options.transform or (DEFAULT if options.resolution else None)
    transform = make_transform(transform_name, options.resolution)
    dest = Path(options.dest)
    if Path(os.path.realpath(dest)).is_relative_to(os.path.realpath(options.source)):
        raise InputError(f"--dest {dest} lies in --source, where its images would be sources next time; name another")
    images = ImageSource(options.source, options.published_labels, options.max_images)
    _warn_of_splits(images)
    to_zip = dest.suffix.lower() == ".zip"
    ticket = {"command": "convert", "source": images.fingerprint(), "resolution": options.resolution}
    ticket |= {"transform": transform_name, "image_format": options.format, "chunk": CHUNK}
    job = Job(f"{dest}.work" if to_zip else dest, ticket, images.made_from(CHUNK))
    zipped = to_zip and _zip_is_complete(dest, job.ticket)
    if not zipped and job.begin():
        side = options.resolution[0] if options.resolution else images.first_width(options.skip_bad)
        task = functools.partial(_convert_chunk, images, job, transform, side, options)
        job.run(batches_of(len(images), CHUNK), functools.partial(_map, images, task, options.workers), "img")
        _finish(images, job, side, options)
    elif zipped or not to_zip:
        note(f"{dest} is complete: nothing to do")
    if to_zip:
        if not zipped:
            _write_zip(job.dest, dest)
        shutil.rmtree(job.dest, ignore_errors=True)


def _convert_chunk(images, job, transform, side, options, chunk):
    """Convert the images of a chunk to side × side; returns, for Job.run, {index: reason} of those left out, and ()."""
    left_out = {}
    for index in chunk:
        result, reason = images.read_or_skip(index, options.skip_bad, transform)
        if result is None:
            left_out[index] = reason or TOO_SMALL
            continue
        width, height = result.size
        becomes = f"{images.where(index)} becomes {width}x{height}"
        if width != height or width & (width - 1):
            raise InputError(f"{becomes}; --resolution must lead to a square, a power of two")
        if width != side:
            raise InputError(f"{becomes}, others {side}x{side}; give --resolution")
        buffer = io.BytesIO()
        result.save(buffer, **FORMATS[options.format][1])
        job.put(image_name(index, options.format), buffer.getbuffer())
    return left_out, ()


def _map(images, task, workers, chunks):
    """Results of the task on the chunks, in order, in this process or in forked ones."""
    workers = min(workers or cores_of_process(), len(chunks))
    if workers <= 1:
        yield from map(task, chunks)
        return
    context = multiprocessing.get_context("fork")  # a fork shares names and labels
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (images, task)) as pool:
        yield from pool.map(_run_chunk, chunks)


_TASK = None  # set in a worker process


def _start_worker(images, task):
    global _TASK
    _TASK = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which ends its workers
    images.reopen()

    def end_with_parent():  # a killed command must leave nobody behind
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_chunk(chunk):
    return _TASK(chunk)


def _finish(images, job, side, options):
    kept, left_out = job.kept(images.names)
    labels, class_names, num_classes = images.classes(kept, {name for name, why in left_out if why != TOO_SMALL})
    manifest = {"kind": "images", "layout": "folder", "count": len(kept), "resolution": side}
    manifest |= {"transform": job.ticket["transform"], "image_format": options.format, "num_classes": num_classes}
    manifest |= {"class_names": class_names, "left_out": left_out, "versions": versions()}
    sources, names = [images.names[index] for index in kept], [image_name(index, options.format) for index in kept]
    job.remove_stale(names)
    job.finish({NAMES: pack_names(sources), LABELS_JSON: label_json(names, labels)}, manifest)
    which = f" ({class_names[0]} … {class_names[-1]})" if class_names else ""
    note(f"{job.dest}: {len(kept)} images, {len(left_out)} left out, classes: {num_classes or 'none'}{which}")
    if NO_LABEL in labels and num_classes != 1:  # a single class has no labels, as published
        first = sources[labels.tolist().index(NO_LABEL)]
        note(f"WITHOUT LABELS: {first} is in no class folder and no {LABELS_JSON}; training needs labels or captions")


def _warn_of_splits(images):
    """Warn if the class folders look like the splits of a data set."""
    splits = [name for name in images.folders or () if name.lower().rstrip("0123456789_-") in SPLITS]
    if splits:
        separator = ":" if images.path.is_file() else "/"  # FILE.zip:FOLDER
        choice = f"--source {images.path}{separator}{splits[0]} takes that alone"
        note(f"warning: {', '.join(splits)} in {images.path} would be classes; {choice}")


def _zip_is_complete(dest, ticket):
    if not dest.exists():
        return False
    try:
        with zipfile.ZipFile(regular(dest)) as archive:
            found = DataManifest.parse(archive.read(MANIFEST), dest / MANIFEST).job
    except (zipfile.BadZipFile, KeyError, InputError):
        found = None
    if found != ticket:
        raise InputError(f"--dest {dest} exists and holds something else; name another")
    return True


def _write_zip(folder, dest):
    """Pack a finished folder into a stored zip, images in order, and rename it into place."""
    images = sorted(name for name, _ in walk(folder) if "/" in name)

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in Progress([*images, LABELS_JSON, NAMES, MANIFEST], unit="file", desc="zip"):
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # a fixed date: the same images give the same zip
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, (folder / name).read_bytes())

    write_atomically(dest, write)
