"""Reading model files: ours, and the published DeepFlow, SiT, REPA and DMF ones, recognised by their keys.

A file of ours carries its configuration, and so does a folder that models/export.py wrote. Of a published one, sizes
follow from the shapes, heads and key layers from the preset of the same width; flags override. Loading is strict.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import InputError, note
from models.deepflow import DeepFlow
from models.layers import TimestepEmbedder
from models.presets import (
    PRESETS,
    Preset,
    build,
    constructor_defaults,
    network_class,
    parse_df_idxs,
    spaced_key_layers,
)

ENTRIES = {"ema": "ema", "raw": "model"}  # --weights → entry of a file
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # a folder's, by the hub's convention


def read_folder(folder):
    """A folder with model.safetensors and config.json → the content that a checkpoint of ours has, or InputError."""
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
        # Published files hold their argparse.Namespace beside the weights: harmless, and allowed by name only.
        # Mapped, so that eight processes share one copy of the file in memory; old files are no zips and cannot be.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # the bytes of a damaged file decide what the unpickler stumbles over
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"checkpoint {path} holds the Python object {refused.group(1)}, which is not loaded: it could run "
                "code; save the weights alone"
            ) from None
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"checkpoint {path} is unreadable or truncated ({reason}); copy it again") from None


@dataclasses.dataclass
class Checkpoint:
    """A model with what its file says of it; run, data and steps are empty for published files."""

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

    weights: "ema" or "raw" (the entry "model"); overrides: constructor arguments that a published file cannot tell.
    Raises InputError where the file does not hold what is asked for.
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
    with torch.device("meta"):  # no time is spent on initial weights
        model = build(options)
    load_strictly(model, state, path)
    run, data = (content["config"], content.get("data", {})) if is_ours else ({}, {})
    return Checkpoint(model.float().eval(), options, run, data, content.get("steps"))


def load_model(path, weights="ema", **overrides):
    """Model in eval mode and its constructor arguments; everything else as load_checkpoint."""
    checkpoint = load_checkpoint(path, weights, **overrides)
    return checkpoint.model, checkpoint.options


def published_note(path, options):
    """What was assumed of a published file because no weight tells it."""
    told = f"{path}: taken as a published file of {options['num_heads']} heads, "
    if "dmf_depth" in options:
        return told + f"a flow map of which {options['dmf_depth']} blocks see t (others: --dmf-depth)"
    if not options["df_idxs"] and "context_dim" in options:
        return told + "REPA's text-to-image MMDiT"
    if options["df_idxs"]:
        told += f"key layers {list(options['df_idxs'])} (others: --df-idxs)"
        if options.get("ssl_align") and not options.get("legacy_scaling"):
            told += "; the SSL-aligned release used --legacy-scaling, which is not given"
        return told
    if options.get("ssl_align"):
        return told + f"SiT of REPA, aligned after block {options['encoder_depth']}"
    if options["qk_norm"] == "rms":
        return told + "SiT of Decoupled MeanFlow"
    return told + "SiT (without projector: time reversed)"


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


def from_published(state, path, df_idxs=None, dmf_depth=None):
    """State dict in this project's conventions and constructor arguments of a published state dict, or InputError."""
    try:
        return convert(state, config_from_state(state, path, df_idxs, dmf_depth))
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # an expected name or shape is not there
        raise InputError(f"--ckpt {path} is not of a known family (DeepFlow, SiT, DMF, MMDiT): {error}") from None


def config_from_state(state, path, df_idxs=None, dmf_depth=None):
    """Constructor arguments of a published state dict, as far as names and shapes tell. Raises InputError.

    df_idxs: the key layers, where they are known; else the preset's, else evenly spaced. dmf_depth: says that the file
    is a flow map, as a log-variance head does; else the preset's, else two thirds of the blocks.
    """
    if "x_embedder.proj.weight" not in state or "pos_embed" not in state:
        raise InputError(
            f"--ckpt {path} is not of a known family (DeepFlow, SiT, DMF, MMDiT): x_embedder or pos_embed is missing"
        )
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    is_text = TEXT in state
    blocks = "joint_blocks." if is_text else "blocks."
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(blocks))
    num_branches = 1 + len({name.split(".")[1] for name in state if name.startswith("df_blocks.")})
    row = closest_preset(hidden_size, depth, num_branches, is_text)
    if df_idxs is None:
        is_preset = row and (row.depth, len(row.df_idxs) + 1) == (depth, num_branches)
        df_idxs = row.df_idxs if is_preset else spaced_key_layers(depth, num_branches)
    config = {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": row.num_heads if row else heads_from_state(state, hidden_size),
        "df_idxs": parse_df_idxs(df_idxs),
        "qk_norm": "rms" if RMS_NORM in state else any(name.endswith("attn.q_norm.weight") for name in state),
    }
    if is_text:
        config["context_dim"] = state[TEXT].shape[1]
    else:
        config["num_classes"] = state["y_embedder.embedding_table.weight"].shape[0] - 1
    has_head = "logvar_linear.weight" in state
    if has_head or dmf_depth is not None:
        depth_of_t = default_dmf_depth(depth, config["df_idxs"]) if dmf_depth is None else dmf_depth
        config.update(dmf_depth=depth_of_t, use_logvar=has_head)
    if num_branches > 1:
        config["projector_dim"] = state["df_blocks.0.acc_mlp.0.weight"].shape[0]
    if "projectors.0.4.weight" in state:
        config.update(alignment_from_state(state, max(num_branches - 1, 1)))
        config["encoder_depth"] = min(row.encoder_depth if row else Preset.encoder_depth, depth)
    return config


