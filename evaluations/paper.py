"""Writes the tables of docs/paper.md: commands, cost and published numbers of every row of evaluations/published.py.

    python -m evaluations.paper

What stands above the line MARK in the page is written by hand and stays.
"""

import dataclasses
import textwrap

from common.errors import exit_on_input_error, say
from common.files import write_atomically
from common.flags import ROOT, parse_early, parse_flags


@dataclasses.dataclass
class PaperFlags:
    """No flags."""


if __name__ == "__main__":
    parse_early(PaperFlags, __doc__)

from evaluations.metrics.results import markdown
from evaluations.published import AT_512, FLOW_FILE, PUBLISHED, STEPS_PER_EPOCH
from models.flops import flops_per_image
from models.gpus import MFU, gpu_hours

PAGE = ROOT / "docs" / "paper.md"
MARK = "<!-- What follows is written by python -m evaluations.paper -->\n"
GPUS = ("H100", "H200")
LONG = {"max_train_steps": 2_000_000}
RECIPES = {  # what those of class-conditional flow models train with
    "bash script/base/train.sh": {"model": "DeepFlow-B/2"},
    "bash script/large/train.sh": {"model": "DeepFlow-L/2"},
    "bash script/xlarge/train.sh": {"model": "DeepFlow-XL/2", **LONG},
    "bash script/xlarge/train_512.sh": {"model": "DeepFlow-XL/2", **LONG, **AT_512},
    **{f"SIZE={s} bash script/sit/train.sh": {"model": f"SiT-{s}/2"} for s in ("B", "L", "XL")},
}
FOLDERS = {"B": "base", "L": "large", "XL": "xlarge"}
LAST_STEP = {"xlarge/eval": 2_000_000, "guided": 2_000_000}  # that a recipe measures; others: 400,000
METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "fd_dinov2": "FDD", "clip_score_raw": "CLIP"}
METRICS |= {"geneval_overall": "GenEval", "feature_distance": "distance"}
ABOUT = {  # what stands above a table
    "2": "256², 80 epochs, SDE with 250 steps, no guidance. Lower FID is better.",
    "3": "256², SDE with 250 steps, no guidance; the row of 100 epochs is from the text.",
    "4": "256² with classifier-free guidance. Sampler, guidance scale and interval are not stated. SiT's "
    "numbers are those of the SiT and REPA papers, which train with uniform t. To match them, add "
    "`--weighting uniform` to the training command; the run's name, `EXP_NAME`, then contains `uniform`.",
    "5": "512² with classifier-free guidance. What Table 4 leaves open is open here too; its note on SiT applies.",
    "6": "Text-to-image on MS-COCO 256². FDD is FD-DINOv2, CLIP the mean cosine of a CLIP that the paper does not "
    "name, GenEval the mean over its six tags. Sampler and guidance are not stated.",
    "7a": "Parts of the method: B, uniform t, 80 epochs, SDE with 250 steps; as read above.",
    "7b": "α, the upper bound of the time gap; otherwise as Table 7a.",
    "7c": "λ, the weight of the acceleration loss, and a shallow ACC_MLP of widths {2048, 768}; otherwise as Table 7a.",
    "8": "Sizes: lognormal t, 80 epochs, SDE with 250 steps. Parameters (in millions) and GFLOPS are the "
    "paper's; its GFLOPS are multiply-adds of a forward pass. It gives SiT-XL/2 an FID of 13.7 here and of 13.8 in "
    "Table 3.",
    "2d": "Euclidean distance between the features of the middle and of the last branch; how it is reduced over tokens "
    "and images is not stated. The models are taken to be those of Table 7a.",
    "DMF": "FID of flow maps by EDM2's calculate_metrics against the statistics of the full training set "
    "(`REF=imgnet256.pkl`, `imgnet512.pkl`); guidance is trained in. The first row of each resolution is the flow "
    f"model that the map starts from, as `{FLOW_FILE}`. No numbers are published for B.",
}


