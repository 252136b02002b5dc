"""Pictures of what each setting of sampling does, on the small weights in assets/: those of docs/gallery.md.

    python -m digits.gallery --out assets/gallery
    python -m digits.gallery --out assets/gallery --flow-map quickstart/exps/digits-map

Takes half a minute on a CPU. Letters: N images, C, h, w of the latents, R resolution.
"""

import copy
import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import check_writable
from common.flags import ROOT, SAMPLER_STEPS, flag, parse_early, parse_flags, required

FEWEST = 4  # steps with which every guidance interval below has one


@dataclasses.dataclass(kw_only=True)
class GalleryFlags:
    out: str = required("folder of the pictures")
    flow_map: str | None = flag(None, "flow map of script/quickstart_dmf.sh, for one more", str, metavar="CKPT")
    max_steps: int = flag(250, "limit, for a quick look", range=dataclasses.replace(SAMPLER_STEPS, low=FEWEST))


if __name__ == "__main__":
    parse_early(GalleryFlags, __doc__)

import numpy as np
import torch

from common.pictures import save_grid
from digits.data import CLASSES
from models import load_model
from models.codec import LatentCodec
from samplers import GuidedVelocity, integrate, sample_noise, time_grid
from sampling import sample

SMALL = ROOT / "assets/digits-deepflow"
BASE = {"mode": "ode", "steps": 10}
ROWS = {  # {picture: {name of a row: keywords of `sample`, beside BASE}}; a column is a digit, with the same noise
    "steps": {f"{n} step{'s' * (n > 1)}": {"steps": n} for n in (1, 2, 4, 10, 50)},
    "samplers": {
        "ode, 10": {},
        "heun, 5": {"steps": 5, "heun": True},
        "ode, 50": {"steps": 50},
        **{f"sde, {n}": {"mode": "sde", "steps": n} for n in (10, 50, 250)},
    },
    "guidance": {str(scale): {"cfg_scale": scale} for scale in (1.0, 1.5, 2.0, 4.0, 8.0)},
    "interval": {
        "none": {},
        **{
            f"{low} to {high}": {"cfg_scale": 4.0, "guidance_low": low, "guidance_high": high}
            for low, high in ((0.0, 1.0), (0.7, 1.0), (0.3, 0.7), (0.0, 0.3))
        },
    },
    "internal": {str(scale): {"ig_scale": scale} for scale in (1.0, 1.5, 2.0, 3.0, 5.0)},
    "exits": {
        "branch 2": {},
        "1, then 2": {"exit_schedule": "0.5:1"},
        "branch 1": {"exit_branch": 1},
        "guided": {"cfg_scale": 4.0},
        "cfg exit 1": {"cfg_scale": 4.0, "cfg_exit": 1},
    },
    "gap": {str(gap): {"branch_gap": gap} for gap in (-0.5, -0.2, "dt", 0.0, 0.2, 0.5)},
    "seeds": {f"seed {seed}": {"seed": seed} for seed in range(5)},
}
MAP_ROWS = {f"{n} step{'s' * (n > 1)}": {"mode": "euler", "steps": n} for n in (1, 2, 4)}
MAP_ROWS |= {f"restart, {n}": {"mode": "restart", "steps": n} for n in (2, 4)}
PAIRS = (5, 3), (3, 8), (4, 9), (0, 6), (2, 7)
FRACTIONS = [tenths / 10 for tenths in range(11)]
TRAVELLERS = 2, 4, 6  # digits whose path is shown


def save_rows(model, rows, limit, path):
    """A picture of {name: keywords of `sample`}: a row each, a column per digit."""
    settings = ({**BASE, **row} for row in rows.values())
    images = [sample(model, range(CLASSES), **{**row, "steps": min(row["steps"], limit)}) for row in settings]
    save(np.stack(images), path, rows, range(CLASSES))


def save(images, path, rows, columns):
    """A picture of images (rows, columns, R, R, 3) with names; grey, as the digits are."""
    images = images.reshape(-1, *images.shape[2:])
    save_grid(images, len(columns), path, None, [[row] for row in rows], [str(name) for name in columns], mode="L")


def mixed(model, fraction):
    """A copy of the model whose class i lies between the digits of PAIRS[i], its embedding (1 − f)·first + f·second."""
    model, (first, second) = copy.deepcopy(model), map(list, zip(*PAIRS, strict=True))
    table = model.y_embedder.embedding_table.weight.data
    table[: len(PAIRS)] = torch.lerp(table[first], table[second], fraction)
    return model


def save_classes(model, limit, path):
    """A picture of the way from one digit to another: a row per pair, with the same noise."""
    how = {**BASE, "steps": min(BASE["steps"], limit), "cfg_scale": 2.0}
    columns = [sample(mixed(model, fraction), range(len(PAIRS)), **how) for fraction in FRACTIONS]
    save(np.stack(columns, axis=1), path, [f"{first} to {second}" for first, second in PAIRS], FRACTIONS)


def save_path(model, limit, path):
    """A picture of samples on their way from noise: x_t, and the data that the velocity predicts from there."""
    y, times, seen = torch.tensor(TRAVELLERS), time_grid(min(BASE["steps"], limit)), []
    side = model.about["options"]["input_size"]

    def step(velocity, x, t, t_next, _index):
        v = velocity(x, t)
        seen.extend([x, x - t * v])  # x_0 of the linear path
        return x + (t_next - t) * v

    velocity = GuidedVelocity(model.velocity, y, torch.full_like(y, model.num_classes))
    noise = sample_noise(0, TRAVELLERS, 0, (model.in_channels, side, side))
    last = integrate(step, velocity, noise, times)
    latents = torch.stack([*seen, last, last]).unflatten(0, (-1, 2)).permute(2, 1, 0, 3, 4, 5)  # digit, kind, time
    images = LatentCodec.load(model.about["data"]["vae"]).decode(latents.flatten(0, 2).float()).numpy()
    rows = [f"{digit}: {kind}" for digit in TRAVELLERS for kind in ("x_t", "x_0")]
    save(images.reshape(len(rows), len(times), *images.shape[1:]), path, rows, [f"t = {t:.1f}" for t in times])


def main(argv=None):
    args = parse_flags(GalleryFlags, argv, __doc__)
    out, limit = Path(args.out), args.max_steps
    check_writable(out / "path.png", "--out")
    if args.flow_map:
        save_rows(open_map(args.flow_map), MAP_ROWS, limit, out / "flow_map.png")
    model, _ = load_model(SMALL)
    for name, rows in ROWS.items():
        save_rows(model, rows, limit, out / f"{name}.png")
    save_classes(model, limit, out / "classes.png")
    save_path(model, limit, out / "path.png")
    print(f"wrote {len(ROWS) + 2 + bool(args.flow_map)} pictures to {out}\nnext: docs/gallery.md says what they show")


def open_map(path):
    """The flow map of digits in a file. Raises InputError for another model."""
    model, options = load_model(path)
    if model.kind != "flow map" or options.get("num_classes") != CLASSES:
        held = f"it is a {model.kind} model of {options.get('num_classes')} classes"
        raise InputError(f"--flow-map {path} is no flow map of digits ({held}); make one with script/quickstart_dmf.sh")
    return model


if __name__ == "__main__":
    with exit_on_input_error():
        main()
