"""Held-out error: the parts of the training objective at fixed times, with fixed noise and no label dropout.

--holdout FRACTION holds out images of --data-dir by a hash of their names; --holdout DIR uses those of another folder.
Letters: B rows of a batch, C latent channels, h = w latent size.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from common.errors import InputError
from common.look_ahead import ordered_map
from dataset import Batch
from latents.sets import find_features, is_set
from loss import guided_samples
from training.alignment import stored_weights
from training.draws import HELD_OUT, FlowMapDraws, StepDraws
from training.settings import holdout_fraction

TIMES = [(2 * i + 1) / 16 for i in range(8)]
SHARE = 0.02  # of the training FLOPs that measuring may add, unless --holdout-every is given
WEIGHTS = ("", "raw_")  # prefixes of the errors' names; "": averaged weights (EMA)
MEASURED = ("loss_v", "loss_a", "loss_proj", "error_")  # prefixes of the objective's parts that are measured
BY_TIME = ("v", "error_")  # prefixes of errors that are also logged at each time


def hold_out(config, dataset, open_folder):
    """(dataset to train on, held-out dataset or None), as --holdout says; open_folder(DIR): like --data-dir.

    Raises InputError if the folder's data do not match, if nothing is held out, or if nothing is left to train on.
    """
    if config.holdout is None:
        return dataset, None
    if fraction := holdout_fraction(config.holdout):
        held = np.array([is_held_out(name, fraction) for name in dataset.names])
        if held.all() or not held.any():
            fault = "leaves no image to train on; lower it" if held.all() else "holds out no image; raise it"
            raise InputError(f"--holdout {config.holdout} of {len(held)} images {fault}")
        dataset, held = dataset.only(np.flatnonzero(~held)), dataset.only(np.flatnonzero(held))
    else:
        held = open_other(config, dataset, open_folder)
    count, of = config.holdout_count or len(held), len(held)
    if count > of:
        raise InputError(f"--holdout-count {count}: only {of} images are held out; take fewer")
    return dataset, held.only(np.arange(count) * of // count)  # evenly spaced: every class, if they are sorted by class


def is_held_out(name, fraction):
    """Whether the fraction holds out an image; depends only on its name, so that runs on the same data agree.

    The name of a latent file counts as that of its image, as the tools pair them; the suffix is ignored.
    """
    key = os.path.splitext(name)[0].replace("img-mean-std-", "img").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < fraction * 2**64


def open_other(config, dataset, open_folder):
    """The dataset of the folder --holdout. Raises InputError unless it matches --data-dir."""
    place, ours = Path(config.holdout), Path(config.data_dir)
    if not place.is_dir():
        raise InputError(f"--holdout {place} does not exist; name a data folder, or a fraction of --data-dir")
    if len({(path.parent if is_set(path) else path).resolve() for path in (place, ours)}) == 1:
        raise InputError(f"--holdout {place} is --data-dir itself; name other images, or a fraction")
    for name in dataset.features:
        theirs = find_features(place, name)
        if theirs is None or stored_weights(theirs) != stored_weights(find_features(ours, name)):
            fault = f"lacks features-{name} by the weights that made those of --data-dir"
            raise InputError(f"--holdout {place} {fault}; write them with preprocessing.dataset_tools features")
    try:
        other = open_folder(place)
    except InputError as error:
        fault = str(error).replace("--data-dir", "--holdout")
        raise InputError(fault if "--holdout" in fault else f"--holdout: {fault}") from None
    dataset.info.spec.check_same(other.info.spec.scaled_as(dataset.info.spec), "--data-dir", f"--holdout {place}")
    if hasattr(dataset.info, "text"):
        dataset.info.text.check_same(other.info.text, "--data-dir", f"--holdout {place}")
    for field in ("moments_shape", "num_classes", "class_names"):
        a, b = getattr(dataset.info, field), getattr(other.info, field)
        if a != b and None not in (a, b):
            remedy = "make both folders in the same way" + " (or --num-classes)" * (field == "num_classes")
            raise InputError(f"--holdout {place}: {field} is {b!s:.60}, that of --data-dir {a!s:.60}; {remedy}")
    return other


def cost(run):
    """Number of training steps that cost as many FLOPs as one measurement."""
    config = run.config
    passes = len(run.held) * len(TIMES) * len(WEIGHTS) * config.forward_passes
    return passes / (config.batch_size * config.passes)


def interval(run):
    """Steps between measurements: --holdout-every, or the least multiple of --log-every that adds at most SHARE."""
    unit = run.config.log_every
    return run.config.holdout_every or math.ceil(cost(run) / SHARE / unit) * unit


def describe_holdout(run):
    """[line saying what is held out and how often it is measured]; [] without --holdout."""
    if run.held is None:
        return []
    every, of = interval(run), f"{len(run.held):,} images ({run.config.holdout})"
    return [f"held out: {of}, measured every {every:,} steps, which adds {cost(run) / every:.1%} of training's FLOPs"]


class HeldOut:
    """Measures a Run's held-out errors; each process takes a part of the batches. objective: as in Task."""

    def __init__(self, run, objective):
        self.run, self.objective, self.every = run, objective, interval(run)
        size = len(run.rows) // run.config.gradient_accumulation_steps
        batches = np.split(np.arange(len(run.held)), range(size, len(run.held), size))
        self.batches = batches[run.accelerator.process_index :: run.accelerator.num_processes]

    @torch.no_grad()
    def measure(self, model, ema):
        """{name: mean over images} for the log, with EMA and with raw weights; the same on all processes.

        holdout_v2, holdout_raw_v2: branch 2, mean over TIMES; holdout_v2_t0.0625: at one time. raw: without EMA.
        """
        sums, device = collections.defaultdict(float), self.run.accelerator.device
        with torch.compiler.set_stance("force_eager"):  # compiling for these batch sizes would take longer
            for tensors, normals in ordered_map(self.prepare, self.batches):
                moments, y, images, *features = (t if t is None else t.to(device) for t in tensors)
                batch, normals = Batch(0, moments, y, images, tuple(features)), normals.to(device)
                if self.run.targets:  # once for all times
                    batch = dataclasses.replace(batch, images=None, features=tuple(self.run.targets(batch)))
                for weights in WEIGHTS:
                    with contextlib.nullcontext() if weights else ema.swapped_into(model):
                        for name, errors in self.errors(model, batch, normals).items():
                            sums[weights + name] = sums[weights + name] + len(y) * np.array(errors)  # float64
        means = collections.defaultdict(float)  # {name: (8,)}
        for part in gather_object([dict(sums)]):
            for name, errors in part.items():
                means[name] = means[name] + errors / len(self.run.held)
        found = {f"holdout_{name}": errors.mean().item() for name, errors in means.items()}
        for name, errors in means.items():
            if name.startswith(BY_TIME):
                found |= {f"holdout_{name}_t{t}": error for t, error in zip(TIMES, errors.tolist(), strict=True)}
        return found

    def prepare(self, indices):
        """Moments, conditions, images, features of held-out images, and normals (1 + 8 or 16, B, C, h, w), on the CPU.

        An image's normals depend only on the seed and its row in the folder. They are for its posterior, the eight
        times, and the mean-flow part at these times.
        """
        run, held = self.run, self.run.held
        size = (1 + len(TIMES) * (2 if run.config.kind == "flow map" else 1), *run.latent_shape)
        streams = (np.random.default_rng([run.config.seed, row, HELD_OUT]) for row in held.rows[indices].tolist())
        normals = np.stack([stream.standard_normal(size, np.float32) for stream in streams], axis=1)
        return held.gather(indices), torch.from_numpy(normals)

    def errors(self, model, batch, normals):
        """{name: batch means at each of TIMES} of the objective's MEASURED parts; model: the unwrapped one."""

        def network(*inputs):
            with self.run.accelerator.autocast():
                return model(*inputs)

        found = []
        for index in range(len(TIMES)):
            _, parts = self.objective(network, batch, self.draws(index, normals))
            parts = {name.removeprefix("loss_"): part for name, part in parts.items() if name.startswith(MEASURED)}
            found.append(torch.stack(list(parts.values())))
        return dict(zip(parts, torch.stack(found, dim=1).tolist(), strict=True))

    def draws(self, index, normals):
        """Draws at TIMES[index] for all branches; a flow map's mean-flow part goes from there to half that time."""
        n, config, device = normals.shape[1], self.run.config, normals.device
        time, drop = torch.full((1, n), TIMES[index]), torch.zeros(n, dtype=torch.bool)
        latents = normals[0], normals[1 + index]
        if config.kind == "flow map":
            times = torch.cat([time, time, time / 2])
            guided = guided_samples(config.g_type, times, drop, config.g_min, config.g_max)
            return FlowMapDraws(times.to(device), drop.to(device), *latents, normals[1 + len(TIMES) + index], guided)
        return StepDraws(time.repeat(self.run.model.num_branches, 1).to(device), drop.to(device), *latents)


def in_short(found):
    """The means for the averaged weights, as text: `v1 0.5123, v2 0.5012`."""
    names = [name for name in found if not name.startswith("holdout_raw_") and "." not in name]
    return ", ".join(f"{name.removeprefix('holdout_')} {found[name]:.4f}" for name in names)
