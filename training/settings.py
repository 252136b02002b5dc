"""The settings of a run, all that bears on its numbers: what a resumed run must not change, what its name tells."""

import dataclasses
import re

import models
from common.errors import InputError
from common.flags import shown
from models.presets import PRESETS, model_config, spaced_key_layers

COUNTS = {"count": "number of images in --data-dir", "captions": "number of captions in --data-dir"}

FAMILIES = {"DeepFlow-MMDiT": "deepflow-t2i"}  # others in lower case
UNMARKED_SIZES = ("DeepFlow-MMDiT-L/2", "MMDiT-L/2")  # the only ones of Table 6
USUAL = {  # by kind of model, or kind and resolution: the papers' settings where they differ from the flags' defaults
    "flow": {"enc_type": "None"},
    "text": {"enc_type": "None"},
    ("flow map", 512): {"qk_norm": True, "g_max": 0.8},
}
UNNAMED = {"model", "df_idxs", "init_from", "convention", "teacher", "enc_ckpt", "ssl_align", "mixed_precision"}
RENAMED = {"pretrained": "init_from"}  # flags of older runs
LABELS = {  # in this order, before others; "": the value tells enough
    "trans_depth": "d",
    "weighting": "",
    "tg_upper_bound": "alpha",
    "scale_weight": "beta",
    "acc_coeff": "lambda",
    "vera": "vera-",
    "acc_mlp": "acc-mlp",
    "enc_type": "",
    "proj_coeff": "proj",
    "g_type": "g-",
    "omega": "omega",
    "path_type": "",
    "batch_size": "bs",
    "learning_rate": "lr",
    "seed": "seed",
}


def holdout_fraction(text):
    """The number that --holdout gives; None for a folder or nothing. Raises InputError for one outside (0, 1)."""
    try:
        fraction = float(text)
    except (TypeError, ValueError):
        return None
    if not 0 < fraction < 1:
        range = "a fraction must be greater than 0 and less than 1"
        raise InputError(f"--holdout {text} is out of range: {range}; a folder of that name is ./{text}")
    return fraction


def settings(config, options):
    """{flag: value} of the flags that are not free, filled in from `options`, the model's constructor arguments."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.metadata["free"]}
    acc_mlp = list(models.deepflow.acc_widths(options["acc_mlp"], options["projector_dim"]))
    encoders = ",".join(config.encoders())
    filled = {**options, "trans_depth": options["depth"], "acc_mlp": acc_mlp, "enc_type": encoders}
    filled["holdout"] = holdout_fraction(config.holdout)  # a folder changes nothing in training
    values.update({name: filled[name] for name in values.keys() & filled.keys()})
    return {**values, "scale_weight": config.branch_weights(len(options["df_idxs"]) + 1)}


def resumed_settings(run, content, path):
    """(configuration, changes) of a run that resumes from the Checkpoint `content` of the file `path`.

    Changes are {flag, or COUNTS' key: [before, now]}. Raises InputError for changes without --allow-changes, and for
    those that make another network.
    """
    from common.records import check_record  # imports pydantic, which --help does not need

    saved = {RENAMED.get(name, name): value for name, value in content.config.items() if value is not None}
    before = check_record(type(run.config), saved, f"{path}, config", "choose a checkpoint of a run to resume from")
    before = before.resolve()
    config = run.config.resumed(before)
    old = settings(before, {**model_config(before.model), **saved["model_options"]})
    new = settings(config, run.options)
    for name in COUNTS.keys() & content.data.keys():
        old[name], new[name] = content.data[name], getattr(run.info, name)
    changes = {name: [old[name], now] for name, now in new.items() if old[name] != now}
    another = changes.keys() & {"model", "trans_depth", "path_type", *config.model_flags()}
    if another or (changes and not config.allow_changes):
        remedy = "start afresh under another --exp-name" + ("" if another else ", or pass --allow-changes to go on")
        raise InputError(f"{path} was made with other settings: {in_words(changes)}; {remedy}")
    return config, changes


def in_words(changes):
    return ", ".join(f"{COUNTS.get(name, shown(name))} was {a}, is {b}" for name, (a, b) in sorted(changes.items()))


def run_name(config):
    """The name of a resolved configuration's run: its model, and what differs from the method's usual settings.

    `deepflow-xl-3t-512-uniform-alpha0.05`; a flag is marked where leaving it out would change something.
    """
    options = model_config(config.model, **config.model_flags())
    now, marks = settings(config, options), []
    usual = USUAL.get(config.kind, {}) | USUAL.get((config.kind, config.resolution), {})
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in now.keys() - UNNAMED} | usual
    for name in (name for name in {**LABELS, **defaults} if name in defaults):
        left_out = dataclasses.replace(config, **{name: defaults[name]}).resolve()
        if now[name] != settings(left_out, model_config(config.model, **left_out.model_flags()))[name]:
            marks.append(mark(name, now[name]))
    return "-".join([*stem(config, options), *marks])


def stem(config, options):
    """Parts of the name: the model, branches of a DeepFlow, resolution, and key layers that are not evenly spaced."""
    family, size, patch = re.fullmatch(r"(.+)-(\w+)/(\d+)", config.model).groups()
    parts = [FAMILIES.get(family, family.lower())]
    parts += [] if config.model in UNMARKED_SIZES else [size.lower()]
    branches = len(options["df_idxs"]) + 1
    if PRESETS[config.model].df_idxs:
        parts.append(f"{branches}t")
    parts += [f"p{patch}"] if patch != "2" else []
    parts += [str(config.resolution)] if config.resolution not in (None, 256) else []
    depth, even = options["depth"], options["depth"] % branches == 0
    if not (even and options["df_idxs"] == spaced_key_layers(depth, branches)):
        parts.append("k" + "_".join(map(str, options["df_idxs"])))
    return parts


def mark(name, value):
    """What a name says of a flag's value."""
    if isinstance(value, bool):
        return ("" if value else "no-") + name.replace("_", "-")
    text = "_".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = re.sub(r"[^\w.-]+", "_", text.replace("-vit-", ""))  # dinov2-vit-b,mae-vit-l → dinov2b_mael
    return LABELS[name] + text if name in LABELS else f"{name.replace('_', '-')}-{text}"
