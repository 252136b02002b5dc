"""Similarity of two representations of the same images.

Letters: N images, D and Z dimensions of their features, k neighbours.
"""

import torch
import torch.nn.functional as F

NEIGHBOURS = 10  # k, as in REPA


def nearest(features, k):
    """The k nearest other rows of each row by cosine: (indices (N, k), cosines less the row's mean cosine (N, k))."""
    unit = F.normalize(features.double(), dim=1)
    cosines = unit @ unit.T
    means = cosines.mean(dim=1, keepdim=True)
    values, numbers = cosines.fill_diagonal_(-torch.inf).topk(k, dim=1)
    return numbers, values - means


def cknna(x, y, k=NEIGHBOURS):
    """Centred kernel nearest-neighbour alignment of x (N, D) and y (N, Z), N > k; about k/N if they are independent.

    Kernel alignment over pairs that are k nearest neighbours in both (Huh et al. 2024, appendix A; used by REPA, Yu et
    al. 2025): A(x, y) / √(A(x, x)·A(y, y)), where A sums the product of the row-centred kernels over these pairs. Rows
    are scaled to length 1 first, as in Huh et al. It is about 0 if all rows of x or of y are equal.
    """
    (i, of_x), (j, of_y) = nearest(x, k), nearest(y, k)
    both = i[:, :, None] == j[:, None, :]  # (N, k, k)
    shared = (of_x[:, :, None] * of_y[:, None, :])[both].sum()
    return (shared / (of_x.square().sum() * of_y.square().sum()).sqrt()).nan_to_num(0).item()
