"""Fréchet distance between Gaussians fitted to two sets of features, in float64. Letters: N samples, D dimensions."""

import numpy as np


def statistics(features):
    """Features (N, D) → mean (D,), unbiased covariance (D, D), float64. Raises ValueError for fewer than two rows."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N of at least 2, not {features.shape}")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def symmetric_root(sigma):
    """Square root of a symmetric positive semi-definite (D, D); eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ (Heusel et al. 2017, Eq. 6); means (D,), covariances (D, D).

    tr (Σ1 Σ2)^½ is the sum of the singular values of Σ1^½ Σ2^½, which stays exact where covariances are singular
    (fewer samples than dimensions) and a general matrix root does not. Raises ValueError for unequal shapes or values
    that are not finite.
    """
    mu1, mu2 = np.atleast_1d(np.asarray(mu1, np.float64)), np.atleast_1d(np.asarray(mu2, np.float64))
    sigma1, sigma2 = np.atleast_2d(np.asarray(sigma1, np.float64)), np.atleast_2d(np.asarray(sigma2, np.float64))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        shapes = f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"means (D,) and covariances (D, D) must agree, not {shapes}")
    if not all(np.isfinite(values).all() for values in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics hold values that are not finite")
    cross = np.linalg.svd(symmetric_root(sigma1) @ symmetric_root(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
