"""Pictures of digits, a class a row. Letters: N images, R resolution."""

import numpy as np


def class_grid(images, labels, classes, columns):
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
