"""Train the judge of CIFAR-10-like samples (studies/judge.py) and measure held-out images with it.

    python -m studies.train_judge --data data/cifar10-source

made assets/cifar10-judge, whose trained_on.json has the flags. DATA, a folder or a zip, holds train/CLASS/IMAGE and
test/CLASS/IMAGE of 32×32 pixels. The seed decides everything, up to rounding. Letters: N images, R image size.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import whole_folder, write_json
from common.flags import BATCH, SEED, Range, flag, parse_early, parse_flags, required


@dataclasses.dataclass(kw_only=True)
class JudgeFlags:
    data: str = required("CIFAR-10: a folder or zip with train/CLASS and test/CLASS", group="data", metavar="DIR|ZIP")
    dest: str = flag("assets/cifar10-judge", "folder to make; must not exist", group="output")
    epochs: int = flag(5, "times that each training image is seen", range=Range(1, 1000), group="optimisation")
    batch_size: int = flag(128, "images per step", range=BATCH, group="optimisation")
    learning_rate: float = flag(0.1, "highest, of SGD; 0.3 times it for Muon", group="optimisation")
    seed: int = flag(0, "seed of initial weights and batches", range=SEED, group="optimisation")


if __name__ == "__main__":
    parse_early(JudgeFlags, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.progress import Progress
from common.versions import versions
from digits.train_vae import Muon, shifted
from evaluations.metrics.frechet import statistics
from evaluations.metrics.images import read_split
from studies import judge as judges

KEPT = 5000  # training images whose features are kept, for the kernel distance


def set_patches(judge, images):
    """Set the first convolution to the principal components of patches (N, 3, R, R), whitened, and their negatives."""
    patches = F.unfold(images / 127.5 - 1, 2).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = (vectors / (values + 1e-4).sqrt()).T.reshape(-1, 3, 2, 2)
    judge.patches.weight.copy_(torch.cat([filters, -filters]))


def train(judge, images, labels, args):
    """Muon for the convolutions and SGD, at rates that rise and fall linearly, on mirrored and shifted images."""
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * (len(images) // args.batch_size)
    trained = [parameter for parameter in judge.parameters() if parameter.requires_grad]
    rest = [value for value in trained if value.ndim < 4]
    sgd = torch.optim.SGD(rest, args.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    muon = Muon([value for value in trained if value.ndim == 4], 0.3 * args.learning_rate)
    cycle = {"total_steps": steps, "pct_start": 0.2, "anneal_strategy": "linear", "cycle_momentum": False}
    schedules = [torch.optim.lr_scheduler.OneCycleLR(part, part.defaults["lr"], **cycle) for part in (sgd, muon)]
    epochs = (torch.randperm(len(images), generator=generator).split(args.batch_size) for _ in range(args.epochs))
    batches = (rows for epoch in epochs for rows in epoch if len(rows) == args.batch_size)
    for rows in (progress := Progress(batches, total=steps, desc="train")):
        batch = images[rows].float()
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        batch = shifted(torch.where(mirrored, batch.flip(-1), batch), generator)
        loss = F.cross_entropy(judge.head(judge(batch)), labels[rows], label_smoothing=0.1)
        judge.zero_grad()
        loss.backward()
        for part in (sgd, muon, *schedules):
            part.step()
        progress.set_postfix(loss=loss.item(), refresh=False)


@torch.no_grad()
def normalise(judge, images):
    """Scale the features so that their mean square over images (N, 3, R, R) is 1, and the head to the same classes.

    The polynomial kernel would be nothing but large numbers otherwise.
    """
    *_, last, _relu, _pool, _flat = judge.body
    scale = judge.judge(images.permute(0, 2, 3, 1))[0].square().mean().sqrt()
    last.weight.div_(scale), last.bias.div_(scale), judge.head.weight.mul_(scale)


def weights_and_reference(judge, images):
    """Tensors of the judge in half precision, and the statistics of training images, uint8 (N, 32, 32, 3)."""
    features, _ = judge.judge(images)
    mean, covariance = (torch.from_numpy(values).float() for values in statistics(features))
    rows = features[np.linspace(0, len(features), min(KEPT, len(features)), endpoint=False).astype(int)]
    halves = {name: value.half() for name, value in {**judge.state_dict(), "rows": rows}.items()}
    return {**{name: value.contiguous() for name, value in halves.items()}, "mean": mean, "covariance": covariance}


def main(argv=None):
    args = parse_flags(JudgeFlags, argv, __doc__)
    if Path(args.dest).exists():
        raise InputError(f"--dest {args.dest} exists; remove it or name a new folder")
    (images, labels, names), held_out = (read_split(args.data, split, judges.RESOLUTION) for split in ("train", "test"))
    if not names or names != held_out[2] or len(names) != judges.CLASSES:
        raise InputError(f"--data {args.data}: train and test need the same {judges.CLASSES} class folders")
    if args.batch_size > len(images):
        raise InputError(f"--batch-size {args.batch_size}: --data {args.data} has only {len(images)} training images")
    torch.manual_seed(args.seed)
    judge = judges.Judge()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    set_patches(judge, few := pixels[:: max(1, len(pixels) // 2000)])
    train(judge, pixels, torch.from_numpy(labels), args)
    judge.eval().half().float()  # what is measured belongs to the weights as they are stored
    normalise(judge, few)
    judge.half().float()
    with whole_folder(args.dest, "--dest") as partial:
        save_file(weights_and_reference(judge, images), partial / judges.WEIGHTS)
        flags = {**vars(args), "data": Path(args.data).name, "dest": Path(args.dest).name}
        about = {"classes": names, "trained on": len(images), "flags": flags}
        found = judges.measure(*judges.load_judge(partial), *held_out[:2])
        about |= {"held-out images": len(held_out[1]), "of held-out images": found, "versions": versions("torch")}
        write_json(partial / "trained_on.json", about)
    print(
        f"held-out images: {found}\nwrote {args.dest}\nnext: python -m studies.report --judge {args.dest} --samples NPZ"
    )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
