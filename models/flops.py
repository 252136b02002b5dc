"""FLOP counts: one forward pass of one sample, traced on the meta device, so any size takes seconds and no memory.

A multiply-add is one MAC and two FLOP. The training forward is counted, with all velocity and acceleration layers
(and projectors, where the model has them).
"""

import collections
import dataclasses
import functools
import json
import math
import re

import torch
from torch import nn

from models.gpus import peak_of
from models.mmdit import TEXT_TOKENS
from models.presets import build


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiply-adds of one forward pass of one sample."""

    paper_macs: int  # Linear and convolution layers without VeRA's cross-attention: Table 8's "GFLOPS" are these / 1e9
    total_macs: int  # every matrix product, attention included


def flops_per_image(config, options):
    """FLOP of a training step for one sample; options: the model's constructor arguments."""
    return config.passes * 2 * _total_macs(json.dumps(options))


@functools.cache
def _total_macs(options):
    with torch.device("meta"):
        return count_flops(build(json.loads(options))).total_macs


def count_flops(model):
    """Flops of a DeepFlow on any device; its weights are neither read nor copied."""
    parts = count_parts(model)
    paper_macs = sum(part.layer_macs for name, part in parts.items() if not name.endswith("cross_attention"))
    return Flops(paper_macs, sum(part.layer_macs + part.attention_macs for part in parts.values()))


def peak_flops(device, precision):
    """Peak FLOP/s in the GPU's data sheet for bf16 and fp16; None for other precisions and GPUs not in the table."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    if "V100" in name and precision == "bf16":
        return None  # it has no bf16 units
    return peak_of(name)


def meta_inputs(model):
    """Arguments of `forward` for one training sample of the model's size, without memory.

    x (1, C, H, W), a time (1,) for each branch, y (1,) or text features (1, L, W); for a flow map x, t, y, r.
    """
    size = math.isqrt(model.pos_embed.shape[1]) * model.patch_size
    dtype = model.pos_embed.dtype
    x = torch.empty(1, model.in_channels, size, size, dtype=dtype, device="meta")
    t, r = torch.empty(2, 1, dtype=dtype, device="meta")
    y = torch.empty(1, dtype=torch.long, device="meta")
    if model.kind == "text":
        y = torch.empty(1, TEXT_TOKENS, model.context_dim, dtype=dtype, device="meta")
    if model.kind == "flow map":
        return x, t, y, r
    return x, [t.clone() for _ in range(model.num_branches)], y


@dataclasses.dataclass
class Part:
    """Parameters of a part of the network (over all blocks) and multiply-adds of one forward pass of one sample."""

    parameters: int = 0
    layer_macs: int = 0  # Linear and convolution layers
    attention_macs: int = 0  # products of queries, keys and values

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Part(*(a + b for a, b in pairs))


def count_parts(model):
    """{name: Part} in the order of the state dict; `blocks` and `df_blocks` are split by kind of layer."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    parts = collections.defaultdict(Part)
    for name, parameter in model.named_parameters():
        parts[part_of(name)].parameters += parameter.numel()
    weights = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, meta_inputs(model))
    for name, ops in own_operations(counter.get_flop_counts()).items():
        is_layer = isinstance(model.get_submodule(name), nn.Linear)  # which some versions of torch run as a bmm
        products = {op for op in ops if re.search("bmm|scaled_dot_product", str(op)) and not is_layer}
        attention = sum(ops[op] for op in products) // 2
        parts[part_of(name)] += Part(0, sum(ops.values()) // 2 - attention, attention)
    return dict(parts)


def own_operations(counts):
    """{module: {operation: FLOP}} of what runs in a module itself, not in its children; counts: FlopCounterMode's."""
    whole, own = {name.partition(".")[2]: collections.Counter(ops) for name, ops in counts.items()}, {}
    for name in sorted(whole, key=len, reverse=True):  # children before their parents; the network's name is ""
        below = (ops for child, ops in own.items() if child.startswith(name and f"{name}."))
        own[name] = whole[name] - sum(below, collections.Counter())
    return {name: ops for name, ops in own.items() if ops}


def part_of(name):
    """The part that a parameter or module belongs to: `blocks.3.attn.qkv` → `blocks.attn`.

    What runs in a block itself is its attention's products.
    """
    words = [word for word in name.split(".") if not word.isdigit()]
    part = ".".join(words[: 2 if words[0] in ("blocks", "df_blocks") else 1])
    return "blocks.attn" if part == "blocks" else part
