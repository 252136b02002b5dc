"""A result: a picture, or many images in a folder, an npz and a manifest, made by all processes."""

import datetime
import hashlib
import re
import time
import zipfile
from pathlib import Path

import numpy as np

from common.errors import InputError, note, say
from common.files import check_writable, locked, sha256_of_files, write_json
from common.look_ahead import ordered_map
from common.pictures import save_grid
from common.progress import Progress
from models.checkpoints import CONFIG_FILE
from models.specs import LatentSpec
from sampling.manifest import build_manifest, changed_setting, manifest_path, read_manifest
from sampling.stores import PartFiles, pack, prepare_folder


def save_picture(sampler, processes):
    """--grid: one picture and its manifest, in one process; returns its path. Raises InputError."""
    config, record = sampler.config, manifest_path(sampler.config.out)
    if processes.world > 1:
        raise InputError("--grid is made by one process; start it with plain python")
    with locked(config.out, "--out"):
        for path in (config.out, record):
            check_writable(path, "--out")
        manifest, batches = build_manifest(sampler), config.batches()
        images = [wait() for _, wait in Progress(sampler.batches(batches), total=len(batches), unit="batch")]
        _, columns = config.grid_size()
        save_grid(np.concatenate(images), columns, config.out, **sampler.condition.words(columns))
        write_json(record, manifest.to_json())
    evaluations = rounded(sampler.cost.evaluations)
    say(f"{config.out}: a {config.grid} grid from {config.ckpt}, {evaluations} model evaluations each")
    say("next: the same command with --num-fid-samples 50000 instead of --grid")
    return Path(config.out)


def save_images(sampler, processes):
    """Make many images, each process its share of the batches; returns the path of the npz. Raises InputError."""
    start = time.perf_counter()
    result = Result(sampler)
    with locked(result.store.folder, "--sample-dir", processes.is_main):
        todo = processes.share("todo", result.plan() if processes.is_main else None)
        sample_share(sampler, result.store, todo, processes)
        if processes.is_main:
            result.finish()
            result.say_cost(sum(count for _, count in todo), time.perf_counter() - start)
    return result.target


def sample_share(sampler, store, todo, processes):
    """Make this process's share of the batches `todo`; the first process returns when all are made.

    A batch is always sampled whole, so that its pixels are those of an undisturbed run; what exists is not rewritten.
    """
    batches, total = sampler.config.batches(), sampler.config.num_fid_samples
    mine = todo[processes.rank :: processes.world]
    missing = sum(count for _, count in todo)
    quiet = not (processes.is_main and missing)
    with Progress(initial=total - missing, total=total, unit="image", disable=quiet) as bar:

        def show_progress(made):  # by all processes
            bar.update(total - missing + made - bar.n)

        samples = sampler.batches([batches[number] for number, _ in mine])
        # what was sampled before an error is still written
        written = ordered_map(lambda batch: store.write(batch[0], batch[1]()), samples, 3, threads=4, finish=True)
        for _, (_, count) in zip(written, mine, strict=True):
            show_progress(processes.count("images", count))
        while processes.is_main and bar.n < total:
            time.sleep(0.2)
            processes.check_others()
            show_progress(processes.count("images"))


