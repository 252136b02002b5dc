"""Sample images from a checkpoint, as PNG files and an npz for ADM-style evaluation.

    python generate.py --ckpt exps/first/checkpoints/0400000.pt --num-fid-samples 64
    torchrun --nproc-per-node 8 generate.py --ckpt CKPT --num-fid-samples 50000 --mode sde --num-steps 250

Writes SAMPLE_DIR/MODEL-CKPT-size-R-vae-V-cfg-S-seed-N-MODE/000000.png …, and that name + .npz (`arr_0`, uint8 NHWC) and
.json (the manifest). Image i depends on (seed, i) alone, whatever the number of processes and the batch size.
Interrupted runs go on where they stopped.
"""

import dataclasses
import datetime
import json
import os
import platform
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from models import PRESETS, load_checkpoint
from models.codec import LatentCodec, LatentSpec
from models.errors import InputError, exit_on_input_error
from models.paths import PATHS
from samplers import (
    Guidance,
    GuidedVelocity,
    ode_times,
    sample_labels,
    sample_noise,
    sample_ode,
    sample_sde,
    sde_times,
)
from training.checkpoint import write_atomically, write_json
from training.config import flag, parse_flags, required, shown
from training.distributed import set_math

DEFAULT_STEPS = {"sde": 250, "ode": 50}


@dataclasses.dataclass
class GenerateConfig:
    """What generate.py can be told. None means: as the checkpoint says."""

    ckpt: str = required("checkpoint of ours, or a published DeepFlow or SiT file")
    weights: str = flag("ema", "which weights of the file", choices=["ema", "raw"])
    model: str = flag(None, "preset name", str, choices=list(PRESETS))
    trans_depth: int = flag(None, "number of blocks", int)
    df_idxs: str = flag(None, "blocks (from 1) after which a branch ends: [8,16], 8,16 or 8 16", str, nargs="+")
    qk_norm: bool = flag(None, "normalised queries and keys", bool)
    legacy_scaling: bool = flag(None, "clamp the time-gap scale to [-5, 5] (SSL-aligned release)", bool)
    ssl_align: bool = flag(None, "the model was trained with SSL alignment", bool)
    projector_embed_dims: str = flag(None, "accepted for published scripts; unused, the file says it", str)
    fused_attn: bool = flag(True, "fused attention kernels")
    path_type: str = flag(None, "probability path; linear where the file does not say", str, choices=list(PATHS))
    resolution: int = flag(None, "image size", int)
    num_classes: int = flag(None, "number of classes", int)
    vae: str = flag(None, "ema, mse, a hub name or a folder; default: the one of the training data", str)

    sample_dir: str = flag("samples", "parent folder of the results")
    num_fid_samples: int = flag(50_000, "number of images")
    per_proc_batch_size: int = flag(32, "images per forward pass and process")
    labels: str = flag("random", "balanced: image i has class i mod classes", choices=["random", "balanced"])
    global_seed: int = flag(0, "seed; image i depends on it and on i")
    mode: str = flag("sde", "sampler", choices=["sde", "ode"])
    num_steps: int = flag(None, "steps; default 250 for sde, 50 for ode", int)
    heun: bool = flag(False, "second-order steps for ode")
    cfg_scale: float = flag(1.0, "classifier-free guidance; 1.0 is none")
    guidance_low: float = flag(0.0, "guide only at t >= this (t = 0 is data)")
    guidance_high: float = flag(1.0, "guide only at t <= this (t = 1 is noise)")
    tf32: bool = flag(True, "TF32 matrix products on GPUs that have them")

    def check(self):
        """Raise InputError for values that make no sense; fills num_steps."""
        self.num_steps = DEFAULT_STEPS[self.mode] if self.num_steps is None else self.num_steps
        for name in ("num_fid_samples", "per_proc_batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{shown(name)} {getattr(self, name)} must be at least 1")
        if self.global_seed < 0:
            raise InputError(f"--global-seed {self.global_seed} must not be negative")
        if self.heun and self.mode == "sde":
            raise InputError("--heun is a method for the ODE; pass --mode ode")
        if self.projector_embed_dims:
            print("--projector-embed-dims is unused: the checkpoint says what it holds", flush=True)

    def times(self):
        """The sampler's time grid."""
        return sde_times(self.num_steps) if self.mode == "sde" else ode_times(self.num_steps)


