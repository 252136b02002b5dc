"""Images per second of a text-to-image training step beside class-conditional ones of equal width, in one run.

    OMP_NUM_THREADS=2 python benchmarks/t2i_step.py                                   # CPU, fp32
    python benchmarks/t2i_step.py --model DeepFlow-MMDiT-L/2 --batch-size 256           # GPU, bf16

Side by side: the model, its baseline of one branch (MMDiT), and the class-conditional DeepFlow and SiT of equal width,
depth and key layers, each eager and compiled. A step is that of benchmarks/train_step.py.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import describe_machine, interleaved_medians, print_table
from benchmarks.train_step import Step, add_step_flags, make_batch, our_loss
from common.errors import exit_on_input_error
from common.precision import set_math
from models import create_model, model_config
from models.deepflow import DeepFlow
from models.mmdit import TEXT_TOKENS
from models.presets import TEXT_MODELS

CLASSES = 1000


def make_steps(args, device):
    """{(what, how): Step}."""
    options = model_config(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    one_branch = {**options, "df_idxs": ()}
    classes = {name: value for name, value in options.items() if name not in ("context_dim", "init")}
    classes["num_classes"] = CLASSES
    x0, noise, times, labels = make_batch(classes, args.batch_size, len(options["df_idxs"]) + 1, device)
    text = torch.randn(args.batch_size, TEXT_TOKENS, options["context_dim"], device=device)
    builders = {
        args.model: (lambda: create_model(args.model, **options), text),
        "MMDiT, one branch": (lambda: create_model(args.model, **one_branch), text),
        "DeepFlow of classes": (lambda: DeepFlow(**classes), labels),
        "SiT of classes": (lambda: DeepFlow(**{**classes, "df_idxs": ()}), labels),
    }
    return {
        (what, how): Step(build(), our_loss, (x0, noise, times, y), device, args.precision, how == "compiled")
        for what, (build, y) in builders.items()
        for how in (("eager", "compiled") if args.compile else ("eager",))
    }


def parse(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "DeepFlow-MMDiT-L/2" if on_gpu else "DeepFlow-MMDiT-S/2"
    parser.add_argument("--model", default=default, choices=TEXT_MODELS, help="a text-to-image preset")
    add_step_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_math(allow_tf32=True)
    print(f"{args.model}, batch {args.batch_size}, precision {args.precision}, {describe_machine(device)}", flush=True)
    steps = make_steps(args, device)
    medians = interleaved_medians(steps, args.repeats, device)
    rows = []
    for (what, how), seconds in medians.items():
        gflop = steps[what, how].flops / args.batch_size / 1e9
        to_sit = seconds / medians["SiT of classes", how]
        rows.append(
            [what, how, f"{seconds * 1e3:.1f}", f"{args.batch_size / seconds:.2f}", f"{gflop:.1f}", f"{to_sit:.2f}"]
        )
    print_table(["model", "", "ms/step", "images/s", "GFLOP/image", "time to SiT's"], rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