class Result:
    """Many images of one manifest: finished ones in a store, in the end an npz (`target`) beside it."""

    def __init__(self, sampler):
        config = self.config = sampler.config
        folder = Path(config.sample_dir, result_name(sampler))
        if config.decode and config.format != "npz":
            self.store = sampler.condition.image_store(folder)
        else:
            self.store = PartFiles(folder, "arr_0" if config.decode else "latents")
        self.sampler, self.manifest, self.target = sampler, build_manifest(sampler), Path(f"{folder}.npz")
        self.record = manifest_path(self.target)

    def plan(self):
        """Prepare the folder and say what is to be made; returns [[batch number, images that it lacks], …].

        Raises InputError if the folder holds other images.
        """
        config, cost, count = self.config, self.sampler.cost, self.config.num_fid_samples
        for path in (self.target, self.record):
            check_writable(path, "--sample-dir:")
        self.check_nothing_is_lost()
        self.store.sealed = prepare_folder(self.store.folder, self.manifest.settings(self.store.kind), config.resume)
        self.is_packed = self.has_npz()
        missing = set() if self.is_packed else set(self.store.missing(count))
        if missing:
            settings = ", ".join([config.mode, *branch_words(config)])
            say(
                f"{config.ckpt} ({config.weights} weights, step {self.sampler.checkpoint.steps}): {count} images, "
                f"{len(missing)} of them missing, {settings}, {cost.calls} forward passes per batch, "
                f"{cost.guided_calls} of them guided -> {self.store.folder}"
            )
        counts = [len(missing.intersection(batch)) for batch in config.batches()]
        return [[number, count] for number, count in enumerate(counts) if count]

    def check_nothing_is_lost(self):
        """Raise InputError if there are more images than are asked for."""
        count, there = self.config.num_fid_samples, self.target.exists() and self.record.exists()
        made = read_manifest(self.record, "delete it to make the samples again").num_fid_samples if there else 0
        if (made or 0) > count or self.store.has_more(count):
            fault = f"{self.store.folder} has more images than --num-fid-samples {count}; the others would be lost"
            raise InputError(f"{fault}; pass another --sample-dir, or delete that folder and {self.target}")

    def has_npz(self):
        """Whether the npz of these very images is finished: its parts may be gone, and nothing is left to do."""
        kind, wanted = self.store.kind, self.manifest
        if kind != "parts" or not (self.target.is_file() and self.record.exists()):
            return False
        found = read_manifest(self.record, "delete it to make the samples again")
        changed = changed_setting(found.settings(kind), wanted.settings(kind), self.record)
        if changed or found.num_fid_samples != wanted.num_fid_samples:
            return False
        # earlier versions did not write a SHA-256
        is_whole = zipfile.is_zipfile(self.target) and found.npz_sha256 in (None, sha256_of_files(self.target))
        if not is_whole:
            note(f"{self.target} is damaged, or does not match {self.record}; it is made again")
        return is_whole

    def finish(self):
        """Write npz and manifest, unless they are there: exactly --num-fid-samples images. Raises InputError."""
        count = self.config.num_fid_samples
        if self.is_packed:
            self.target.touch()  # script/measure.sh uses the newest
        else:
            # an npz of another number of images is not left beside a folder that it contradicts
            with_npz = self.config.format != "png" or self.target.exists()
            self.manifest.npz_sha256 = pack(self.store, self.target if with_npz else None, count)
            write_json(self.record, self.manifest.to_json())
        self.store.finish()

    def say_cost(self, made, seconds):
        """Print number of images, time, cost, place and a next command, or one line if all were finished before."""
        evaluations, duration = self.sampler.cost.evaluations, datetime.timedelta(seconds=round(seconds))
        each, all_ = rounded(evaluations), rounded(made * evaluations)
        cost = f"{made} images in {duration}, {each} model evaluations each ({all_} in all)"
        places = ", ".join(str(path) for path in (self.store.folder, self.target, self.record) if path.exists())
        say(f"{cost if made else f'finished before: {self.config.num_fid_samples} images'}; {places}")
        if not made:
            return
        samples = self.target if self.target.exists() else self.store.folder
        measure = f"python -m evaluations.evaluator REFERENCE.npz {samples} --json"
        say(f"next: {measure if self.config.decode else 'the same command without --no-decode'}")


def rounded(evaluations):
    """Model evaluations as they are printed: 6, 5.33."""
    return f"{evaluations:.2f}".rstrip("0").rstrip(".")


def branch_words(config):
    """`ig-scale 1.5`, … of the BRANCH_FLAGS that are set."""
    return [f"{name.replace('_', '-')} {value}" for name, value in config.branch_settings().items()]


def condition_words(config):
    """`labels balanced` or `prompts FILE` if these are not random labels; long or several values as a hash."""
    labels, prompts = getattr(config, "labels", "random"), getattr(config, "prompts", None)
    name, *values = ("prompts", *prompts) if prompts else ("labels", labels)
    text = Path(values[0]).name
    if len(values) > 1 or len(text) > 32:
        text = hashlib.sha256("\n".join(values).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return [] if text == "random" else [name, text]


def decoder_word(sampler):
    """`vae-HASH` of its weights if --vae has another decoder than the training data's; its path may change."""
    own, used = (spec.decoder_sha256 for spec in (sampler.checkpoint.data_as(LatentSpec), sampler.spec))
    return "" if None in (own, used) or own == used else f"vae-{used[:8]}"


def default_folder(ckpt):
    """Parent folder of a checkpoint's results; inside its run, whose `samples` holds the grids from training."""
    folder = Path(ckpt).parent
    in_run = folder.name == "checkpoints" and (folder.parent / CONFIG_FILE).is_file()
    return str(folder.parent / "generated") if in_run else "samples"


def result_name(sampler):
    """RUN-STEP-MODE-STEPS-…-seed-N, with what differs from the defaults; the manifest has all settings."""
    config, found, ckpt = sampler.config, sampler.checkpoint, Path(sampler.config.ckpt)
    low, high, guided = config.guidance_low, config.guidance_high, config.cfg_scale != 1.0
    words = [
        found.run.get("exp_name") or config.model or "",
        (ckpt.name if ckpt.is_dir() else ckpt.stem) if found.steps is None else f"{found.steps:07d}",
        "raw" * (config.weights == "raw"),
        f"{config.mode}{'-heun' * config.heun}-{config.num_steps}",
        f"shift-{config.shift}" * (config.shift != 1.0),
        f"cfg-{config.cfg_scale}" * guided,
        f"interval-{low}-{high}" * (guided and (low, high) != (0.0, 1.0)),
        *branch_words(config),
        *condition_words(config),
        decoder_word(sampler),
        config.dtype * (config.dtype != "fp32"),
        f"vae-{config.vae_dtype}" * (config.vae_dtype != "fp32"),
        "no-tf32" * (not config.tf32),
        "no-fused-attn" * (not config.fused_attn),
        f"seed-{config.global_seed}",
        "latents" * (not config.decode),
    ]
    return re.sub(r"[^\w.=+-]+", "-", "-".join(filter(None, words)))