@dataclasses.dataclass
class Processes:
    """This process among those of torchrun, or alone."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if world > 1:  # a resumed run may leave one process much more to do than another
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
        return cls(rank, world, device)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def stop(self):
        if self.world > 1:
            dist.destroy_process_group()


def open_checkpoint(config):
    """Checkpoint, its path object and the LatentSpec of its data; flags that contradict the file are InputErrors."""
    checkpoint = load_checkpoint(
        config.ckpt,
        config.weights,
        depth=config.trans_depth,
        df_idxs=config.df_idxs,
        qk_norm=config.qk_norm,
        legacy_scaling=config.legacy_scaling,
        ssl_align=config.ssl_align,
        num_classes=config.num_classes,
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
    if own or not fits or bool(preset.df_idxs) != bool(options["df_idxs"]):
        raise InputError(
            f"--model {config.model} contradicts {config.ckpt}, which holds "
            f"{own or 'depth {depth}, width {hidden_size}, key layers {df_idxs}'.format(**options)}"
        )


def load_codec(config, spec, device):
    """The decoder, refused when its encoder family, scale or shift are not those of the training data."""
    codec = LatentCodec.load(config.vae or spec.vae, device=device)
    spec.check_same(codec.spec, config.ckpt, "--vae")
    return codec


def run_sampler(config, path, velocity, start, noise):
    """Carry starting noise to data with the configured sampler; noise(step): the SDE's step noise."""
    if config.mode == "sde":
        return sample_sde(velocity, start, path, noise, config.num_steps)
    return sample_ode(velocity, start, config.num_steps, config.heun)


def sample_batch(config, checkpoint, path, indices, device):
    """Latents (N, C, h, w) of the images `indices`."""
    options = checkpoint.options
    shape = (options["in_channels"], options["input_size"], options["input_size"])
    seed, num_classes = config.global_seed, options["num_classes"]
    y = sample_labels(seed, indices, num_classes, config.labels == "balanced").to(device)
    guidance = Guidance(config.cfg_scale, config.guidance_low, config.guidance_high)
    velocity = GuidedVelocity(checkpoint.model.velocity, y, torch.full_like(y, num_classes), guidance)
    start = sample_noise(seed, indices, 0, shape).to(device)
    latents = run_sampler(config, path, velocity, start, lambda step: sample_noise(seed, indices, step + 1, shape))
    if not torch.isfinite(latents).all():
        raise InputError(f"{config.ckpt} gives samples that are not finite (images {indices[0]}..{indices[-1]})")
    return latents


def result_name(config, checkpoint, resolution, vae):
    """MODEL-CKPT-size-R-vae-V-cfg-S-seed-N-MODE, as published."""
    model = config.model or checkpoint.run.get("model") or "model"
    short = vae.removeprefix("stabilityai/sd-vae-ft-").rstrip("/").split("/")[-1]
    return (
        f"{model.replace('/', '-')}-{Path(config.ckpt).stem}-size-{resolution}-vae-{short}-cfg-{config.cfg_scale}"
        f"-seed-{config.global_seed}-{config.mode}"
    )


def build_manifest(config, checkpoint, path, codec):
    """What the images are made of, JSON-like; the same command gives the same manifest."""
    settings = {**dataclasses.asdict(config), "path_type": path.name, "vae": codec.spec.vae}
    for unused in ("sample_dir", "projector_embed_dims"):
        settings.pop(unused)
    stat = os.stat(config.ckpt)
    return {
        "ckpt_bytes": stat.st_size,
        "ckpt_modified": stat.st_mtime,
        "run": checkpoint.run.get("exp_name"),
        "step": checkpoint.steps,
        **settings,
        "model": checkpoint.run.get("model") or config.model,
        "model_options": checkpoint.options,
        "latents": dataclasses.asdict(codec.spec),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def image_path(folder, index):
    return folder / f"{index:06d}.png"


def save_image(pixels, path):
    """One uint8 (R, R, 3) image as PNG; complete or absent, so that an interrupted run can trust what it finds."""
    write_atomically(path, lambda file: Image.fromarray(pixels).save(file, "PNG", compress_level=1), durable=False)


def prepare_folder(folder, manifest):
    """Make the folder of PNGs, or make sure that the images in it are of the same settings. Raises InputError."""
    record = folder / "settings.json"
    ignored = ("versions", "num_fid_samples", "per_proc_batch_size")
    settings = json.loads(json.dumps({key: value for key, value in manifest.items() if key not in ignored}))
    if not record.exists() and any(folder.glob("*.png")):
        raise InputError(f"{folder} holds images of unknown settings (no {record.name}); pass another --sample-dir")
    if record.exists():
        found = json.loads(record.read_text())
        changed = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if changed:
            changed.sort(key=lambda key: not hasattr(GenerateConfig, key))  # a flag says more than what follows from it
            raise InputError(
                f"{folder} holds images made with another {changed[0]} ({found.get(changed[0])}, now "
                f"{settings.get(changed[0])}); delete the folder or pass another --sample-dir"
            )
    write_json(record, settings)


def remove_surplus(folder, count):
    """Delete images beyond the first `count`, of an earlier run that made more: the folder may be measured too."""
    surplus = [path for path in folder.glob("*.png") if path.stem.isdigit() and int(path.stem) >= count]
    for path in surplus:
        path.unlink()
    if surplus:
        print(f"deleted {len(surplus)} images beyond --num-fid-samples {count} in {folder}", flush=True)


def write_npz(path, folder, count):
    """Collect the PNGs 0 … count − 1 into `arr_0`, uint8 (N, R, R, 3), without holding them all in memory."""
    missing = [index for index in range(count) if not image_path(folder, index).exists()]
    if missing:
        raise InputError(f"{image_path(folder, missing[0])} is missing ({len(missing)} of {count}); run the same again")

    def read(index):
        return np.asarray(Image.open(image_path(folder, index)))

    def write(file):
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *read(0).shape)}
            np.lib.format.write_array_header_1_0(member, header)
            with ThreadPoolExecutor() as pool:
                for start in range(0, count, 256):
                    for pixels in pool.map(read, range(start, min(start + 256, count))):
                        member.write(pixels.tobytes())

    write_atomically(path, write)


