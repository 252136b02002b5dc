"""Parameters and multiply-adds of a model, part by part, with and without attention products, beside Table 8.

    python -m evaluations.count_flops DeepFlow-XL/2
    python -m evaluations.count_flops DeepFlow-B/2 --trans-depth 10

One forward pass of one sample at 32x32x4 latents, in millions of parameters and billions of multiply-adds.
"""

import dataclasses
import shlex

from common.errors import exit_on_input_error, note
from common.flags import BLOCKS, flag, parse_early, parse_flags, required, words_of


@dataclasses.dataclass(kw_only=True)
class FlopsFlags:
    model: str = required("preset name", positional=True)
    trans_depth: int | None = flag(None, "number of blocks", int, range=BLOCKS)
    df_idxs: list | None = flag(None, "blocks (from 1) after which a branch ends", str, nargs="+")


if __name__ == "__main__":
    parse_early(FlopsFlags, __doc__)

import torch

from evaluations.metrics.results import markdown
from evaluations.published import TABLE_8
from models import PRESETS, create_model
from models.flops import Part, count_flops, count_parts
from training.config import PROGRAMS


def beside_table_8(name, model):
    """What the paper prints for a model of this size, number of branches and depth, and the same counted here."""
    size, _, patch = name.split("-")[-1].partition("/")
    printed = TABLE_8.get((size, model.num_branches), {}).get(len(model.blocks))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    counted = count_flops(model).paper_macs / 1e9
    here = f"counted as the paper does (no attention products, nothing of the cross-attention): {counted:.2f} G"
    if printed is None or patch != "2" or model.kind != "flow":
        return f"Table 8 has no such model; {parameters:.2f} M parameters, {here}"
    return f"Table 8 prints {printed[0]} M parameters, {printed[1]} GFLOPS; here {parameters:.2f} M, {here}"


def main(argv=None):
    args = parse_flags(FlopsFlags, argv, __doc__)
    with torch.device("meta"):
        model = create_model(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    parts = count_parts(model)
    parts["all"] = sum(parts.values(), Part())
    rows = []
    for name, part in parts.items():
        macs = (part.layer_macs, part.layer_macs + part.attention_macs)
        rows.append([name, f"{part.parameters / 1e6:.2f}", *(f"{count / 1e9:.3f}" for count in macs)])
    print(markdown(["part", "parameters (M)", "G multiply-adds", "with attention products"], rows))
    print(beside_table_8(args.model, model))
    kind, given = PRESETS[args.model].kind, {"--trans-depth": args.trans_depth, "--df-idxs": args.df_idxs}
    words = [word for flag, value in given.items() if value is not None for word in words_of(flag, value)]
    words += ["--from-scratch"] if kind == "flow map" else []
    note(f"next: python {PROGRAMS[kind]} {shlex.join(['--model', args.model, *words])} --data-dir DATA --dry-run")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
