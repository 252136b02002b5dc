"""Reading model files: ours and published ones, recognised by their keys. Loading is strict.

A file of ours carries its configuration, and so does a folder that models/export.py wrote. What is known about a
published one is in models/published.py.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import InputError, first_line, note
from models.deepflow import DeepFlow
from models.presets import build, constructor_defaults, kind_of, network_class, parse_df_idxs
from models.published import from_published, published_note

ENTRIES = {"ema": "ema", "raw": "model"}  # --weights → entry of a file
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # a folder's, by the hub's convention


def read_folder(folder):
    """A folder with model.safetensors and config.json → content as of a checkpoint of ours. Raises InputError."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (Path(folder) / name).is_file():
            raise InputError(f"checkpoint {folder} is a folder without {name}; name a .pt file, or an exported folder")
    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
        defaults = constructor_defaults(network_class(config))
        options = {name: config.get(name, default) for name, default in defaults.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/{CONFIG_FILE} is unreadable ({error}); export the model again") from None
    content = {ENTRIES[config.get("weights", "ema")]: read_safetensors(Path(folder) / WEIGHTS_FILE)}
    run = {**config.get("run", {}), "model_options": options}
    return {**content, "config": run, "data": config.get("data", {}), "steps": config.get("steps")}


def read_safetensors(path):
    """State dict in a .safetensors file. Raises InputError naming the file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is unreadable or truncated ({error}); copy it again") from None


def read_file(path):
    """Read a checkpoint with `weights_only=True`, or an exported folder. Raises InputError naming the file."""
    if Path(path).is_dir():
        return read_folder(path)
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    try:
        # Published files hold an argparse.Namespace beside the weights: it is harmless and allowed by name.
        # Memory-mapped, so that eight processes share one copy; torch's old format, which is not a zip, cannot be.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # in a damaged file the unpickler can fail with anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"checkpoint {path} holds the Python object {refused.group(1)}, which is not loaded: it could run "
                "code; save the weights alone"
            ) from None
        reason = first_line(error)[:120]
        raise InputError(f"checkpoint {path} is unreadable or truncated ({reason}); copy it again") from None


@dataclasses.dataclass
class Checkpoint:
    """A model and what its file says about it; run and data are empty and steps is None for published files."""

    model: DeepFlow
    options: dict  # constructor arguments
    run: dict  # the run's configuration
    data: dict  # classes, VAE and shapes of the training data
    steps: int | None

    @property
    def kind(self):
        """The kind of network: "flow", "flow map" or "text"."""
        return self.model.kind

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
    options = model_options(content)
    is_ours = options is not None
    if not is_ours:
        state, options = from_published(state, path, overrides.get("df_idxs"), overrides.get("dmf_depth"))
    options = check_overrides(options, overrides, path, is_ours)
    if not is_ours:
        note(published_note(path, options))
    with torch.device("meta"):  # spends no time on initial weights
        model = build(options)
    load_strictly(model, state, path)
    run, data = (content["config"], content.get("data", {})) if is_ours else ({}, {})
    return Checkpoint(model.float().eval(), options, run, data, content.get("steps"))


def load_model(path, weights="ema", **overrides):
    """Model in eval mode and its constructor arguments; everything else as load_checkpoint."""
    checkpoint = load_checkpoint(path, weights, **overrides)
    return checkpoint.model, checkpoint.options


def model_options(content):
    """The constructor arguments in a file of ours, else None."""
    config = content.get("config") if isinstance(content, dict) else None
    return dict(config["model_options"]) if isinstance(config, dict) and "model_options" in config else None


def pick_weights(content, weights, path):
    """The state dict `weights` ("ema" or "raw") of a file's content, wrapper prefixes stripped."""
    if not isinstance(content, dict):
        raise InputError(f"--ckpt {path} holds a {type(content).__name__}, not a state dict")
    key = ENTRIES[weights]
    if "x_embedder.proj.weight" in map(strip_prefix, content):
        state = content
    elif key in content:
        state = content[key]
    else:
        entries = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise InputError(f"--ckpt {path} has no entry '{key}' (it holds {entries}); choose other --weights")
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"--ckpt {path}: its weights are not a dictionary of tensors; choose another file")
    return {strip_prefix(name): tensor for name, tensor in state.items()}


def strip_prefix(name):
    """Parameter name without what DDP (`module.`) and torch.compile (`_orig_mod.`) put before it, in any nesting."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def load_strictly(model, state, path):
    """load_state_dict, with one line of InputError that names the first mismatch."""
    own = model.state_dict()
    for kind, names in (("lacks", own.keys() - state.keys()), ("has the unknown", state.keys() - own.keys())):
        if names:
            raise InputError(f"{path} is of another model: it {kind} {min(names)} ({len(names)} such names)")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{path} is of another model: {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            )
    model.load_state_dict(state, assign=model.pos_embed.is_meta)  # nothing can be copied into a meta tensor


def check_overrides(config, overrides, path, is_ours):
    """Constructor arguments with those given on the command line. Raises InputError if they contradict the file.

    The weights of a published file leave open only the heads, the key layers, the legacy clamp, the aligned block and
    the depth of a flow map.
    """
    config = dict(config)
    free = () if is_ours else ("num_heads", "df_idxs", "legacy_scaling", "encoder_depth", "dmf_depth")
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "dmf_depth" and is_ours and kind_of(config) != "flow map":
            raise InputError(f"--dmf-depth {value}: {path} is a flow model; train_dmf.py turns it into a flow map")
        value = parse_df_idxs(value) if key == "df_idxs" else value
        known = config.get(key)
        known = tuple(known) if isinstance(known, list) else known
        if key in config and key not in free and value != known:
            raise InputError(f"--{FLAGS.get(key, key.replace('_', '-'))} {value} contradicts {path}, which has {known}")
        config[key] = value
    config["df_idxs"] = tuple(config["df_idxs"])
    return config


FLAGS = {"depth": "trans-depth"}  # flags named differently from the constructor's argument
