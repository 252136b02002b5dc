"""What the blocks of a network encode: linear probes of the labels, similarity to encoder features, token pictures.

    python -m evaluations.probe --ckpt CKPT --data-dir DATA --out results/probe
    python -m evaluations.probe --ckpt CKPT --data-dir DATA --holdout OTHER --out results/probe --blocks 4 8 --times 0.5

The network sees x_t, made from the mean of an image's moments and noise for that image. It gets the null class, because
the label would leak into the tokens. Measured on held-out images, for each block and time, on the mean of its tokens:

- accuracy: of a linear classifier of the labels, fitted to the other images
- CKNNA: with the mean over an encoder's tokens, for every set DATA/features-NAME
- cosine: of those features and a linear map's prediction of them, fitted to the other images; both centred

Letters: N images, B batch, C latent channels, h = w latent size, T = g² tokens, D hidden size, Z width of an encoder.
"""

import collections
import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

from common.errors import InputError, exit_on_input_error
from common.files import check_writable, write_atomically
from common.flags import BATCH, BLOCKS, IMAGES, SEED, Range, flag, parse_early, parse_flags, required
from models.flags import PublishedFlags


@dataclasses.dataclass(kw_only=True)
class ProbeFlags(PublishedFlags):
    ckpt: str = required("checkpoint of ours or a published file, not text-to-image", group="model")
    weights: str = flag("ema", "EMA or raw weights", group="model", choices=["ema", "raw"])
    blocks: list | None = flag(None, "blocks, from 1; default: all", int, range=BLOCKS, nargs="+")
    times: list = flag((0.0, 0.25, 0.5, 0.75), "t = 0 is data, 1 noise", float, range=Range(0, 1), nargs="+")
    seed: int = flag(0, "seed of the noise", range=SEED)
    batch_size: int = flag(64, "images per batch", range=BATCH, name="--per-proc-batch-size", also=("--batch-size",))
    data_dir: str = required("latents with labels", group="data")
    data_vae: str | None = flag(None, "VAE that made latents without a manifest", str, group="data")
    holdout: str = flag("0.2", "images to measure on: a share of --data-dir, or another data folder", group="data")
    holdout_count: ClassVar = None  # --max-images takes its place
    max_images: int = flag(10_000, "most images of either part, evenly spaced", range=IMAGES, group="data")
    features: list | None = flag(None, "encoders; default: all that have a set", str, group="data", nargs="*")
    pictures: int = flag(10, "images in the pictures of tokens", range=IMAGES, group="output")
    out: str = required("folder for table.md, probe.json, plots, and pictures of tokens", group="output")


if __name__ == "__main__":
    parse_early(ProbeFlags, __doc__)

import numpy as np
import torch
import torch.nn.functional as F

from common.pictures import classes_of_rows, enlarged, save_grid, save_lines
from common.precision import set_math
from common.processes import device_of_process
from common.progress import Progress
from dataset import open_dataset
from evaluations.metrics.alignment import NEIGHBOURS, cknna
from evaluations.metrics.results import Result, markdown
from latents.manifest import CHECK
from latents.sets import find_features, is_set
from samplers import sample_noise
from sampling.flags import SamplingFlags
from sampling.sampler import open_checkpoint
from training.holdout import hold_out

RIDGES = 10.0 ** np.arange(-4, 6)  # candidate penalties of linear maps, for features of variance 1


def encoders(args):
    """Names of the encoders to compare with. Raises InputError for one whose set is missing."""
    data, names = Path(args.data_dir), args.features
    if names is None:
        folders = sorted((data.parent if is_set(data) else data).glob("features-*"))
        names = [folder.name.removeprefix("features-") for folder in folders if not folder.match("*-mirror")]
    if missing := [name for name in names if find_features(data, name) is None]:
        fault = f"--features {missing[0]}: {data} has no folder features-{missing[0]}"
        raise InputError(f"{fault}; write it with preprocessing.dataset_tools features")
    return names


