"""Published weights (DeepFlow, SiT, REPA, Decoupled MeanFlow, MMDiT): their configuration, and conversion to ours.

Sizes follow from the shapes; heads and key layers from the file's own `args`, or else from the preset of the same
width. Flags override both. SiT's time runs the other way; its weights are converted.
"""

import argparse
import dataclasses
import itertools
import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator

from common.errors import InputError, note
from common.flags import shown
from common.records import Count, check_record
from models.layers import TimestepEmbedder, frequencies
from models.presets import FLOW_MAPS, PRESETS, Preset, kind_of, parse_df_idxs, spaced_key_layers

RMS_NORM = "blocks.0.attn.q_norm.scale"  # Decoupled MeanFlow's QK norm, in its flow models too
TEXT = "context_embedder.weight"  # only text-to-image has it
SIT_PATHS = {"Linear": "linear", "GVP": "cosine"}  # SiT's names; REPA and its successors use ours
KeyLayers = Annotated[tuple[int, ...], BeforeValidator(parse_df_idxs)]


@dataclasses.dataclass
class Arguments:
    """The `args` of a published training file that affect sampling; None: not given."""

    model: str | None = None
    trans_depth: Count | None = None
    df_idxs: KeyLayers | None = None
    legacy_scaling: bool | None = None
    qk_norm: bool | None = None
    encoder_depth: Count | None = None
    dmf_depth: Count | None = None
    path_type: Literal["linear", "cosine", "Linear", "GVP"] | None = None
    prediction: Literal["v", "velocity"] | None = None  # SiT's word for it is velocity


def read_arguments(args, path):
    """{name: value} of the settings in a file's `args` (a Namespace, a dict or None). Raises InputError."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    found = check_record(Arguments, {} if args is None else args, f"{path}, args", "save the weights alone")
    return {name: value for name, value in vars(found).items() if value is not None}


def from_published(state, path, args, given):
    """A published state dict → state dict in this project's conventions, constructor arguments, path_type or None.

    args: the file's own settings; given: {flag: value or None}, which override them. A note says what was assumed.
    Raises InputError if weights and settings contradict each other, or the direction of time is ambiguous; LookupError,
    ArithmeticError, ValueError or RuntimeError if an expected name or shape is missing.
    """
    said, given = read_arguments(args, path), {name: value for name, value in given.items() if value is not None}
    own, known = {name: value for name, value in said.items() if name not in given}, {**said, **given}
    state, joined = join_decoder(state)
    is_map = said.get("model") in FLOW_MAPS
    config = config_from_state(state, known.get("df_idxs"), known.get("dmf_depth"), is_map)
    check_arguments(own, state, config, joined, path)
    names = ("legacy_scaling", "num_heads", *(["encoder_depth"] if config.get("ssl_align") else []))
    config |= {name: known[name] for name in names if name in known} | ({"encoder_depth": joined} if joined else {})
    convention = convention_of(state, config, said, given, path)
    state = convert(state, config, convention)
    note(published_note(path, config, convention, own, given.keys() & said.keys()))
    return state, config, SIT_PATHS.get(known.get("path_type"), known.get("path_type"))


def join_decoder(state):
    """Rename the `decoder_blocks` of REPA's first files to `blocks` → (state dict, number of the aligned block).

    In these files `blocks` ends with the aligned block. The number is 0 if there is nothing to rename.
    """
    first, old = length_of("blocks", state), "decoder_blocks."
    if not any(name.startswith(old) for name in state):
        return state, 0
    parts = {name: name.removeprefix(old).partition(".") for name in state if name.startswith(old)}
    renamed = {name: f"blocks.{first + int(number)}.{rest}" for name, (number, _, rest) in parts.items()}
    return {renamed.get(name, name): tensor for name, tensor in state.items()}, first


def check_arguments(own, state, config, joined, path):
    """Raise InputError if a file's settings (those of its `args` that no flag overrides) contradict its weights."""
    depth, ends = config["depth"], own.get("df_idxs", ())
    possible = {"trans_depth": [depth], "qk_norm": [bool(config["qk_norm"])]}
    possible["dmf_depth"] = config["df_idxs"] or range(1, depth)
    if config.get("ssl_align") and not config["df_idxs"]:
        possible["encoder_depth"] = [joined] if joined else range(1, depth + 1)
    wrong = [name for name, values in possible.items() if name in own and own[name] not in values]
    increasing = all(before < after for before, after in itertools.pairwise((0, *ends, depth)))
    if "df_idxs" in own and (len(ends) != length_of("df_blocks", state) or not increasing):
        wrong, possible["df_idxs"] = ["df_idxs"], f"{length_of('df_blocks', state)} of {depth} blocks"
    if wrong:
        fault = f"{path}: its args have {wrong[0]} {own[wrong[0]]}, its weights {possible[wrong[0]]}"
        raise InputError(f"{fault}; pass {shown(wrong[0])}, or save the weights alone")


