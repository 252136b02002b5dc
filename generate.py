"""Sample images from a checkpoint, as PNG files and an npz for ADM-style evaluation.

    python generate.py --ckpt exps/first/checkpoints/0400000.pt --num-fid-samples 64
    python generate.py --ckpt CKPT --grid 8x8 --classes 207,360 --seed 0 --out grid.png
    torchrun --nproc-per-node 8 generate.py --ckpt CKPT --num-fid-samples 50000 --mode sde --num-steps 250

Writes SAMPLE_DIR/MODEL-CKPT-size-R-vae-V-cfg-S-seed-N-MODE/000000.png …, and that name + .npz (`arr_0`, uint8 NHWC) and
.json (the manifest). Image i depends on (seed, i) alone, whatever the number of processes and the batch size.
Interrupted runs go on where they stopped.
"""

import dataclasses
import datetime
import hashlib
import json
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, exit_on_input_error
from common.files import check_writable, named_full_disk, write_json
from common.flags import flag, parse_flags, required, shown
from common.look_ahead import ordered_map
from common.pictures import save_grid
from common.processes import Processes
from models import PRESETS, load_checkpoint
from models.codec import LatentCodec, LatentSpec
from models.paths import PATHS
from samplers import (
    Guidance,
    GuidedVelocity,
    RestartStep,
    labels_in_turn,
    map_times,
    ode_times,
    sample_labels,
    sample_map,
    sample_noise,
    sample_ode,
    sample_sde,
    sde_times,
)
from sampling.stores import BackgroundWriter, PartFiles, PngFiles, pack, prepare_folder
from training.distributed import set_math

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Mode:
    """A row of the table of samplers."""

    num_steps: int  # by default
    times: object  # configuration → time grid
    run: object  # (config, path, velocity, start, noise) → state at t = 0; noise(step): noise of a step
    is_map: bool = False  # needs a flow map, and is given its average velocity


MODES = {
    "sde": Mode(
        num_steps=250,
        times=lambda config: sde_times(config.num_steps),
        run=lambda config, path, velocity, start, noise: sample_sde(velocity, start, path, noise, config.num_steps),
    ),
    "ode": Mode(
        num_steps=50,
        times=lambda config: ode_times(config.num_steps),
        run=lambda config, path, velocity, start, noise: sample_ode(velocity, start, config.num_steps, config.heun),
    ),
    "euler": Mode(
        num_steps=4,
        times=lambda config: map_times(config.num_steps, config.shift),
        run=lambda config, path, u, start, noise: sample_map(u, start, config.num_steps, config.shift),
        is_map=True,
    ),
    "restart": Mode(
        num_steps=4,
        times=lambda config: map_times(config.num_steps, config.shift),
        run=lambda config, path, u, start, noise: sample_map(
            u, start, config.num_steps, config.shift, RestartStep(path, noise)
        ),
        is_map=True,
    ),
}


