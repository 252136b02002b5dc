"""The checkpoint to sample from, checked against the flags."""

import dataclasses

from common.errors import InputError
from common.flags import shown
from models import PRESETS, load_checkpoint
from models.codec import LatentSpec
from models.paths import PATHS


def open_checkpoint(config):
    """(Checkpoint, its path, LatentSpec of its data) of --ckpt. Raises InputError where flags contradict the file."""
    checkpoint = load_checkpoint(config.ckpt, config.weights, **config.model_options())
    check_model(config, checkpoint)
    names = {field.name for field in dataclasses.fields(LatentSpec)}
    spec = LatentSpec(**{name: value for name, value in checkpoint.data.items() if name in names})
    resolution = checkpoint.options["input_size"] * spec.factor
    path_type = checkpoint.run.get("path_type") or config.path_type or "linear"
    for name, answer in (("path_type", path_type), ("resolution", resolution)):
        given = getattr(config, name)
        if given not in (None, answer):
            raise InputError(f"{shown(name)} {given} contradicts {config.ckpt}, which has {answer}")
    return checkpoint, PATHS[path_type], spec


def check_model(config, checkpoint):
    """Raise InputError where --mode, --qk-norm or --model do not fit the checkpoint."""
    if config.sampler.is_map and checkpoint.kind != "flow map":
        raise InputError(
            f"--mode {config.mode} needs a flow map, {config.ckpt} is a flow model; pass --mode sde or ode, "
            "or --dmf-depth for a published flow map without log-variance head"
        )
    if config.qk_norm not in (None, bool(checkpoint.options["qk_norm"])):
        raise InputError(f"--qk-norm contradicts {config.ckpt}, which has {checkpoint.options['qk_norm']}")
    own = checkpoint.run.get("model")
    if config.model in (None, own):
        return
    if own or not fits(PRESETS[config.model], config, checkpoint):
        held = own or "depth {depth}, width {hidden_size}, key layers {df_idxs}".format(**checkpoint.options)
        raise InputError(f"--model {config.model} contradicts {config.ckpt}, which holds {held}")


def fits(preset, config, checkpoint):
    """Whether the weights of a published file can be those of a preset."""
    options = checkpoint.options
    return (
        (preset.hidden_size, preset.patch_size) == (options["hidden_size"], options["patch_size"])
        and (config.trans_depth or preset.depth) == options["depth"]
        and bool(preset.df_idxs) == bool(options["df_idxs"])
        and preset.kind == checkpoint.kind
    )