def convention_of(state, config, said, given, path):
    """The direction of time, one of CONVENTIONS, by flag, weights or `args`. Raises InputError if it stays open."""
    if wanted := given.get("convention"):
        if wanted == "sit" and not is_plain_flow(config):
            raise InputError(f"--convention sit is for flow models of one branch, {path} is another; leave it out")
        return wanted
    words, tells = {said.get("path_type"), said.get("prediction")}, set()
    if not is_plain_flow(config) or config.get("ssl_align") or RMS_NORM in state or words & {"linear", "cosine", "v"}:
        tells.add("repa")
    if learns_sigma(state, config) or words & {*SIT_PATHS, "velocity"}:
        tells.add("sit")
    if len(tells) != 1:
        fault = f"{path} tells {'two directions' if tells else 'no direction'} of time"
        remedy = "pass --convention sit (t = 1 is data, as in SiT's release) or repa (t = 0 is, as in REPA's and DMF's)"
        raise InputError(f"{fault}; {remedy}")
    return tells.pop()


def config_from_state(state, df_idxs=None, dmf_depth=None, is_map=False):
    """Constructor arguments of a published state dict, as far as names and shapes tell. Raises InputError.

    df_idxs: the key layers if known; default: the preset's, else evenly spaced. With a log-variance head, dmf_depth or
    is_map, it is treated as a flow map; dmf_depth's default: `default_dmf_depth`.
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
    config = {"input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size}
    config |= {"in_channels": in_channels, "hidden_size": hidden_size, "depth": depth}
    config["num_heads"] = row.num_heads if row else heads_from_state(state, hidden_size)
    config["df_idxs"] = parse_df_idxs(df_idxs)
    config["qk_norm"] = "rms" if RMS_NORM in state else any(name.endswith("attn.q_norm.weight") for name in state)
    if is_text:
        config["context_dim"] = state[TEXT].shape[1]
    else:
        config["num_classes"] = state["y_embedder.embedding_table.weight"].shape[0] - 1
    has_head = "logvar_linear.weight" in state
    if has_head or is_map or dmf_depth is not None:
        config["dmf_depth"] = default_dmf_depth(depth, config["df_idxs"]) if dmf_depth is None else dmf_depth
        config["use_logvar"] = has_head
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
    presets = {(row.depth, row.df_idxs): row.dmf_depth for row in map(PRESETS.get, FLOW_MAPS)}
    return presets.get((depth, df_idxs), df_idxs[-1] if df_idxs else max(1, round(depth * 2 / 3)))


def heads_from_state(state, hidden_size):
    """Number of heads for a width without preset: from QK norm, else heads of 64 (32 in REPA's text-to-image)."""
    norm = next((tensor for name, tensor in state.items() if ".attn.q_norm." in name), None)
    width = 32 if TEXT in state else 64
    return max(1, hidden_size // (width if norm is None else norm.shape[0]))


def convert(state, config, convention="repa"):
    """Published weights in this project's conventions: no learned sigma; time reversed for convention "sit"."""
    if learns_sigma(state, config):
        state = drop_sigma(state, config["in_channels"])
    return reverse_time(state) if convention == "sit" else state


def is_plain_flow(config):
    """Whether a model is a single-branch flow, as in SiT."""
    return kind_of(config) == "flow" and not config["df_idxs"]


def learns_sigma(state, config):
    """Whether the output layer has 2C channels, as in SiT's release."""
    width = 2 * config["in_channels"] * config["patch_size"] ** 2
    return is_plain_flow(config) and state["final_layer.linear.bias"].shape[0] == width


def drop_sigma(state, channels):
    """Remove the unused half of a `learn_sigma` output layer; its rows are ordered (patch row, column, 2C channels)."""
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    rows = {name: state[name].unflatten(0, (-1, 2 * channels)) for name in names}
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


def published_note(path, config, convention, own, overridden):
    """Line on what is assumed about a published file. own: its `args`; overridden: names of those a flag overrides."""
    names = ("num_heads", "df_idxs", "dmf_depth", "legacy_scaling", "qk_norm", "encoder_depth")
    assumed = {name: config[name] for name in names if config.get(name)} | {"convention": convention}
    assumed, own = (", ".join(f"{name} {value}" for name, value in part.items()) for part in (assumed, own))
    text = f"{path}: taken as a published {kind_of(config)} model with {assumed}"
    text += f"; its args say {own}" if own else ""
    return text + (f"; flags override {', '.join(sorted(overridden))} of its args" if overridden else "")
