"""Pictures of a run: samples by class, and loss curves from its JSONL log."""

import json
from pathlib import Path

import numpy as np

from models.errors import InputError
from training.checkpoint import write_atomically
from training.grids import save_grid


def class_grid(images, labels, classes=10, columns=10):
    """uint8 (N, R, R, 3), labels (N,) → (classes·columns, R, R, 3): the first of each class, white where too few."""
    chosen = np.full((classes, columns, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        rows = images[labels == label][:columns]
        chosen[label, : len(rows)] = rows
    return chosen.reshape(-1, *images.shape[1:])


def enlarge_and_frame(images, factor=2, frame=2):
    """uint8 (N, R, R, 3) → (N, R', R', 3), R' = factor·R + 2·frame: every pixel repeated, a white frame around."""
    larger = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.pad(larger, ((0, 0), (frame, frame), (frame, frame), (0, 0)), constant_values=255)


def save_class_grid(images, labels, path, classes=10, columns=10):
    """Write a PNG whose rows are classes."""
    save_grid(enlarge_and_frame(class_grid(images, labels, classes, columns)), columns, path)


def read_curves(log):
    """JSONL log → {name: (steps, values)} for every key that begins with `loss`. Raises InputError naming the file."""
    try:
        lines = Path(log).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{log}: cannot read this log; pass the log.jsonl of a run") from None
    curves = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            for name in (key for key in record if key.startswith("loss")):
                steps, values = curves.setdefault(name, ([], []))
                values.append(float(record[name]))
                steps.append(int(record["step"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{log}: line {number} is not a JSON object with 'step' and losses") from None
    if not curves:
        raise InputError(f"{log}: no line has a key that begins with 'loss'; pass the log.jsonl of a run")
    return curves


def save_loss_curve(log, path):
    """Write a PNG of every loss in a JSONL log over the steps."""
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    curves = read_curves(log)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, linewidth=1.8 if name == "loss" else 1.0)
    axes.set(xlabel="step", ylabel="loss (mean over the logged interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