def spaced(data, count):
    """At most `count` images of a dataset, evenly spaced: all classes, if images are sorted by class."""
    return data.only(np.arange(count := min(count, len(data))) * len(data) // count)


def open_parts(args):
    """LatentDatasets: the images to fit to, and those held out. Raises InputError for data that cannot be measured."""
    names = encoders(args)
    open_folder = functools.partial(open_dataset, features=names, data_vae=args.data_vae)
    fit, held = (spaced(part, args.max_images) for part in hold_out(args, open_folder(args.data_dir), open_folder))
    if len({*fit.labels[fit.rows].tolist()}) < 2:
        fault = f"--data-dir {args.data_dir}: the images to fit to are all of one class, but a classifier needs two"
        raise InputError(f"{fault}; name other data, or raise --max-images")
    if names and len(held) <= NEIGHBOURS:
        fault = f"--holdout {args.holdout}: CKNNA needs more than {NEIGHBOURS} images, not {len(held)}"
        raise InputError(f"{fault}; hold out more, or pass --features without names")
    return fit, held


def batches(data, size):
    """Row numbers of a dataset's batches."""
    return np.split(np.arange(len(data)), range(size, len(data), size))


def targets(data, size):
    """(labels, int64 (N,); {encoder: mean over its tokens, float64 (N, Z)}) of a dataset. Raises InputError."""
    rows = batches(data, size) if data.features else []
    means = [[part.double().mean(dim=1) for part in data.gather(indices)[3:]] for indices in rows]
    features = dict(zip(data.features, map(torch.cat, zip(*means, strict=True)), strict=True))
    if odd := [name for name, rows in features.items() if not rows.isfinite().all()]:
        raise InputError(f"--features {odd[0]}: the set holds values that are not finite; write it again")
    return data.labels[data.rows], features


class Probe:
    """A network that records the tokens of its `blocks`, numbered from 1. Raises InputError for unsuitable flags."""

    def __init__(self, args):
        self.args, self.device, self.tokens = args, device_of_process(), {}
        given = {"ckpt": args.ckpt, "weights": args.weights, "decode": False, **args.published()}
        self.checkpoint, self.path, self.spec = open_checkpoint(SamplingFlags(**given))
        self.model, depth = self.checkpoint.model.to(self.device), self.checkpoint.options["depth"]
        if self.model.kind == "text":
            raise InputError(f"--ckpt {args.ckpt} is a text-to-image model; name one with class labels")
        self.blocks = sorted({*(args.blocks or range(1, depth + 1))})
        if self.blocks[-1] > depth:
            raise InputError(f"--blocks {self.blocks[-1]} is out of range; {args.ckpt} has blocks 1 to {depth}")
        for number in self.blocks:
            self.model.blocks[number - 1].register_forward_hook(functools.partial(self.keep, number))

    def keep(self, number, _block, _inputs, output):
        self.tokens[number], _text = output

    def check_data(self, info):
        """Raise InputError unless the network fits the latents of a DataInfo. Classes may differ."""
        wanted = 2 * self.model.in_channels, *[self.checkpoint.options["input_size"]] * 2
        if info.moments_shape != wanted:
            fault = f"--data-dir {self.args.data_dir} has moments {info.moments_shape}, {self.args.ckpt} needs {wanted}"
            raise InputError(f"{fault}; encode images of the right size, with its VAE")
        self.spec.check_same(info.spec, self.args.ckpt, "--data-dir")

    @torch.no_grad()
    def run(self, data, t, draw):
        """Yield x_t (B, C, h, w) and {block: tokens (B, T, D)} for each batch of data; draw: as in `sample_noise`."""
        time = torch.tensor([t], dtype=torch.float32)
        for rows in batches(data, self.args.batch_size):
            x0 = self.spec.sample(data.gather(rows)[0].float(), 0)
            noise = sample_noise(self.args.seed, data.rows[rows], draw, x0.shape[1:])
            x = self.path.interpolate(x0, noise, time).to(self.device)
            self.model.velocity(x, t, torch.full((len(x),), self.model.num_classes, device=self.device))
            if odd := [number for number, tokens in self.tokens.items() if not tokens.isfinite().all()]:
                fault = f"{self.args.ckpt} gives tokens that are not finite (block {odd[0]})"
                raise InputError(f"{fault}; the weights are damaged or diverged, or the latents: {CHECK}")
            yield x, self.tokens

    def pooled(self, data, t, draw):
        """{block: mean over tokens, float32 (N, D)}; arguments as in `run`."""
        parts = [{n: tokens.mean(dim=1).cpu() for n, tokens in found.items()} for _, found in self.run(data, t, draw)]
        return {number: torch.cat([part[number] for part in parts]) for number in self.blocks}

    def save_pictures(self, data, t, draw, names, path):
        """Write a PNG with a row per image, named by its class, and columns for x_t and the tokens of each block."""
        seen, tokens = zip(*((x, dict(found)) for x, found in self.run(data, t, draw)), strict=True)
        side = (x := torch.cat(seen)).shape[-1]
        columns = [colours(x.flatten(2).mT)]
        columns += [colours(torch.cat([found[number] for found in tokens])) for number in self.blocks]
        images = np.stack([enlarged(column, side) for column in columns], axis=1)  # (N, columns, h, w, 3)
        rows = classes_of_rows(data.labels[data.rows].tolist(), 1, names)
        titles = [f"t = {t:g}", *(f"block {number}" for number in self.blocks)]
        save_grid(images.reshape(-1, *images.shape[2:]), len(columns), path, row_names=rows, column_names=titles)


def colours(tokens):
    """tokens (N, T, D) → uint8 (N, g, g, 3): first three principal components of all N·T tokens as red, green and blue.

    The lowest and highest 1% of each component are clipped. Signs are chosen so that the largest deviation is bright.
    """
    n, t, _ = tokens.shape
    rows = tokens.flatten(0, 1).double().cpu()
    rows = rows - rows.mean(dim=0)
    parts = rows @ F.pad(torch.linalg.svd(rows, full_matrices=False).Vh, (0, 0, 0, 3))[:3].T  # (N·T, 3)
    parts = parts * parts.gather(0, parts.abs().argmax(dim=0, keepdim=True)).sign()
    low, high = parts.quantile(torch.tensor([0.01, 0.99], dtype=parts.dtype), dim=0)
    shades = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    side = round(t**0.5)
    return (255 * shades).round().to(torch.uint8).view(n, side, side, 3).numpy()


def compare(fit, held, of_fit, of_held):
    """{measure: number} from features (N, D) of the images to fit to and of held-out ones; of_…: their `targets`.

    Linear maps are ridge regressions on standardised features, with the penalty chosen by leave-one-out.
    """
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(fit).transform
    x, x_held, (labels, features) = scale(fit), scale(held), of_fit
    found = {"accuracy": RidgeClassifierCV(RIDGES).fit(x, labels).score(x_held, of_held[0])}
    for name, wanted in of_held[1].items():
        found[f"CKNNA {name}"] = cknna(held, wanted)
        mean = features[name].mean(dim=0)
        predicted = torch.from_numpy(RidgeCV(RIDGES).fit(x, features[name] - mean).predict(x_held))
        found[f"cosine {name}"] = F.cosine_similarity(predicted, wanted - mean).mean().item()
    return found


def write(curves, probe, args, counts):
    """Write and print the results. curves: {(measure, t): [(block, number)]}; counts: a line for below the table."""
    lines = {f"{measure}, t {t:g}": points for (measure, t), points in curves.items()}
    cells = [[number, *(f"{dict(points)[number]:.3f}" for points in lines.values())] for number in probe.blocks]
    table = f"{markdown(['block', *lines], cells)}\n\n{counts}"
    write_atomically(Path(args.out, "table.md"), lambda file: file.write(f"{table}\n".encode()))
    for measure in dict.fromkeys(measure for measure, _ in curves):
        of_times = {f"t = {t:g}": points for (name, t), points in curves.items() if name == measure}
        path = Path(args.out, f"{measure.replace(' ', '-')}.png")
        save_lines(of_times, path, marker="o", xlabel="block", ylabel=measure, xticks=probe.blocks)
    metrics = {f"{line}, block {number}": value for line, points in lines.items() for number, value in points}
    about = {"model": probe.checkpoint.run.get("model"), "step": probe.checkpoint.steps, **dataclasses.asdict(args)}
    Result(metrics, str(args.ckpt), curves=lines, settings=about).write(Path(args.out, "probe.json"))
    print(f"{table}\nin {args.out}: table.md, probe.json, plots, and tokens-*.png")


def main(argv=None):
    args = parse_flags(ProbeFlags, argv, __doc__)
    check_writable(Path(args.out, "table.md"), "--out:")
    set_math(allow_tf32=True)
    probe, parts = Probe(args), open_parts(args)
    probe.check_data(parts[0].info)
    known, curves = [targets(part, args.batch_size) for part in parts], collections.defaultdict(list)
    for part in parts:
        part.features = {}  # not needed again: gather would read them with every batch
    for t in Progress(list(dict.fromkeys(args.times)), unit="time"):
        fit, held = (probe.pooled(part, t, draw) for draw, part in enumerate(parts))
        for number in probe.blocks:
            for measure, value in compare(fit[number], held[number], *known).items():
                curves[measure, t].append((number, value))
        shown = spaced(parts[1], args.pictures)
        probe.save_pictures(shown, t, 1, parts[0].info.class_names, Path(args.out, f"tokens-t{t:g}.png"))
    counts = f"{len(parts[1])} held-out images, {len(parts[0])} to fit to; null class as condition"
    write(curves, probe, args, counts)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