def count_evaluations(config, path):
    """(forward passes per batch, those of them with guidance): the sampler is run on one number to see."""
    guidance = Guidance(config.cfg_scale, config.guidance_low, config.guidance_high)
    guidance.check(config.times())
    y = torch.zeros(1, dtype=torch.long)
    velocity = GuidedVelocity(lambda x, t, y: torch.zeros_like(x), y, y, guidance)
    run_sampler(config, path, velocity, torch.zeros(1, 1, 1, 1), lambda step: torch.zeros(1, 1, 1, 1))
    return velocity.calls, velocity.guided_calls


def generate(config):
    """Wire checkpoint, sampler and decoder; every process makes its share of the batches, the first collects them."""
    config.check()
    processes = Processes.start()
    set_math(config.tf32, config.fused_attn)
    checkpoint, path, spec = open_checkpoint(config)
    calls, guided = count_evaluations(config, path)
    codec = load_codec(config, spec, processes.device)
    checkpoint.model.to(processes.device)
    manifest = build_manifest(config, checkpoint, path, codec)
    manifest.update(model_evaluations=calls + guided, forward_passes=calls, guided_passes=guided)
    resolution = checkpoint.options["input_size"] * codec.spec.factor
    folder = Path(config.sample_dir) / result_name(config, checkpoint, resolution, codec.spec.vae)
    if processes.rank == 0:
        prepare_folder(folder, manifest)
        print(
            f"{config.ckpt} ({config.weights} weights, step {checkpoint.steps}): {config.num_fid_samples} images, "
            f"{config.mode}, {calls} forward passes per batch, {guided} of them guided -> {folder}",
            flush=True,
        )
    processes.barrier()
    sample_share(config, checkpoint, path, codec, folder, processes)
    processes.barrier()
    if processes.rank == 0:
        remove_surplus(folder, config.num_fid_samples)
        write_npz(folder.with_name(folder.name + ".npz"), folder, config.num_fid_samples)
        indices = range(config.num_fid_samples)
        labels = sample_labels(
            config.global_seed, indices, checkpoint.options["num_classes"], config.labels == "balanced"
        )
        manifest.update(label_mode=config.labels, labels=labels.tolist())
        write_json(folder.with_name(folder.name + ".json"), manifest)
        print(f"{folder}.npz", flush=True)
    processes.stop()


def sample_share(config, checkpoint, path, codec, folder, processes):
    """Make the batches of this process whose images are not there yet.

    Batch b holds the same images on any number of processes, so pixels do not depend on that number.
    """
    size, count = config.per_proc_batch_size, config.num_fid_samples
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = batches[processes.rank :: processes.world]
    with ThreadPoolExecutor(4) as pool:
        for indices in tqdm(mine, unit="batch", disable=processes.rank > 0, mininterval=1):
            if all(image_path(folder, index).exists() for index in indices):
                continue
            latents = sample_batch(config, checkpoint, path, indices, processes.device)
            images = codec.decode(latents.float()).cpu().numpy()
            list(pool.map(save_image, images, [image_path(folder, index) for index in indices]))


if __name__ == "__main__":
    with exit_on_input_error():
        generate(parse_flags(GenerateConfig, description=__doc__.splitlines()[0]))