@dataclasses.dataclass
class GenerateConfig:
    """What generate.py can be told. None means: as the checkpoint says."""

    ckpt: str = required("checkpoint of ours, an exported folder, or a published file (DeepFlow, SiT, REPA, DMF)")
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"])
    model: str = flag(None, "preset name", str, choices=list(PRESETS))
    trans_depth: int = flag(None, "number of blocks", int)
    df_idxs: str = flag(None, "blocks (from 1) after which a branch ends: [8,16], 8,16 or 8 16", str, nargs="+")
    dmf_depth: int = flag(None, "of a published flow map: number of blocks that see t", int)
    qk_norm: bool = flag(None, "normalised queries and keys", bool)
    legacy_scaling: bool = flag(None, "clamp the time-gap scale to [-5, 5] (SSL-aligned release)", bool)
    ssl_align: bool = flag(None, "the model was trained with SSL alignment", bool)
    projector_embed_dims: str = flag(None, "accepted for published scripts; unused, the file says it", str)
    fused_attn: bool = flag(True, "fused attention kernels")
    path_type: str = flag(None, "probability path; linear where the file does not say", str, choices=list(PATHS))
    resolution: int = flag(None, "image size", int)
    num_classes: int = flag(None, "number of classes", int)
    vae: str = flag(None, "ema, mse, a hub name or a folder; default: the one of the training data", str)

    mode: str = flag("sde", "sampler; euler and restart are for flow maps", choices=list(MODES))
    num_steps: int = flag(None, "steps; default 250 for sde, 50 for ode, 4 for euler and restart", int)
    shift: float = flag(1.0, "of flow maps: times are s*t / (1 + (s - 1)*t) of even ones")
    heun: bool = flag(False, "second-order steps for ode")
    cfg_scale: float = flag(1.0, "classifier-free guidance; 1.0 is none")
    guidance_low: float = flag(0.0, "guide only at t >= this (t = 0 is data)")
    guidance_high: float = flag(1.0, "guide only at t <= this (t = 1 is noise)")
    global_seed: int = flag(0, "seed; image i depends on it and on i", also=["--seed"])
    labels: str = flag("random", "random, balanced, or classes to take in turn: 207,360 or a file with one per line")
    dtype: str = flag("fp32", "arithmetic of the network; the sampler's state is float64", choices=list(DTYPES))
    vae_dtype: str = flag("fp32", "arithmetic of the decoder", choices=list(DTYPES))
    tf32: bool = flag(True, "TF32 matrix products on GPUs that have them")
    compile: bool = flag(False, "compile the network: minutes at the start, faster steps")
    per_proc_batch_size: int = flag(32, "images per forward pass and process")
    decode_batch_size: int = flag(32, "images that are decoded at once")

    sample_dir: str = flag("samples", "parent folder of the results")
    num_fid_samples: int = flag(50_000, "number of images")
    format: str = flag("both", "what is written", choices=["npz", "png", "both"])
    decode: bool = flag(True, "decode to images; --no-decode writes an npz of latents")
    resume: bool = flag(True, "go on where an interrupted run stopped; --no-resume refuses a folder with images")
    grid: str = flag(None, "ROWSxCOLUMNS: write one picture to look at, and nothing else", str)
    classes: str = flag(None, "classes of the picture, 207,360: as many images of each, one after the other", str)
    out: str = flag(None, "file of the picture; default grid.png", str)

    def check(self):
        """Raise InputError for values that make no sense; fills num_steps and what --grid stands for."""
        self.num_steps = MODES[self.mode].num_steps if self.num_steps is None else self.num_steps
        if self.grid:
            self.check_grid()
        elif self.classes or self.out:
            raise InputError("--classes and --out belong to --grid; for many images pass --labels and --sample-dir")
        for name in ("num_fid_samples", "per_proc_batch_size", "decode_batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{shown(name)} {getattr(self, name)} must be at least 1")
        if self.global_seed < 0:
            raise InputError(f"--global-seed {self.global_seed} must not be negative")
        if self.heun and self.mode != "ode":
            raise InputError("--heun is a method for the ODE; pass --mode ode")
        if not 0 < self.shift < float("inf"):
            raise InputError(f"--shift {self.shift} must be greater than 0 and finite; 1.0 leaves the times even")
        if self.shift != 1.0 and not MODES[self.mode].is_map:
            raise InputError("--shift moves the times of flow maps; pass --mode euler or restart")
        if not self.decode and (self.format == "png" or self.grid):
            raise InputError("--no-decode keeps latents, in an npz; leave out --format png and --grid")
        if self.projector_embed_dims:
            print("--projector-embed-dims is unused: the checkpoint says what it holds", flush=True)

    def check_grid(self):
        """Turn --grid and --classes into a number of images and their labels, or InputError."""
        rows, columns = self.grid_size()
        cells = self.num_fid_samples = rows * columns
        self.out = self.out or "grid.png"
        if Path(self.out).suffix.lower() != ".png":
            raise InputError(f"--out {self.out} must end in .png; its manifest lies beside it in a .json")
        if self.classes:
            classes = self.classes.split(",")
            if len(classes) > cells:
                raise InputError(f"--classes names {len(classes)} classes for {cells} images; pass a larger --grid")
            self.labels = ",".join(classes[i * len(classes) // cells].strip() for i in range(cells))

    def grid_size(self):
        """--grid as (rows, columns)."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.grid)
        if not match:
            raise InputError(f"--grid {self.grid!r} is not of the form 8x8 (rows x columns)")
        return int(match[1]), int(match[2])


def open_checkpoint(config):
    """Checkpoint, its path object and the LatentSpec of its data; flags that contradict the file are InputErrors."""
    checkpoint = load_checkpoint(
        config.ckpt,
        config.weights,
        depth=config.trans_depth,
        df_idxs=config.df_idxs,
        dmf_depth=config.dmf_depth,
        legacy_scaling=config.legacy_scaling,
        ssl_align=config.ssl_align,
        num_classes=config.num_classes,
    )
    if config.qk_norm not in (None, bool(checkpoint.options["qk_norm"])):
        raise InputError(f"--qk-norm contradicts {config.ckpt}, which has {checkpoint.options['qk_norm']}")
    if MODES[config.mode].is_map and "dmf_depth" not in checkpoint.options:
        raise InputError(
            f"--mode {config.mode} needs a flow map, {config.ckpt} is a flow model; pass --mode sde or ode, "
            "or --dmf-depth for a published flow map without log-variance head"
        )
    names = {field.name for field in dataclasses.fields(LatentSpec)}
    spec = LatentSpec(**{name: value for name, value in checkpoint.data.items() if name in names})
    check_model_name(config, checkpoint)
    answers = {
        "path_type": checkpoint.run.get("path_type"),
        "resolution": checkpoint.options["input_size"] * spec.factor,
    }
    for name, answer in answers.items():
        given = getattr(config, name)
        if given is not None and answer is not None and given != answer:
            raise InputError(f"{shown(name)} {given} contradicts {config.ckpt}, which has {answer}")
    return checkpoint, PATHS[answers["path_type"] or config.path_type or "linear"], spec


def check_model_name(config, checkpoint):
    """Raise InputError where --model names another model than the file holds."""
    own = checkpoint.run.get("model")
    if config.model is None or config.model == own:
        return
    preset, options = PRESETS[config.model], checkpoint.options
    fits = (preset.hidden_size, preset.patch_size) == (options["hidden_size"], options["patch_size"])
    fits = fits and (config.trans_depth or preset.depth) == options["depth"]
    fits = fits and bool(preset.df_idxs) == bool(options["df_idxs"])
    if own or not fits or bool(preset.dmf_depth) != ("dmf_depth" in options):
        raise InputError(
            f"--model {config.model} contradicts {config.ckpt}, which holds "
            f"{own or 'depth {depth}, width {hidden_size}, key layers {df_idxs}'.format(**options)}"
        )


def read_labels(text, num_classes):
    """Classes to take in turn: `207,360`, or a text file with one per line. Raises InputError."""
    if re.fullmatch(r"\d+(,\d+)*", text):
        words = text.split(",")
    else:
        try:
            words = Path(text).read_text().split()
        except (OSError, UnicodeDecodeError):
            raise InputError(
                f"--labels {text} is neither random, balanced, a list like 207,360 nor a readable text file"
            ) from None
    wrong = [word for word in words if not word.isdecimal() or int(word) >= num_classes]
    if wrong or not words:
        raise InputError(
            f"--labels {text}: {wrong[0] if wrong else 'nothing'!r} is no class of 0 ... {num_classes - 1}"
        )
    return [int(word) for word in words]


def label_source(config, num_classes):
    """Function from image indices to int64 labels (N,), as --labels asks. Raises InputError."""
    if config.labels == "random":
        return lambda indices: sample_labels(config.global_seed, indices, num_classes)
    classes = range(num_classes) if config.labels == "balanced" else read_labels(config.labels, num_classes)
    return lambda indices: labels_in_turn(indices, classes)


def run_sampler(config, path, velocity, start, noise):
    """Carry starting noise to data with the configured sampler; noise(step): a sampler's step noise."""
    return MODES[config.mode].run(config, path, velocity, start, noise)


@dataclasses.dataclass
class Cost:
    """What one batch costs."""

    calls: int  # forward passes
    guided: int  # those of 2N rows
    draws: int  # arrays of noise, the starting noise included

    @property
    def evaluations(self):
        """Model evaluations of an image."""
        return self.calls + self.guided


def count_cost(config, path):
    """Cost of a batch: the sampler is run on one number to see. Raises InputError where guidance makes no sense."""
    guidance = Guidance(config.cfg_scale, config.guidance_low, config.guidance_high)
    guidance.check(MODES[config.mode].times(config))
    y, asked = torch.zeros(1, dtype=torch.long), []

    def noise(step):
        asked.append(step)
        return torch.zeros(1, 1, 1, 1)

    velocity = GuidedVelocity(lambda x, *_: torch.zeros_like(x), y, y, guidance)
    run_sampler(config, path, velocity, torch.zeros(1, 1, 1, 1), noise)
    return Cost(velocity.calls, velocity.guided_calls, draws=1 + len(asked))


class BatchNoise:
    """Noise of consecutive batches; while the network works, the next draw is made in a thread."""

    def __init__(self, seed, batches, draws, shape, device):
        self.seed, self.batches, self.draws, self.shape, self.device = seed, batches, draws, shape, device
        self.ahead = ordered_map(self.draw, range(len(batches) * draws))

    def draw(self, number):
        """Noise number `number` in the order of use, float32 on the CPU; None after the last."""
        batch, draw = divmod(number, self.draws)
        if batch >= len(self.batches):
            return None
        noise = sample_noise(self.seed, self.batches[batch], draw, self.shape)
        return noise.pin_memory() if self.device.type == "cuda" else noise

    def of(self, batch):
        """Function draw → noise (N, C, h, w) of batch number `batch`, on the device."""
        return lambda draw: next(self.ahead).to(self.device, non_blocking=True)

    def close(self):
        self.ahead.close()


class ImageSampler:
    """A checkpoint made ready to sample as configured: network, decoder, labels. Raises InputError."""

    def __init__(self, config, device):
        config.check()
        set_math(config.tf32, config.fused_attn)
        self.config, self.device = config, device
        self.checkpoint, self.path, self.spec = open_checkpoint(config)
        options = self.checkpoint.options
        self.shape = (options["in_channels"], options["input_size"], options["input_size"])
        self.prepare_labels()
        self.cost = count_cost(config, self.path)
        self.codec = None
        if config.decode:
            self.codec = LatentCodec.load(config.vae or self.spec.vae, device, DTYPES[config.vae_dtype])
            self.spec.check_same(self.codec.spec, config.ckpt, "--vae")
            self.spec = self.codec.spec
        self.weights_sha256 = self.checkpoint.weights_sha256()  # of the file's, before they are rounded to --dtype
        model = self.checkpoint.model.to(device, DTYPES[config.dtype])
        network = model.average_velocity if MODES[config.mode].is_map else model.velocity
        # each batch shape its own graph: N and 2N rows, and the last batch's
        self.network = torch.compile(network, dynamic=False, fullgraph=True) if config.compile else network

    def prepare_labels(self):
        """Make ready what `conditions` and `label_facts` need."""
        if "num_classes" not in self.checkpoint.options:
            raise InputError(f"{self.config.ckpt} is a text-to-image model; sample it with generate_t2i.py")
        self.num_classes = self.checkpoint.options["num_classes"]
        self.labels = label_source(self.config, self.num_classes)

    def conditions(self, indices):
        """The condition and the null condition of the images `indices`, on the device."""
        y = self.labels(indices).to(self.device)
        return y, torch.full_like(y, self.num_classes)

    def label_facts(self):
        """What the manifest says of the labels: `label_mode`, `labels` of all images, `labels_sha256` of a file."""
        mode = self.config.labels
        is_file = mode not in ("random", "balanced") and Path(mode).is_file()
        return {
            "label_mode": mode,
            "labels": self.labels(range(self.config.num_fid_samples)).tolist(),
            "labels_sha256": hashlib.sha256(Path(mode).read_bytes()).hexdigest() if is_file else None,
        }

    def captions(self):
        """What is written below the images of a picture; nothing."""
        return None

    def open_store(self, folder):
        """Where finished images are kept."""
        if self.config.decode and self.config.format != "npz":
            return PngFiles(folder)
        return PartFiles(folder, "arr_0" if self.config.decode else "latents")

    @property
    def resolution(self):
        return self.shape[1] * self.spec.factor

    def latents(self, indices, noise):
        """Latents (N, C, h, w), float32, of the images `indices`; noise(draw): their noise on the device."""
        config = self.config
        y, y_null = self.conditions(indices)
        guidance = Guidance(config.cfg_scale, config.guidance_low, config.guidance_high)
        velocity = GuidedVelocity(self.network, y, y_null, guidance, DTYPES[config.dtype])
        latents = run_sampler(config, self.path, velocity, noise(0), lambda step: noise(step + 1))
        if not torch.isfinite(latents).all():
            remedy = "the weights are damaged or diverged" if config.dtype == "fp32" else "try --dtype fp32"
            raise InputError(
                f"{config.ckpt} gives samples that are not finite (images {indices[0]}..{indices[-1]}); {remedy}"
            )
        return latents.float()

    def batches(self, batches):
        """Yield (indices, rows) for every batch: uint8 images (N, R, R, 3), or float32 latents with --no-decode."""
        noise = BatchNoise(self.config.global_seed, batches, self.cost.draws, self.shape, self.device)
        try:
            for number, indices in enumerate(batches):
                rows = self.latents(indices, noise.of(number))
                if self.codec is not None:
                    rows = self.codec.decode(rows, self.config.decode_batch_size)
                yield indices, rows.cpu().numpy()
        finally:
            noise.close()


def split(count, size):
    """Batches of image indices. They hold the same images on any number of processes, so pixels do not depend on it."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def result_name(sampler):
    """MODEL-CKPT-size-R-vae-V-cfg-S-seed-N-MODE, as published; latents have a name of their own."""
    config = sampler.config
    model = config.model or sampler.checkpoint.run.get("model") or "model"
    ckpt = Path(config.ckpt).name if Path(config.ckpt).is_dir() else Path(config.ckpt).stem
    vae = sampler.spec.vae.removeprefix("stabilityai/sd-vae-ft-").rstrip("/").split("/")[-1]
    return (
        f"{model.replace('/', '-')}-{ckpt}-size-{sampler.resolution}-vae-{vae}-cfg-{config.cfg_scale}"
        f"-seed-{config.global_seed}-{config.mode}" + ("" if config.decode else "-latents")
    )


# What changes no image, or only its rounding. A checkpoint may be copied or moved: its weights decide.
FREE = ("versions", "ckpt", "num_fid_samples", "per_proc_batch_size", "decode_batch_size", "compile", "format")
# Flags that the manifest leaves out: they decide no image, or only say what `model_options` says.
UNLISTED = ("sample_dir", "projector_embed_dims", "resume", "grid", "classes", "out", "num_classes", "resolution")
UNLISTED += ("trans_depth", "df_idxs", "dmf_depth", "qk_norm", "legacy_scaling", "ssl_align")


def build_manifest(sampler):
    """What the images are made of, JSON-like; the same command gives the same manifest."""
    config, checkpoint, cost = sampler.config, sampler.checkpoint, sampler.cost
    settings = {**dataclasses.asdict(config), "path_type": sampler.path.name, "vae": sampler.spec.vae}
    settings = {key: value for key, value in settings.items() if key not in UNLISTED}
    return {
        **settings,
        **sampler.label_facts(),
        "model": checkpoint.run.get("model") or config.model,
        "model_options": checkpoint.options,
        "latents": dataclasses.asdict(sampler.spec),
        "run": checkpoint.run.get("exp_name"),
        "step": checkpoint.steps,
        "weights_sha256": sampler.weights_sha256,
        "model_evaluations": cost.evaluations,
        "forward_passes": cost.calls,
        "guided_passes": cost.guided,
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def image_settings(manifest, store):
    """The part of a manifest that decides the images and how unfinished work is kept; flags first."""
    settings = {key: value for key, value in manifest.items() if key not in FREE and key != "label_mode"}
    return {**settings, "labels": manifest["label_mode"], "kept_as": store.kind}


def is_packed(store, target, manifest):
    """True where the npz of these very images is finished, whose parts are gone: nothing is left to do."""
    record = target.with_suffix(".json")
    if store.kind != "parts" or not (target.exists() and record.exists()):
        return False
    found, wanted = json.loads(record.read_text()), json.loads(json.dumps(manifest))
    same_count = found["num_fid_samples"] == wanted["num_fid_samples"]
    return same_count and image_settings(found, store) == image_settings(wanted, store)


def plan(config, store, target, manifest):
    """Prepare the folder; returns [[batch number, images that it lacks], …], None where all is done.

    Raises InputError where the folder holds other images.
    """
    check_writable(target, "--sample-dir:")
    prepare_folder(store.folder, image_settings(manifest, store), config.resume)
    if is_packed(store, target, manifest):
        return None
    missing = set(store.missing(config.num_fid_samples))
    batches = split(config.num_fid_samples, config.per_proc_batch_size)
    return [[n, len(missing.intersection(batch))] for n, batch in enumerate(batches) if not missing.isdisjoint(batch)]


def generate(config, make_sampler=ImageSampler):
    """Make a picture, or many images; returns the path of the picture or the npz. Raises InputError.

    Every process makes its share of the batches, the first one collects them.
    """
    processes = Processes.join()
    start = time.perf_counter()
    sampler = make_sampler(config, processes.device)
    if config.grid:
        return save_picture(sampler, processes)
    target = Path(config.sample_dir) / (result_name(sampler) + ".npz")
    manifest = build_manifest(sampler)
    store = sampler.open_store(target.with_name(target.name.removesuffix(".npz")))
    todo = processes.share("todo", plan(config, store, target, manifest) if processes.rank == 0 else None)
    missing = sum(count for _, count in todo or [])
    if processes.rank == 0:
        say_plan(sampler, store.folder, missing)
    sample_share(sampler, store, todo or [], processes)
    if processes.rank == 0:
        if todo is not None:
            collect(config, store, target, manifest)
        else:
            target.touch()  # script/measure.sh takes the newest
        store.clear()
        say_result(sampler, store, target, missing, time.perf_counter() - start)
    return target


def sample_share(sampler, store, todo, processes):
    """Make this process's share of the batches `todo`; the first process returns when all are made.

    A batch is always sampled whole, so that its pixels are those of an undisturbed run; what exists is not rewritten.
    """
    config, missing = sampler.config, sum(count for _, count in todo)
    batches = split(config.num_fid_samples, config.per_proc_batch_size)
    mine = todo[processes.rank :: processes.world]
    before = config.num_fid_samples - missing
    bar = tqdm(
        initial=before,
        total=config.num_fid_samples,
        unit="image",
        disable=processes.rank > 0 or not missing,
        mininterval=1,
        smoothing=0.05,
    )
    with bar, BackgroundWriter(store.write) as writer:
        made = sampler.batches([batches[number] for number, _ in mine])
        for (indices, rows), (_, count) in zip(made, mine, strict=True):
            writer.submit(indices, rows)
            show_progress(bar, before + processes.count("images", count))
        writer.drain()
        processes.count("finished processes", 1)
        while processes.rank == 0 and processes.count("finished processes") < processes.world:
            time.sleep(0.2)
            show_progress(bar, before + processes.count("images"))
        show_progress(bar, before + processes.count("images"))


def show_progress(bar, made):
    """Move the bar to `made` images, of all processes."""
    bar.update(made - bar.n)


def collect(config, store, target, manifest):
    """Write npz and manifest on the first process, exactly --num-fid-samples images, checked. Raises InputError."""
    # an npz of another number of images is not left beside a folder that it contradicts
    with_npz = config.format != "png" or target.exists()
    pack(store, target if with_npz else None, config.num_fid_samples)
    with named_full_disk(target):
        write_json(target.with_suffix(".json"), manifest)


def say_plan(sampler, folder, missing):
    """One line: what is going to be made of what."""
    config, cost = sampler.config, sampler.cost
    print(
        f"{config.ckpt} ({config.weights} weights, step {sampler.checkpoint.steps}): {config.num_fid_samples} images, "
        f"{missing} of them missing, {config.mode}, {cost.calls} forward passes per batch, {cost.guided} of them guided"
        f" -> {folder}",
        flush=True,
    )


def say_result(sampler, store, target, made, seconds):
    """One line: how many, how dear, how long, where."""
    places = [] if store.kind == "parts" else [f"{store.folder}/"]
    places += [str(path) for path in (target, target.with_suffix(".json")) if path.exists()]
    print(
        f"{made} images in {datetime.timedelta(seconds=round(seconds))}, {sampler.cost.evaluations} model evaluations "
        f"each ({made * sampler.cost.evaluations} in all); {', '.join(places)}",
        flush=True,
    )


def save_picture(sampler, processes):
    """--grid: one picture and its manifest, in one process; returns its path. Raises InputError."""
    config = sampler.config
    if processes.world > 1:
        raise InputError("--grid is made by one process; start generate.py with plain python")
    check_writable(config.out, "--out")
    batches = split(config.num_fid_samples, config.per_proc_batch_size)
    images = [rows for _, rows in tqdm(sampler.batches(batches), total=len(batches), unit="batch")]
    _, columns = config.grid_size()
    with named_full_disk(config.out):
        save_grid(np.concatenate(images), columns, config.out, sampler.captions())
        write_json(Path(config.out).with_suffix(".json"), build_manifest(sampler))
    print(f"{config.out}: {config.grid} images, {sampler.cost.evaluations} model evaluations each", flush=True)
    return Path(config.out)


if __name__ == "__main__":
    with exit_on_input_error():
        generate(parse_flags(GenerateConfig, description=__doc__.splitlines()[0]))
