"""Kernel distance between two sets of features; with InceptionV3's, it is KID (Bińkowski et al. 2018).

Letters: N and M rows, D dimensions.
"""

from statistics import fmean, stdev

import numpy as np
import torch

SIZE = 1000  # rows of a block, as published, and of the tile of a kernel matrix held in memory at once
BLOCKS = 10  # at least, smaller if there are few rows: the standard error is over blocks
FEWEST = 4  # rows: two blocks of two


def kernel_sum(x, y):
    """Sum of k(u, v) = (u·v/D + 1)³ in float64 over all rows u of x (N, D) and v of y (M, D)."""
    pairs = ((u.double(), v.double()) for u in x.split(SIZE) for v in y.split(SIZE))
    return sum((u @ v.T / u.shape[1] + 1).pow(3).sum() for u, v in pairs).item()


def squared_mmd(x, y):
    """Unbiased MMD² of rows (N, D) and (M, D) over all pairs (Gretton et al. 2012, Eq. 3); it can be negative."""

    def within(rows):
        itself = (rows.double().square().mean(dim=1) + 1).pow(3).sum().item()
        return (kernel_sum(rows, rows) - itself) / (len(rows) * (len(rows) - 1))

    return within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def kernel_distance(reference, sample, seed=0):
    """(mean, standard error) of the unbiased MMD² over disjoint random blocks of features (N, D) and (M, D).

    There is one block for every SIZE rows of the smaller set, but at least BLOCKS if it has two rows for each. Both
    sets are split into that many. Torch or numpy. Raises ValueError for fewer than FEWEST rows.
    """
    fewest = min(len(reference), len(sample))
    if fewest < FEWEST:
        raise ValueError(f"a kernel distance needs at least {FEWEST} samples a side, not {fewest}")
    draw, count = np.random.RandomState(seed), max(fewest // SIZE, min(BLOCKS, fewest // 2))

    def blocks(rows):
        rows = torch.as_tensor(rows)
        return (rows[part] for part in np.array_split(draw.permutation(len(rows)), count))

    found = [squared_mmd(x, y) for x, y in zip(blocks(reference), blocks(sample), strict=True)]
    return fmean(found), stdev(found) / count**0.5