def alignment_from_state(state, num_blocks):
    """Constructor arguments that the projectors tell; num_blocks: how many places of the network are projected."""
    count = len({name.split(".")[1] for name in state if name.startswith("projectors.")})
    z_dims = tuple(state[f"projectors.{j}.4.weight"].shape[0] for j in range(count // num_blocks))
    return {"ssl_align": True, "z_dims": z_dims, "projector_dim": state["projectors.0.0.weight"].shape[0]}


def default_dmf_depth(depth, df_idxs):
    """The preset's number of blocks that see t for this depth and these key layers, else about two thirds."""
    rows = [row for row in PRESETS.values() if row.dmf_depth and (row.depth, row.df_idxs) == (depth, df_idxs)]
    return rows[0].dmf_depth if rows else (df_idxs[-1] if df_idxs else max(1, round(depth * 2 / 3)))


def heads_from_state(state, hidden_size):
    """Number of heads of an unknown width: QK norm tells it, else heads of 64, in REPA's text-to-image of 32."""
    norm = next((tensor for name, tensor in state.items() if ".attn.q_norm." in name), None)
    width = 32 if TEXT in state else 64
    return max(1, hidden_size // (width if norm is None else norm.shape[0]))


def closest_preset(hidden_size, depth, num_branches, is_text):
    """Preset row of this kind and width, preferably of this depth and number of branches too; None if unknown."""
    rows = [r for r in PRESETS.values() if r.hidden_size == hidden_size and bool(r.context_dim) == is_text]
    rows.sort(key=lambda row: (len(row.df_idxs) + 1 != num_branches, row.depth != depth))
    return rows[0] if rows else None


def convert(state, config):
    """Bring other families' published weights to this project's conventions; DeepFlow's pass unchanged.

    So do REPA's SiT, known by its projector, MMDiT, and Decoupled MeanFlow's files (t = 0 is data already); the SiT
    release is turned round in time.
    """
    is_turned = "dmf_depth" in config or "context_dim" in config or RMS_NORM in state
    if config["df_idxs"] or config.get("ssl_align") or is_turned:
        return state, config
    return reverse_time(drop_sigma(state, config["in_channels"])), config


def drop_sigma(state, channels):
    """Remove the unused half of a `learn_sigma` output layer; its rows are ordered (patch row, column, 2C channels)."""
    weight, bias = state["final_layer.linear.weight"], state["final_layer.linear.bias"]
    patch_area = state["x_embedder.proj.weight"].shape[-1] ** 2
    if weight.shape[0] == patch_area * channels:
        return state
    weight = weight.unflatten(0, (patch_area, 2 * channels))[:, :channels].flatten(0, 1)
    bias = bias.unflatten(0, (patch_area, 2 * channels))[:, :channels].flatten()
    return {**state, "final_layer.linear.weight": weight, "final_layer.linear.bias": bias}


def reverse_time(state):
    """Weights of a network whose t = 1 is data and whose velocity points there, as ours: v(x, t) = −network(x, 1 − t).

    The sign goes into the output layer. The time goes into the embedder's first Linear, because the sinusoid of
    1 − t is a rotation of the sinusoid of t: cos((1−t)f) = cos f·cos tf + sin f·sin tf, and likewise for sin.
    """
    n = TimestepEmbedder.NUM_FREQUENCIES
    f = torch.exp(-math.log(10000.0) * torch.arange(n, dtype=torch.float32) / n).double()
    weight = state["t_embedder.mlp.0.weight"]
    f = f.to(weight.device)
    of_cos, of_sin = weight.double().split(n, dim=1)
    rotated = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    return {
        **state,
        "t_embedder.mlp.0.weight": rotated.to(weight.dtype),
        "final_layer.linear.weight": -state["final_layer.linear.weight"],
        "final_layer.linear.bias": -state["final_layer.linear.bias"],
    }


def check_overrides(config, overrides, path, is_ours):
    """Merge given constructor arguments; where the file already answers, a contradiction is an InputError.

    Of a published file only heads, key layers, the legacy clamp, the aligned block and a flow map's depth cannot be
    told from the weights.
    """
    config = dict(config)
    free = () if is_ours else ("num_heads", "df_idxs", "legacy_scaling", "encoder_depth", "dmf_depth")
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "dmf_depth" and is_ours and key not in config:
            raise InputError(f"--dmf-depth {value}: {path} is a flow model; train_dmf.py turns it into a flow map")
        value = parse_df_idxs(value) if key == "df_idxs" else value
        known = config.get(key)
        known = tuple(known) if isinstance(known, list) else known
        if key in config and key not in free and value != known:
            raise InputError(f"--{FLAGS.get(key, key.replace('_', '-'))} {value} contradicts {path}, which has {known}")
        config[key] = value
    config["df_idxs"] = tuple(config["df_idxs"])
    return config


RMS_NORM = "blocks.0.attn.q_norm.scale"  # Decoupled MeanFlow's QK norm, in its flow models too
TEXT = "context_embedder.weight"  # only text-to-image has it
FLAGS = {"depth": "trans-depth"}  # flags that are not named as the constructor's argument
