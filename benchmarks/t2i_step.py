"""Images per second of a text-to-image training step beside class-conditional ones of equal width, in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.t2i_step                                     # CPU, fp32
    python -m benchmarks.t2i_step                                                       # 80 GB GPU, bf16
    python -m benchmarks.t2i_step --model DeepFlow-MMDiT-S/2 --batch-size 256           # likewise

Side by side: the model, its baseline of one branch (MMDiT), and the class-conditional DeepFlow and SiT of equal width,
depth and key layers. All four are in memory at once, first eager, then compiled. A step is that of train_step.py.
"""

import dataclasses

import torch

from benchmarks.steps import BranchFlags, Step, begin, cells, make_batch, our_loss
from benchmarks.timing import DEVICE, ON_GPU, free, interleaved_medians, print_table
from common.errors import exit_on_input_error
from common.flags import Range, flag
from models import create_model, model_config
from models.deepflow import DeepFlow
from models.mmdit import TEXT_TOKENS
from models.presets import TEXT_MODELS

CLASSES = 1000


@dataclasses.dataclass(kw_only=True)
class TextStepFlags(BranchFlags):
    """Flags of this program."""

    model: str = flag(
        "DeepFlow-MMDiT-L/2" if ON_GPU else "DeepFlow-MMDiT-S/2",
        "a text-to-image preset",
        choices=TEXT_MODELS,
        group="model",
    )
    batch_size: int = flag(64 if ON_GPU else 8, "images of a step", range=Range(low=1), group="optimisation")


def make_steps(args, how):
    """{what: Step}."""
    options = model_config(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    one_branch = {**options, "df_idxs": ()}
    classes = {name: value for name, value in options.items() if name not in ("context_dim", "init")}
    classes["num_classes"] = CLASSES
    x0, noise, times, labels = make_batch(classes, args.batch_size)
    text = torch.randn(args.batch_size, TEXT_TOKENS, options["context_dim"], device=DEVICE)
    builders = {
        args.model: (lambda: create_model(args.model, **options), text),
        "MMDiT, one branch": (lambda: create_model(args.model, **one_branch), text),
        "DeepFlow of classes": (lambda: DeepFlow(**classes), labels),
        "SiT of classes": (lambda: DeepFlow(**{**classes, "df_idxs": ()}), labels),
    }
    return {
        what: Step(build(), our_loss, (x0, noise, times, y), args.autocast, how)
        for what, (build, y) in builders.items()
    }


def main():
    args = begin(TextStepFlags, __doc__)
    rows = []
    for how in args.hows:
        steps = make_steps(args, how)
        medians = interleaved_medians(steps, args.repeats)
        for what, seconds in medians.items():
            to_sit = seconds / medians["SiT of classes"]
            rows.append([what, how, *cells(steps[what], seconds, args.batch_size), f"{to_sit:.2f}"])
        del steps
        free()
    print_table(["model", "", "ms/step", "images/s", "GFLOP/image", "time to SiT's"], rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
