"""SSL alignment in training (REPA): where the features of a batch come from, and what the log shows of them."""

import itertools
import time

from common.errors import InputError, note
from latents.manifest import DataManifest
from latents.sets import find_features
from models.compiling import compile_blocks
from models.encoders import ENCODERS, Encoder, weights_id
from models.flops import peak_flops


def find_caches(config):
    """{encoder: folder} of features on disk. Raises InputError if --enc-ckpt names weights that did not make them."""
    caches = {}
    for name, checkpoint in config.encoders().items():
        if folder := find_features(config.data_dir, name):
            made_with, given = stored_weights(folder), checkpoint and weights_id(name, checkpoint)
            if given not in (None, made_with):
                fault = f"{folder} was made with the weights {made_with}, --enc-ckpt {checkpoint} is {given}"
                raise InputError(f"{fault}; write the features again, or move the folder away")
            caches[name] = folder
    return caches


def stored_weights(folder):
    """What the manifest of a set of features says of the encoder's weights, or None."""
    manifest = DataManifest.read(folder)
    return manifest.encoder.weights if manifest and manifest.encoder else None


def describe_alignment(config):
    """A line on where each encoder's features come from."""
    lines = []
    for name, checkpoint in config.encoders().items():
        source = f"computed while training (weights {checkpoint or 'of the hub'})"
        if folder := find_features(config.data_dir, name):
            source = f"features of {folder} (weights {stored_weights(folder)})"
        lines.append(f"alignment, weight {config.proj_coeff}: {name}, {source}")
    return lines


def warn_of_slow_images(run):
    """Warn if images are read more slowly than the GPU trains at --mfu; times the reading of this rank's rows."""
    peak, rows = peak_flops(run.accelerator.device, run.config.mixed_precision), run.rows.numpy()
    if not peak:
        return
    run.dataset.gather_step(run.sampler, 0, rows[:1])  # warm-up: imports
    start = time.perf_counter()
    run.dataset.gather_step(run.sampler, 0, rows)
    read, needed = len(rows) / (time.perf_counter() - start), run.config.mfu * peak / run.flops_per_image
    if read < needed:
        speeds = f"{run.dataset.workers} threads read {read:,.0f} images/s, the GPU can train on about {needed:,.0f}"
        note(f"warning: {speeds}; write the features once (dataset_tools.py features), or give more --num-workers")


class Targets:
    """Features of a batch, one tensor (B, T, Z) per encoder: as stored where they are on disk, or computed here."""

    def __init__(self, run):
        self.autocast, device = run.accelerator.autocast, run.accelerator.device
        self.encoders = {}  # by name; None: stored
        tokens = (run.options["input_size"] // run.options["patch_size"]) ** 2
        for name, checkpoint in run.config.encoders().items():
            stored, needed = run.dataset.features.get(name), (tokens, ENCODERS[name].width)
            if stored and stored.rows.shape != needed:
                shapes = f"have the shape {stored.rows.shape}, the model needs {needed}"
                raise InputError(f"features of --enc-type {name} {shapes}; write them again, from the latents' images")
            self.encoders[name] = None if stored else Encoder(name, run.info.resolution, checkpoint, device)
            if run.config.compile and not stored:
                compile_blocks(self.encoders[name].network)
        if any(self.encoders.values()):
            warn_of_slow_images(run)

    def __call__(self, batch):
        """List of features of a Batch, without gradient."""
        if batch.images is None:
            return list(batch.features)
        stored = iter(batch.features)
        with self.autocast():
            return [encoder(batch.images) if encoder else next(stored) for encoder in self.encoders.values()]

    def parts(self, losses):
        """Mean alignment loss and each one by name, for the log: loss_projI of VeRA block I, with several encoders'."""
        suffixes = [f"_{name}" for name in self.encoders] if len(self.encoders) > 1 else [""]
        names = (f"loss_proj{block}{suffix}" for block in itertools.count(1) for suffix in suffixes)
        return {"loss_proj": losses.detach().mean(), **dict(zip(names, losses.detach(), strict=False))}
