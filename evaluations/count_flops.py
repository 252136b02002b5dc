"""Parameters and multiply-adds of a model, part by part, with and without attention products, beside Table 8.

    python evaluations/count_flops.py DeepFlow-XL/2
    python evaluations/count_flops.py DeepFlow-B/2 --trans-depth 10

One forward pass of one sample at 32x32x4 latents, in millions of parameters and billions of multiply-adds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import torch

from common.errors import exit_on_input_error
from evaluations.metrics.published import TABLE_8
from models import create_model
from models.flops import Part, count_flops, count_parts


def row(name, part):
    """A line of the table."""
    with_attention = part.layer_macs + part.attention_macs
    return f"| {name} | {part.parameters / 1e6:.2f} | {part.layer_macs / 1e9:.3f} | {with_attention / 1e9:.3f} |"


def beside_table_8(name, model):
    """What the paper prints for a model of this size, number of branches and depth, and the same counted here."""
    size = name.split("-")[-1].split("/")[0]
    printed = TABLE_8.get((size, model.num_branches), {}).get(len(model.blocks)) if name.endswith("/2") else None
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    counted = count_flops(model).paper_macs / 1e9
    here = f"counted as the paper does (no attention products, nothing of the cross-attention): {counted:.2f} G"
    if printed is None:
        return f"Table 8 has no such model; {parameters:.2f} M parameters, {here}"
    return f"Table 8 prints {printed[0]} M parameters, {printed[1]} GFLOPS; here {parameters:.2f} M, {here}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="preset name")
    parser.add_argument("--trans-depth", type=int, help="number of blocks")
    parser.add_argument("--df-idxs", nargs="+", help="blocks (from 1) after which a branch ends")
    args = parser.parse_args(argv)
    with torch.device("meta"):
        model = create_model(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    parts = count_parts(model)
    print("| part | parameters (M) | G multiply-adds | with attention products |")
    print("|---|---|---|---|")
    for name, part in parts.items():
        print(row(name, part))
    print(row("all", sum(parts.values(), Part())))
    print(beside_table_8(args.model, model))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
