"""Kernel distance (KID): torch-fidelity's and scikit-learn's values, known answers, its blocks and its error."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from torch_fidelity.metric_kid import kernel_mmd

from evaluations.metrics import kernel
from evaluations.metrics.kernel import kernel_distance, kernel_sum, squared_mmd


def rows(count, width, seed, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((count, width)) + shift)


def by_torch_fidelity(x, y):
    return kernel_mmd(x.numpy(), y.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)


def blocks_of(monkeypatch, reference, sample):
    """The pairs of blocks that a distance is computed on."""
    found = []
    monkeypatch.setattr(kernel, "squared_mmd", lambda x, y: found.append((x, y)) or 0.0)
    kernel_distance(reference, sample)
    return found


def test_torch_fidelity_on_the_same_subsets(monkeypatch):
    x, y = rows(120, 6, 1), rows(120, 6, 2, 0.3)
    mean, error = kernel_distance(x, y)
    estimates = [by_torch_fidelity(*pair) for pair in blocks_of(monkeypatch, x, y)]
    assert mean == pytest.approx(np.mean(estimates), rel=1e-9)
    assert error == pytest.approx(np.std(estimates, ddof=1) / 10**0.5, rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_scikit_learns_kernel_in_parts_of_any_size(monkeypatch, size):
    monkeypatch.setattr(kernel, "SIZE", size)
    x, y = rows(30, 5, 1), rows(19, 5, 2, 0.5)
    assert kernel_sum(x, y) == pytest.approx(polynomial_kernel(x, y).sum(), rel=1e-9)
    within = [polynomial_kernel(side)[~np.eye(len(side), dtype=bool)].mean() for side in (x, y)]
    expected = sum(within) - 2 * polynomial_kernel(x, y).mean()
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert squared_mmd(x.float(), y.float()) == pytest.approx(expected, rel=1e-4)


def test_estimate_by_hand():
    # within: k(0, 1) = 1 and k(0, 2) = 1; between: 1, 1, 1 and (2 + 1)³
    assert squared_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])) == 1 + 1 - 2 * 30 / 4


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (1.0, 22.0)])
def test_normal_distributions_have_a_closed_form(shift, expected):
    """In one dimension 3 Δ(E x)² + 3 Δ(E x²)² + Δ(E x³)²; a mean of 1 moves these moments by 1, 1 and 4."""
    mean, error = kernel_distance(rows(6000, 1, 1), rows(9000, 1, 2, shift))
    assert abs(mean - expected) < 4 * error
    assert error < 2


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_error_is_the_deviation_of_the_mean(shift):
    found = [kernel_distance(rows(60, 3, i), rows(90, 3, 1000 + i, shift)) for i in range(100)]
    means, errors = np.array(found).T
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(means.std(), rel=0.25)


@pytest.mark.parametrize(
    ("reference", "sample", "count"), [(20, 33, 10), (33, 20, 10), (4, 9, 2), (7, 7, 3), (61, 200, 12)]
)
def test_blocks_are_disjoint_and_random_and_hold_all_rows(monkeypatch, reference, sample, count):
    monkeypatch.setattr(kernel, "SIZE", 5)
    sides = [torch.arange(float(rows))[:, None] for rows in (reference, sample)]
    found = blocks_of(monkeypatch, *sides)
    assert len(found) == count
    for side, parts in zip(sides, zip(*found, strict=True), strict=True):
        assert {len(part) for part in parts} <= {len(side) // count, len(side) // count + 1}
        assert not torch.equal(torch.cat(parts), side) and torch.equal(torch.cat(parts).sort(dim=0).values, side)


def test_seed_decides_the_blocks_of_tensors_and_arrays():
    x, y = rows(50, 4, 1), rows(50, 4, 2)
    assert kernel_distance(x, y) == kernel_distance(x.numpy(), y.numpy()) != kernel_distance(x, y, seed=1)


def test_too_few_rows_are_named():
    with pytest.raises(ValueError, match="at least 4 samples a side, not 3"):
        kernel_distance(rows(9, 2, 1), rows(3, 2, 2))
