"""Starting a run from the weights of a file (--init-from), as far as they fit the run's model."""

import torch

from common.errors import InputError, say
from common.flags import shown
from models import load_checkpoint
from models.checkpoints import find_checkpoint, load_strictly
from models.deepflow import acc_widths
from models.layers import sincos_2d
from models.presets import build, constructor_defaults, kind_of
from training.checkpoint import check_encoders

SIZES = ("hidden_size", "patch_size", "num_heads")  # constructor arguments that only presets set
BRANCHES = ("df_blocks", "dt_embedder", "final_layer", "final_acc_layer")  # parts in which SiT and DeepFlow differ
BRANCHING = ("df_idxs", "vera", "legacy_scaling")  # arguments that matter only between branches
ALIGNING = ("ssl_align", "z_dims", "projector_dim", "df_idxs", "encoder_depth")  # arguments that shape the projectors
FLAGS = {  # argument → flags that change it, where the names differ
    **dict.fromkeys(SIZES, "--model"),
    "depth": "--model or --trans-depth",
    "df_idxs": "--model or --df-idxs",
    "num_classes": "--data-dir (or, with train.py, pass --new-classes)",
    **dict.fromkeys(("in_channels", "input_size", "context_dim"), "--data-dir"),
}
CHOOSE = "choose another one"


def load_source(path, config, info, name, **flags):
    """Checkpoint of a file that a run uses, checked against the run's path, VAE and text encoder.

    name: the flag that gave `path`; flags: overrides for load_checkpoint. Raises InputError.
    """
    path = find_checkpoint(path, f"--{name}")
    checkpoint = load_checkpoint(path, config.weights, convention=config.convention, **flags)
    source = f"--{name} {path}"
    path_type = checkpoint.run.get("path_type", config.path_type)
    if path_type != config.path_type:
        raise InputError(f"{source} was trained on another --path-type; pass --path-type {path_type}")
    if checkpoint.data:
        check_encoders(checkpoint.data, info, source, CHOOSE)
    return checkpoint


def check_arguments(source, found, wanted):
    """Raise InputError if `found`, the constructor arguments of the file `source`, differs from those `wanted`."""
    for name, value in wanted.items():
        if found.get(name) != value:
            fault = f"{source} has {name} {found.get(name)}, this run has {value}"
            raise InputError(f"{fault}; change {FLAGS.get(name, shown(name))}, or name another file")


def start_model(config, options, info):
    """A model with constructor arguments `options` and the weights of --init-from; None without --init-from.

    Parts in `replaced_parts` are new, initialised as in a run without a file. Prints what was taken. Raises InputError.
    """
    fresh_labels = getattr(config, "new_classes", False)
    if not config.init_from:
        given = {"--weights": config.weights != "ema", "--convention": config.convention, "--new-classes": fresh_labels}
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(f"{name} is only used with --init-from; name a file with it, or drop {name}")
        return None
    source = f"--init-from {config.init_from}"
    checkpoint = load_source(config.init_from, config, info, "init-from")
    found = {**constructor_defaults(checkpoint.model.kind), **checkpoint.options}
    found["z_dims"] = tuple(found["z_dims"])
    if "model_options" not in checkpoint.run and len(found["df_idxs"]) == len(options["df_idxs"]):
        for name in ("df_idxs", "legacy_scaling"):  # a published file may not record these
            found[name] = options[name] if getattr(config, name) else found[name]
    check_network(source, found, options, config)
    torch.manual_seed(config.seed)
    model, state = build(options), checkpoint.model.state_dict()
    replaced = replaced_parts(source, checkpoint, found, options, config)
    taken = {name: tensor for name, tensor in state.items() if part(name) not in replaced}
    new = {name: tensor for name, tensor in model.state_dict().items() if part(name) in replaced}
    load_strictly(model, {**new, **taken}, source)
    for word, names in (("taken", taken), ("new", new), ("dropped", state.keys() - taken.keys())):
        parts = {part(name): replaced.get(part(name)) for name in sorted(names)}
        words = [f"{name} ({why})" if why and word == "new" else name for name, why in parts.items()]
        if words:
            say(f"{source}: {word} {', '.join(words)}")
    names, known = info.class_names, checkpoint.data.get("class_names")
    if names and known and list(names) != list(known) and not fresh_labels:
        say(f"warning: {source} has other class names than --data-dir; --new-classes starts a new label table")
    return model


def part(name):
    """The part of the network that a parameter belongs to: the first component of its name."""
    return name.partition(".")[0]


def check_network(source, found, options, config):
    """Raise InputError if the network of a file (arguments: `found`) does not compute the same as the run's."""
    kind = kind_of(found)
    if kind != config.kind and (kind, config.kind) != ("flow map", "flow"):
        fault = f"{source} holds a model of kind {kind}, --model {config.model} is of kind {config.kind}"
        raise InputError(f"{fault}; {CHOOSE}")
    classes = () if getattr(config, "new_classes", False) else ("num_classes",)
    branching = BRANCHING if found["df_idxs"] else ()
    names = (*SIZES, "depth", "in_channels", "context_dim", *classes, "qk_norm", *branching)
    wanted = {name: options.get(name) for name in names}
    if branching:
        widths = [acc_widths(of["acc_mlp"], of["projector_dim"]) for of in (found, options)]
        found, wanted = {**found, "acc_mlp": widths[0]}, {**wanted, "acc_mlp": widths[1]}
    check_arguments(source, found, wanted)


def replaced_parts(source, checkpoint, found, options, config):
    """{part: reason or None} of the parts not taken from the file: new ones, or ones that the run's model lacks."""
    parts = {"logvar_linear": None}  # of a flow map; its flow model does not have it
    if options["df_idxs"] and not found["df_idxs"]:
        parts |= dict.fromkeys(BRANCHES)
    if getattr(config, "new_classes", False):
        parts["y_embedder"] = f"{options['num_classes']} classes"
    encoders, arguments = ",".join(config.encoders()), ALIGNING[:-1] if options["df_idxs"] else ALIGNING
    known = checkpoint.run.get("enc_type") in (None, encoders, config.enc_type)  # unknown for published files
    if not known or any(found[name] != options[name] for name in arguments):
        parts["projectors"] = None
    before, now = (size["input_size"] // size["patch_size"] for size in (found, options))
    if before != now:
        if not torch.allclose(checkpoint.model.pos_embed, sincos_2d(found["hidden_size"], before), atol=1e-3):
            fault = "its position embedding is not sin-cos and cannot be computed for another resolution"
            raise InputError(f"{source}: {fault}; choose data with latents of size {found['input_size']}")
        parts["pos_embed"] = f"{now}x{now} tokens instead of {before}x{before}"
    return parts
