"""The checkpoint to sample from, checked against the flags."""

from common.errors import InputError
from common.flags import shown
from common.records import check_record
from models import PRESETS, load_checkpoint
from models.codec import LatentSpec
from models.paths import PATHS


def open_checkpoint(config):
    """(Checkpoint, its path, LatentSpec of its data) of --ckpt. Raises InputError where flags contradict the file."""
    checkpoint = load_checkpoint(config.ckpt, config.weights, **config.model_options())
    check_model(config, checkpoint)
    spec = check_record(LatentSpec, checkpoint.data, f"{config.ckpt}, data", "choose another file")
    path_type = checkpoint.run.get("path_type") or config.path_type or "linear"
    answers = {
        "path_type": path_type,
        "resolution": checkpoint.options["input_size"] * spec.factor,
        "qk_norm": bool(checkpoint.options["qk_norm"]),
    }
    for name, answer in answers.items():
        given = getattr(config, name)
        if given not in (None, answer):
            raise InputError(f"{shown(name)} {given} contradicts {config.ckpt}, which has {answer}")
    return checkpoint, PATHS[path_type], spec


def check_model(config, checkpoint):
    """Raise InputError where --mode or --model do not fit the checkpoint."""
    if config.sampler.is_map and checkpoint.kind != "flow map":
        raise InputError(
            f"--mode {config.mode} needs a flow map, {config.ckpt} is a flow model; pass --mode sde or ode, "
            "or --dmf-depth for a published flow map without log-variance head"
        )
    own = checkpoint.run.get("model")
    if config.model in (None, own):
        return
    if own or not fits(PRESETS[config.model], config, checkpoint):
        held = own or "depth {depth}, width {hidden_size}, key layers {df_idxs}".format(**checkpoint.options)
        raise InputError(f"--model {config.model} contradicts {config.ckpt}, which holds {held}")


def fits(preset, config, checkpoint):
    """Whether the weights of a published file can be those of a preset."""
    depth, options = config.trans_depth or preset.depth, checkpoint.options
    expected = (preset.kind, depth, preset.hidden_size, preset.patch_size, bool(preset.df_idxs))
    sizes = (options["depth"], options["hidden_size"], options["patch_size"])
    return expected == (checkpoint.kind, *sizes, bool(options["df_idxs"]))
