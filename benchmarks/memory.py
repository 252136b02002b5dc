"""Memory of a training step on a GPU, predicted and not measured: which preset and batch fit on which card.

    python -m benchmarks.memory                                       # the table of docs/benchmarks.md
    python -m benchmarks.memory --models DeepFlow-XL/2 --batches 96 192

bytes = parameters · BYTES_PER_PARAMETER + images · saved + WORKSPACE, all on one GPU, bf16 autocast. "Saved" is what
the forward pass keeps for the backward pass: a count per block, per VeRA block and for the rest, in units of T·D bf16
values (T tokens, text included; D width). Eager counts what autograd holds (tests check it), compiled what the graphs
that Inductor lowers for an H200 keep. Alignment's projectors are left out.
"""

import dataclasses

import torch

from benchmarks.timing import print_table
from common.errors import exit_on_input_error
from common.flags import Range, flag, parse_flags
from models import model_config
from models.mmdit import TEXT_TOKENS
from models.presets import build

BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 2  # weights, EMA, AdamW's moments, gradients in fp32; bf16 casts of the weights
WORKSPACE = 2e9  # CUDA's context, cuBLAS, fragmentation; an estimate
CARDS = (24, 40, 80, 141)  # GB
# Saved values in units of T·D: (block, VeRA, VeRA per P/D, rest); P is the width of ACC_MLP.
UNITS = {"eager": (24.1, 30.1, 8.0, 5.1), "compiled": (20.1, 26.1, 8.0, 2.1)}
MODELS = (
    *("DeepFlow-B/2", "DeepFlow-L/2", "DeepFlow-XL/2", "SiT-B/2", "SiT-XL/2", "DMFT-B/2", "DMFT-XL/2"),
    *("MMDiT-L/2", "DeepFlow-MMDiT-L/2"),
)


@dataclasses.dataclass(kw_only=True)
class MemoryFlags:
    """Flags of this program."""

    models: tuple = flag(MODELS, "presets", str, nargs="+")
    batches: tuple = flag((32, 64, 128, 256), "images per GPU and micro-batch", int, nargs="+", range=Range(low=1))


def fixed_bytes(options):
    """Bytes that do not grow with the batch; options: constructor arguments."""
    with torch.device("meta"):
        model = build(options)
    return BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()) + WORKSPACE


def saved_bytes(options, how):
    """Bytes that the forward pass of an image keeps for the backward pass; how: eager or compiled."""
    block, vera, vera_mlp, rest = UNITS[how]
    width, is_text = options["hidden_size"], options.get("context_dim") is not None
    unit = 2 * width * (options["input_size"] // options["patch_size"]) ** 2
    share = 1 + is_text * TEXT_TOKENS * 2 * width / unit  # text tokens pass through the blocks too
    each = options["depth"] * block * share + rest
    each += len(options["df_idxs"]) * (vera + vera_mlp * options["projector_dim"] / width)
    rows = 2 if options.get("dmf_depth") is not None else 1  # a flow map trains two rows of each image
    return rows * each * unit


def step_bytes(options, batch, how):
    """Predicted bytes of a training step of `batch` images on one GPU, without gradient checkpointing."""
    return fixed_bytes(options) + batch * saved_bytes(options, how)


def largest_batch(options, memory, how):
    """The largest of 256, 128, … 1 images whose step is predicted to fit into `memory` bytes; 1 if none does."""
    sizes = [2**power for power in range(8, -1, -1)]
    return next((size for size in sizes if step_bytes(options, size, how) <= memory), 1)


def fits_on(memory):
    """The smallest of CARDS that holds `memory` bytes, as text. Cards have some 5 % more than named, as a reserve."""
    return next((f"{card} GB" for card in CARDS if memory <= card * 1e9), "none")


def main():
    args = parse_flags(MemoryFlags, description=__doc__)
    rows = []
    for name in args.models:
        options = model_config(name)
        for how in UNITS:
            sizes = (step_bytes(options, batch, how) for batch in args.batches)
            cells = (f"{size / 1e9:.0f}: {fits_on(size)}" for size in sizes)
            fixed, saved = fixed_bytes(options) / 1e9, saved_bytes(options, how) / 1e6
            rows.append([name, how, f"{fixed:.1f}", f"{saved:.0f}", *cells])
    print_table(["model", "", "GB", "+ MB/image", *(f"{batch} images" for batch in args.batches)], rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
