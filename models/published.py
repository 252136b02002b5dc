"""Published weights (DeepFlow, SiT, REPA, Decoupled MeanFlow, MMDiT): their configuration, and conversion to ours.

Sizes follow from the shapes, heads and key layers from the preset of the same width; flags override. Only the SiT
release needs conversion: its time runs the other way.
"""

import math

import torch

from common.errors import InputError
from models.layers import TimestepEmbedder, frequencies
from models.presets import PRESETS, Preset, kind_of, parse_df_idxs, spaced_key_layers

RMS_NORM = "blocks.0.attn.q_norm.scale"  # Decoupled MeanFlow's QK norm, in its flow models too
TEXT = "context_embedder.weight"  # only text-to-image has it


def from_published(state, path, df_idxs=None, dmf_depth=None):
    """A published state dict → state dict in this project's conventions, constructor arguments. Raises InputError."""
    try:
        return convert(state, config_from_state(state, df_idxs, dmf_depth))
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # an expected name or shape is missing
        raise InputError(f"--ckpt {path} is not of a known family (DeepFlow, SiT, DMF, MMDiT): {error}") from None


def config_from_state(state, df_idxs=None, dmf_depth=None):
    """Constructor arguments of a published state dict, as far as names and shapes tell. Raises InputError.

    df_idxs: the key layers if known; default: the preset's, else evenly spaced. dmf_depth: given, the file is taken
    as a flow map, as it is if it has a log-variance head; default: the preset's, else two thirds of the blocks.
    """
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    is_text = TEXT in state
    depth = length_of("joint_blocks" if is_text else "blocks", state)
    num_branches = 1 + length_of("df_blocks", state)
    rows = [r for r in PRESETS.values() if r.hidden_size == hidden_size and (r.kind == "text") == is_text]
    row = min(rows, key=lambda r: (len(r.df_idxs) + 1 != num_branches, r.depth != depth), default=None)  # the closest
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
        num_encoders = length_of("projectors", state) // max(num_branches - 1, 1)
        z_dims = tuple(state[f"projectors.{j}.4.weight"].shape[0] for j in range(num_encoders))
        config |= {"ssl_align": True, "z_dims": z_dims, "projector_dim": state["projectors.0.0.weight"].shape[0]}
        config["legacy_scaling"] = num_branches > 1  # as in every aligned DeepFlow that was released
        config["encoder_depth"] = min(row.encoder_depth if row else Preset.encoder_depth, depth)
    return config


def length_of(modules, state):
    """Length of a list of modules, by name, in a state dict."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{modules}.")})


def default_dmf_depth(depth, df_idxs):
    """The preset's number of blocks that see t for this depth and these key layers, else about two thirds."""
    rows = [row for row in PRESETS.values() if row.dmf_depth and (row.depth, row.df_idxs) == (depth, df_idxs)]
    return rows[0].dmf_depth if rows else (df_idxs[-1] if df_idxs else max(1, round(depth * 2 / 3)))


def heads_from_state(state, hidden_size):
    """Number of heads for a width without preset: from QK norm, else heads of 64 (32 in REPA's text-to-image)."""
    norm = next((tensor for name, tensor in state.items() if ".attn.q_norm." in name), None)
    width = 32 if TEXT in state else 64
    return max(1, hidden_size // (width if norm is None else norm.shape[0]))


def convert(state, config):
    """Bring published weights to this project's conventions: only the SiT release changes, reversed in time.

    The others already have t = 0 as data: DeepFlow, MMDiT, Decoupled MeanFlow, and REPA's SiT, which has a projector.
    """
    is_sit_release = not (config["df_idxs"] or config.get("ssl_align") or RMS_NORM in state)
    if kind_of(config) != "flow" or not is_sit_release:
        return state, config
    return reverse_time(drop_sigma(state, config["in_channels"])), config


def drop_sigma(state, channels):
    """Remove the unused half of a `learn_sigma` output layer; its rows are ordered (patch row, column, 2C channels)."""
    patch_area = state["x_embedder.proj.weight"].shape[-1] ** 2
    if state["final_layer.linear.bias"].shape[0] == patch_area * channels:
        return state
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    rows = {name: state[name].unflatten(0, (patch_area, 2 * channels)) for name in names}
    return {**state, **{name: tensor[:, :channels].flatten(0, 1) for name, tensor in rows.items()}}


def reverse_time(state):
    """Weights of a network whose t = 1 is data and whose velocity points there, as ours: v(x, t) = −network(x, 1 − t).

    The sign goes into the output layer. The time goes into the embedder's first Linear, because the sinusoid of
    1 − t is a rotation of the sinusoid of t: cos((1−t)f) = cos f·cos tf + sin f·sin tf, and likewise for sin.
    """
    n = TimestepEmbedder.NUM_FREQUENCIES
    weight = state["t_embedder.mlp.0.weight"]
    f = frequencies(n, weight.device).double()
    of_cos, of_sin = weight.double().split(n, dim=1)
    rotated = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    return {
        **state,
        "t_embedder.mlp.0.weight": rotated.to(weight.dtype),
        "final_layer.linear.weight": -state["final_layer.linear.weight"],
        "final_layer.linear.bias": -state["final_layer.linear.bias"],
    }


def published_note(path, options):
    """What is assumed about a published file because its weights do not determine it."""
    told = f"{path}: taken as a published file with {options['num_heads']} heads, "
    kind = kind_of(options)
    if kind == "flow map":
        return told + f"a flow map of which {options['dmf_depth']} blocks see t (others: --dmf-depth)"
    if kind == "text" and not options["df_idxs"]:
        return told + "REPA's text-to-image MMDiT"
    if options["df_idxs"]:
        told += f"key layers {list(options['df_idxs'])} (others: --df-idxs)"
        if options.get("legacy_scaling"):
            told += ", --legacy-scaling as in all released aligned ones (others: --no-legacy-scaling)"
        return told
    if options.get("ssl_align"):
        return told + f"SiT of REPA, aligned after block {options['encoder_depth']}"
    if options["qk_norm"] == "rms":
        return told + "SiT of Decoupled MeanFlow"
    return told + "SiT (without projector: time reversed)"