def of_map(row):
    """The part of a recipe's name that names a flow map: `xl_512`."""
    return row.config.exp_name.removeprefix("dmft-").replace("-", "_")


def training_command(row):
    """The recipe that needs the fewest further flags, and those."""
    if row.kind == "flow map":
        return f"CKPT={FLOW_FILE} bash script/dmf/train_{of_map(row)}.sh"
    if row.kind == "text":
        model = "" if row.options["df_idxs"] else f"MODEL={row.config.model} "
        return ("SSL=1 " if row.config.ssl_align else "") + model + "bash script/t2i/train.sh"
    if row.table == "DMF":
        return f"RESOLUTION={row.config.resolution} bash script/dmf/train_flow.sh"
    fitting = {name: flags for name, flags in RECIPES.items() if flags["model"] == row.config.model}
    commands = [[name, *row.words(flags)] for name, flags in fitting.items() if flags.keys() <= row.flags.keys()]
    return " ".join(min(commands, key=len))


def measuring_command(row):
    """The recipe that samples and measures; for Figure 2(d) the program that does."""
    run, size = row.config.exp_name, row.config.model.rpartition("-")[2].partition("/")[0]
    if row.table == "2d":
        block = "" if row.options["df_idxs"] else " --block 6"
        return f"python -m evaluations.feature_distance --ckpt exps/{run}/checkpoints/{row.steps:07d}.pt{block}"
    if row.kind == "text":
        return f"EXP_NAME={run} bash script/t2i/eval.sh"
    if row.kind == "flow map":
        return f"STEPS={row.sampler['num_steps']} bash script/dmf/eval_{of_map(row)}.sh"
    recipe = "guided" if row.guided else f"{FOLDERS[size]}/eval"
    step = "" if row.steps == LAST_STEP.get(recipe, 400_000) else f"LAST_STEP={row.steps:07d} "
    return f"EXP_NAME={run} {step}bash script/{recipe}.sh"


def cells(row, metrics):
    """The row in the page; metrics: {name: digits after the point}."""
    flops = flops_per_image(row.config, row.options)
    images = row.steps * row.config.batch_size
    hours = dict.fromkeys(f"{gpu_hours(flops, images, gpu, MFU):,.0f}" for gpu in GPUS)
    epochs = "" if row.kind == "text" else f" ({row.steps / STEPS_PER_EPOCH:.0f})"
    size = [" / ".join(map(str, row.size))] if row.size else []
    numbers = [f"{row.numbers[name]:.{n}f}" if name in row.numbers else "–" for name, n in metrics.items()]
    cost = [f"{row.steps:,}{epochs}", f"{flops / 1e9:,.0f}", ", ".join(hours)]
    commands = [f"`{command(row)}`" for command in (training_command, measuring_command)]
    return [row.name, commands[0], *cost, *size, " / ".join(numbers), "", commands[1]]


def render(page):
    """The page with the tables written anew."""
    lines = [page.partition(MARK)[0] + MARK]
    for table, about in ABOUT.items():
        rows = [row for row in PUBLISHED if row.table == table]
        metrics = {}  # {name: digits after the point}; a float has lost its last zeros
        for name in METRICS:
            if digits := [len(str(row.numbers[name]).partition(".")[2]) for row in rows if name in row.numbers]:
                metrics[name] = max(digits)
        size = ["parameters / GFLOPS"] if rows[0].size else []
        header = ["model", "training", "steps (epochs)", "GFLOP per image", "GPU-hours", *size]
        header += [" / ".join(METRICS[name] for name in metrics), "here", "measuring"]
        table = markdown(header, [cells(row, metrics) for row in rows])
        lines += [f"## {rows[0].title}", "", *textwrap.wrap(about, 128), "", table, ""]
    return "\n".join(lines)


def main(argv=None):
    parse_flags(PaperFlags, argv, __doc__)
    page = render(PAGE.read_text())
    write_atomically(PAGE, lambda file: file.write(page.encode()))
    say(f"wrote {PAGE}\nnext: git diff {PAGE}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
