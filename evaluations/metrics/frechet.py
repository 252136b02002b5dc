"""Fréchet distance between Gaussians fitted to two sets of features, in float64. Letters: N samples, D dimensions."""

import numpy as np
import torch
import torch.distributed as dist


class RunningStatistics:
    """Mean and unbiased covariance of rows that come in batches, float64.

    Sums are kept about the running mean (Chan et al. 1983), so that no digits are lost where the mean is large, and
    neither the batch size nor the number of processes shows beyond rounding.
    """

    def __init__(self, dimensions, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, rows):
        """Take in rows (N, D) of any float or integer type; N may be 0."""
        if len(rows) == 0:
            return
        rows = rows.to(self.mean)
        total = self.count + len(rows)
        mean = rows.mean(dim=0)
        delta = mean - self.mean
        between = delta * (self.count * len(rows) / total) ** 0.5
        centred = torch.cat([rows - mean, between[None]])
        self.scatter.addmm_(centred.T, centred)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def merge_processes(self):
        """Combine what the processes of torch.distributed have; afterwards every one of them holds the whole."""
        total = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        mean = self.mean * self.count
        dist.all_reduce(total)
        dist.all_reduce(mean)
        mean /= total
        delta = self.mean - mean
        self.scatter.addr_(delta, delta, alpha=float(self.count))
        dist.all_reduce(self.scatter)
        self.mean, self.count = mean, int(total)

    def finish(self):
        """Mean (D,) and unbiased covariance (D, D) as float64 arrays. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"statistics need at least 2 samples, not {self.count}")
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


def statistics(features):
    """Features (N, D) → mean (D,), unbiased covariance (D, D), float64. Raises ValueError for fewer than two rows."""
    running = RunningStatistics(features.shape[1])
    running.add(torch.as_tensor(features))
    return running.finish()


def trace_of_root(sigma1, sigma2):
    """tr (Σ1 Σ2)^½ as the sum of the singular values of Σ1^½ Σ2^½; eigenvalues below 0, from rounding, count as 0.

    It stays exact where covariances are singular (fewer samples than dimensions) and a general matrix root does not.
    """
    spectra = np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)
    root1, root2 = ((vectors * np.sqrt(values.clip(min=0))) @ vectors.T for values, vectors in spectra)
    return np.linalg.svd(root1 @ root2, compute_uv=False).sum()


def trace_of_root_published(sigma1, sigma2, eps=1e-6):
    """tr (Σ1 Σ2)^½ by scipy's sqrtm, as in ADM's evaluator; eps on the diagonals if it fails. Raises ValueError."""
    import scipy.linalg  # half a second to import, and only --sqrtm needs it

    product = sigma1 @ sigma2
    if not product.any():
        return 0.0  # scipy's root of zero is infinite from 1.18 on
    root = scipy.linalg.sqrtm(product)
    if not np.isfinite(root).all():
        offset = eps * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    if np.iscomplexobj(root) and not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
        raise ValueError(f"Imaginary component {np.abs(root.imag).max()}")
    return np.trace(root.real)


def frechet_distance(mu1, sigma1, mu2, sigma2, sqrtm=False):
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ (Heusel et al. 2017, Eq. 6); means (D,), covariances (D, D).

    sqrtm: compute the last term as published. Raises ValueError for unequal D.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(values, np.float64) for values in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"means have shapes {mu1.shape} and {mu2.shape}")
    cross = (trace_of_root_published if sqrtm else trace_of_root)(sigma1, sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
