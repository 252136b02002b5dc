"""A result: a picture, or many images in a folder, an npz and a manifest, made by all processes."""

import dataclasses
import datetime
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.files import check_writable, named_full_disk, write_json
from common.pictures import save_grid
from sampling.manifest import SampleManifest, build_manifest, manifest_path, read_manifest
from sampling.stores import PartFiles, pack, prepare_folder, write_in_threads


def save_picture(sampler, processes):
    """--grid: one picture and its manifest, in one process; returns its path. Raises InputError."""
    config = sampler.config
    if processes.world > 1:
        raise InputError("--grid is made by one process; start it with plain python")
    check_writable(config.out, "--out")
    batches = split(config.num_fid_samples, config.per_proc_batch_size)
    images = [rows for _, rows in tqdm(sampler.batches(batches), total=len(batches), unit="batch")]
    _, columns = config.grid_size()
    with named_full_disk(config.out):
        save_grid(np.concatenate(images), columns, config.out, sampler.condition.captions())
        write_json(manifest_path(config.out), build_manifest(sampler).to_json())
    print(f"{config.out}: {config.grid} images, {sampler.cost.evaluations} model evaluations each", flush=True)
    return Path(config.out)


def save_images(sampler, processes):
    """Make many images, each process its share of the batches; returns the path of the npz. Raises InputError."""
    start = time.perf_counter()
    result = Result.of(sampler)
    todo = processes.share("todo", result.plan() if processes.is_main else None)
    missing = sum(count for _, count in todo or [])
    if processes.is_main:
        result.say_plan(missing)
    sample_share(sampler, result.store, todo or [], processes)
    if processes.is_main:
        result.finish(is_new=todo is not None)
        result.say(missing, time.perf_counter() - start)
    return result.target


def split(count, size):
    """Batches of image indices. They hold the same images on any number of processes, so pixels do not depend on it."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def sample_share(sampler, store, todo, processes):
    """Make this process's share of the batches `todo`; the first process returns when all are made.

    A batch is always sampled whole, so that its pixels are those of an undisturbed run; what exists is not rewritten.
    """
    config = sampler.config
    batches = split(config.num_fid_samples, config.per_proc_batch_size)
    mine = todo[processes.rank :: processes.world]
    missing = sum(count for _, count in todo)
    before = config.num_fid_samples - missing
    bar = tqdm(
        initial=before,
        total=config.num_fid_samples,
        unit="image",
        disable=not (processes.is_main and missing),
        mininterval=1,
        smoothing=0.05,
    )
    with bar:
        made = sampler.batches([batches[number] for number, _ in mine])
        for _, (_, count) in zip(write_in_threads(store.write, made), mine, strict=True):
            show_progress(bar, before + processes.count("images", count))
        processes.count("finished processes", 1)
        while processes.is_main and processes.count("finished processes") < processes.world:
            time.sleep(0.2)
            show_progress(bar, before + processes.count("images"))
        show_progress(bar, before + processes.count("images"))


def show_progress(bar, made):
    """Move the bar to `made` images, of all processes."""
    bar.update(made - bar.n)


@dataclasses.dataclass
class Result:
    """Many images of one manifest: finished ones in a store, in the end an npz beside it."""

    sampler: object
    manifest: SampleManifest
    store: object
    target: Path  # the npz

    @classmethod
    def of(cls, sampler):
        config = sampler.config
        folder = Path(config.sample_dir) / result_name(sampler)
        if config.decode and config.format != "npz":
            store = sampler.condition.image_store(folder)
        else:
            store = PartFiles(folder, "arr_0" if config.decode else "latents")
        return cls(sampler, build_manifest(sampler), store, folder.with_name(folder.name + ".npz"))

    @property
    def settings(self):
        return self.manifest.settings(self.store.kind)

    def plan(self):
        """Prepare the folder; returns [[batch number, images that it lacks], …], None where all is done.

        Raises InputError where the folder holds other images.
        """
        config = self.sampler.config
        check_writable(self.target, "--sample-dir:")
        prepare_folder(self.store.folder, self.settings, config.resume)
        if self.is_packed():
            return None
        missing = set(self.store.missing(config.num_fid_samples))
        batches = split(config.num_fid_samples, config.per_proc_batch_size)
        counts = [len(missing.intersection(batch)) for batch in batches]
        return [[number, count] for number, count in enumerate(counts) if count]

    def is_packed(self):
        """Whether the npz of these very images is finished and its parts are gone: nothing is left to do."""
        record = manifest_path(self.target)
        if self.store.kind != "parts" or not (self.target.exists() and record.exists()):
            return False
        found = read_manifest(record)
        same_count = found.num_fid_samples == self.manifest.num_fid_samples
        return same_count and found.settings(self.store.kind) == self.settings

    def finish(self, is_new):
        """Write npz and manifest: exactly --num-fid-samples images, checked. Raises InputError.

        is_new: False where they were finished before.
        """
        config = self.sampler.config
        if is_new:
            # an npz of another number of images is not left beside a folder that it contradicts
            with_npz = config.format != "png" or self.target.exists()
            pack(self.store, self.target if with_npz else None, config.num_fid_samples)
            with named_full_disk(self.target):
                write_json(manifest_path(self.target), self.manifest.to_json())
        else:
            self.target.touch()  # script/measure.sh takes the newest
        self.store.clear()

    def say_plan(self, missing):
        """One line: what is going to be made of what."""
        config, cost = self.sampler.config, self.sampler.cost
        print(
            f"{config.ckpt} ({config.weights} weights, step {self.sampler.checkpoint.steps}): "
            f"{config.num_fid_samples} images, {missing} of them missing, {config.mode}, {cost.calls} forward passes "
            f"per batch, {cost.guided} of them guided -> {self.store.folder}",
            flush=True,
        )

    def say(self, made, seconds):
        """One line: how many images, at what cost, in what time, where."""
        evaluations = self.sampler.cost.evaluations
        places = [] if self.store.kind == "parts" else [f"{self.store.folder}/"]
        places += [str(path) for path in (self.target, manifest_path(self.target)) if path.exists()]
        print(
            f"{made} images in {datetime.timedelta(seconds=round(seconds))}, {evaluations} model evaluations "
            f"each ({made * evaluations} in all); {', '.join(places)}",
            flush=True,
        )


def result_name(sampler):
    """MODEL-CKPT-size-R-vae-V-cfg-S-seed-N-MODE, as published; latents have a name of their own."""
    config, ckpt = sampler.config, Path(sampler.config.ckpt)
    model = config.model or sampler.checkpoint.run.get("model") or "model"
    vae = sampler.spec.vae.removeprefix("stabilityai/sd-vae-ft-").rstrip("/").split("/")[-1]
    return (
        f"{model.replace('/', '-')}-{ckpt.name if ckpt.is_dir() else ckpt.stem}-size-{sampler.resolution}-vae-{vae}"
        f"-cfg-{config.cfg_scale}-seed-{config.global_seed}-{config.mode}" + ("" if config.decode else "-latents")
    )
