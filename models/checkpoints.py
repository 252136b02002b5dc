"""Reading model files: ours and published ones, recognised by their keys. Loading is strict.

A file of ours carries its configuration, and so does a folder that models/export.py wrote. What is known about a
published one is in models/published.py.
"""

import argparse
import dataclasses
import hashlib
import re
import textwrap
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.errors import InputError, first_line, note
from common.flags import shown
from common.records import read_record
from models.deepflow import DeepFlow
from models.presets import NETWORKS, build, constructor_defaults, kind_of, parse_df_idxs
from models.published import from_published, published_note

ENTRIES = {"ema": "ema", "raw": "model"}  # --weights → entry of a file
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # a folder's, by the hub's convention
# What of a run's configuration bears on its numbers, beside the model; exported folders and samples' manifests keep it.
TRAINING = ("batch_size", "learning_rate", "adam_beta2", "ema_decay", "cfg_prob", "weighting", "tg_upper_bound")
TRAINING += ("scale_weight", "acc_coeff", "ssl_align", "enc_type", "proj_coeff", "g_type", "omega", "g_min", "g_max")
TRAINING += ("changes",)


def read_file(path):
    """Content of a checkpoint, a .safetensors file or an exported folder. Raises InputError naming the file."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Published files hold an argparse.Namespace beside the weights: it is harmless and allowed by name.
        # Memory-mapped, so that eight processes share one copy; torch's old format, which is not a zip, cannot be.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; name another") from None
    except Exception as error:  # in a damaged file the unpickler can fail with anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"checkpoint {path} holds the Python object {refused[1]}, which is not loaded: it could run code; "
                "save the weights alone"
            ) from None
        reason = first_line(error)[:120]
        raise InputError(f"checkpoint {path} is unreadable or truncated ({reason}); copy it again") from None


def read_folder(folder):
    """Content of an exported folder, in the form of a checkpoint of ours. Raises InputError naming the file."""
    config = read_record(dict, folder / CONFIG_FILE, "name a .pt file, or an exported folder")
    defaults = constructor_defaults(NETWORKS[kind_of(config)])
    options = {name: config.get(name, default) for name, default in defaults.items()}
    return {
        ENTRIES[config.get("weights", "ema")]: read_file(folder / WEIGHTS_FILE),
        "config": {**config.get("run", {}), "model_options": options},
        "data": config.get("data", {}),
        "steps": config.get("steps"),
    }


@dataclasses.dataclass
class Checkpoint:
    """A model and what its file says about it; run and data are empty and steps is None for published files."""

    model: DeepFlow
    options: dict  # constructor arguments
    run: dict  # the run's configuration
    data: dict  # classes, VAE and shapes of the training data
    steps: int | None

    def weights_sha256(self):
        """SHA-256 of the weights, the same for every copy or export of them."""
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def load_checkpoint(path, weights="ema", **overrides):
    """Checkpoint with the model in eval mode, from a file of ours or a published one.

    weights: "ema" or "raw" (the entry "model"); overrides: constructor arguments that a published file does not
    determine. Raises InputError if the file lacks what is asked for.
    """
    content = read_file(path)
    state = pick_weights(content, weights, path)
    run, data = content.get("config"), content.get("data", {})
    is_ours = isinstance(run, dict) and "model_options" in run
    if is_ours:
        options = run["model_options"]
    else:
        run, data = {}, {}
        state, options = from_published(state, path, overrides.get("df_idxs"), overrides.get("dmf_depth"))
    options = check_overrides(options, overrides, path, is_ours)
    if not is_ours:
        note(published_note(path, options))
    with torch.device("meta"):  # spends no time on initial weights
        model = build(options)
    load_strictly(model, state, path)
    return Checkpoint(model.float().eval(), options, run, data, content.get("steps"))


def load_model(path, weights="ema", **overrides):
    """Model in eval mode and its constructor arguments; everything else as load_checkpoint."""
    checkpoint = load_checkpoint(path, weights, **overrides)
    return checkpoint.model, checkpoint.options


def pick_weights(content, weights, path):
    """The state dict `weights` ("ema" or "raw") of a file's content, wrapper prefixes stripped."""
    key, entries = ENTRIES[weights], content if isinstance(content, dict) else {f"a {type(content).__name__}": content}
    state = entries if "x_embedder.proj.weight" in map(strip_prefix, entries) else entries.get(key)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        held = ", ".join(map(str, list(entries)[:6])) or "nothing"
        raise InputError(f"--ckpt {path} lacks tensors '{key}' (it holds {held}); name other --weights or another file")
    return {strip_prefix(name): tensor for name, tensor in state.items()}


def strip_prefix(name):
    """Parameter name without what DDP (`module.`) and torch.compile (`_orig_mod.`) put before it, in any nesting."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def load_strictly(model, state, path):
    """load_state_dict, with torch's first complaint in one line of InputError."""
    try:
        model.load_state_dict(state, assign=model.pos_embed.is_meta)  # nothing can be copied into a meta tensor
    except RuntimeError as error:
        complaint = textwrap.shorten(str(error).partition("\n")[2].partition("\n")[0], 240)
        raise InputError(f"{path} is of another model: {complaint}") from None


def check_overrides(options, overrides, path, is_ours):
    """Constructor arguments with those given on the command line. Raises InputError if they contradict the file.

    The weights of a published file leave open only the heads, the key layers, the legacy clamp, the aligned block and
    the depth of a flow map.
    """
    options = {**options, "df_idxs": tuple(options["df_idxs"])}
    free = () if is_ours else ("num_heads", "df_idxs", "legacy_scaling", "encoder_depth", "dmf_depth")
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "df_idxs":
            value = parse_df_idxs(value)
        if key == "dmf_depth" and is_ours and kind_of(options) != "flow map":
            raise InputError(f"--dmf-depth {value}: {path} is a flow model; train_dmf.py turns it into a flow map")
        if key in options and key not in free and value != options[key]:
            flag = shown("trans_depth" if key == "depth" else key)
            raise InputError(f"{flag} {value} contradicts {path}, which has {options[key]}; leave the flag out")
        options[key] = value
    return options
