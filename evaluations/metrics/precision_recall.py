"""Improved precision and recall (Kynkäänniemi et al. 2019) as ADM's evaluator computes them: squared, in blocks.

Letters: N rows, D dimensions, k neighbours. A set's manifold is the union of balls round its points, each as large as
the distance to the point's k-th neighbour.
"""

import torch

from common.errors import note

PRECISIONS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
BLOCK = 10_000  # rows and columns of a block: published, and it decides which distances fall back to float32
HALF_MAX = torch.finfo(torch.float16).max


def distances(u, v, dtype):
    """max(|u|² − 2u·v + |v|², 0), additions in that order: u (N, D), v (M, D) → (N, M) in dtype.

    float16: squares, sums, products and additions are rounded to half; row sums and products accumulate in float32.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    u, v = u.to(dtype), v.to(dtype)
    norm_u, norm_v = (rows.square().sum(dim=1, dtype=wide).to(dtype) for rows in (u, v))
    product = (u.to(wide) @ v.to(wide).T).to(dtype)
    return product.mul_(-2).add_(norm_u[:, None]).add_(norm_v).clamp_(min=0)


def distance_block(u, v, dtype):
    """distances, in float32 or better: a float16 block of which an entry is not finite is computed anew in float32."""
    block = distances(u, v, dtype)
    if dtype != torch.float16:
        return block
    return block.float() if block.amax().isfinite() else distances(u, v, torch.float32)


def radii(features, k=3, dtype=torch.float16, block=BLOCK):
    """Squared distance of each row of (N, D), N > k, to its k-th neighbour, (N,); the row itself is neighbour 0."""
    found = []
    for rows in features.split(block):
        nearest = []  # k + 1 of each block
        for columns in features.split(block):
            part = distance_block(rows, columns, dtype)
            nearest.append(part.topk(min(k + 1, len(columns)), dim=1, largest=False).values)
        found.append(torch.cat(nearest, dim=1).topk(k + 1, dim=1, largest=False).values.amax(dim=1))
    return torch.cat(found)


def memberships(reference, sample, k=3, dtype=torch.float16, block=BLOCK):
    """(sample rows inside the reference's manifold, reference rows inside the sample's), boolean (M,) and (N,)."""
    radii_r, radii_s = radii(reference, k, dtype, block), radii(sample, k, dtype, block)
    sample_inside = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=sample.device)
    for i in range(0, len(reference), block):
        for j in range(0, len(sample), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            part = distance_block(reference[rows], sample[columns], dtype)
            sample_inside[columns] |= (part <= radii_r[rows, None]).any(dim=0)
            reference_inside[rows] |= (part <= radii_s[columns]).any(dim=1)
    return sample_inside, reference_inside


def precision_recall(reference, sample, k=3, precision="float16", block=BLOCK):
    """(precision, recall) of features (N, D) and (M, D) on one device.

    precision: arithmetic of the distances; published numbers are float16. Features are finite, their widths the same.
    """
    largest = max(rows.double().square().sum(dim=1).amax() for rows in (reference, sample))
    if precision == "float16" and HALF_MAX / 2 < largest <= HALF_MAX:
        note("features are so large that float16 distances overflow unnoticed, as in ADM's evaluator; take float32")
    inside = memberships(reference, sample, k, PRECISIONS[precision], block)
    return tuple(rows.double().mean().item() for rows in inside)
