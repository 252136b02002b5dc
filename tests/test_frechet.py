"""Fréchet distance against closed forms and published values of small cases."""

import numpy as np
import programs
import pytest
import torch
import torch.distributed as dist

from common.processes import Processes
from evaluations.metrics.frechet import RunningStatistics, frechet_distance, statistics

# Value of the published implementation (scipy's sqrtm) for dense, well conditioned covariances.
DENSE_MU1, DENSE_MU2 = [-0.827, 0.143, 0.937, 0.018], [0.693, 0.315, 1.504, -2.007]
DENSE_SIGMA1 = [
    [2.538954, -0.025143, -0.796934, 2.378467],
    [-0.025143, 2.341922, 2.370778, -0.418977],
    [-0.796934, 2.370778, 7.829068, -2.624652],
    [2.378467, -0.418977, -2.624652, 5.042141],
]
DENSE_SIGMA2 = [
    [2.121154, 0.617488, 1.153414, 0.71826],
    [0.617488, 3.628258, 0.435978, 0.727697],
    [1.153414, 0.435978, 4.617236, -0.063365],
    [0.71826, 0.727697, -0.063365, 2.999311],
]
DENSE_DISTANCE = 9.233460305301982


def test_diagonal_covariances_have_a_closed_form():
    # |Δμ|² + Σ (√a − √b)² = 14 + 1 + 1 + 0
    value = frechet_distance([0, 0, 0], np.diag([1, 4, 9]), [1, 2, 3], np.diag([4, 1, 9]))
    assert value == pytest.approx(16, rel=1e-12)


def test_one_dimension():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-12)


def test_commuting_covariances_in_a_rotated_frame():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    a, b = rng.uniform(0, 3, 20), rng.uniform(0, 3, 20)
    sigma1, sigma2 = (rotation * a) @ rotation.T, (rotation * b) @ rotation.T
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(np.zeros(20), sigma1, np.zeros(20), sigma2) == pytest.approx(expected, rel=1e-10)


def test_published_value_and_symmetry():
    one, two = (DENSE_MU1, DENSE_SIGMA1), (DENSE_MU2, DENSE_SIGMA2)
    assert frechet_distance(*one, *two) == pytest.approx(DENSE_DISTANCE, rel=1e-10)
    assert frechet_distance(*two, *one) == pytest.approx(DENSE_DISTANCE, rel=1e-10)


def test_identical_is_zero():
    assert frechet_distance(DENSE_MU1, DENSE_SIGMA1, DENSE_MU1, DENSE_SIGMA1) == pytest.approx(0, abs=1e-12)


def test_a_pure_shift_counts_its_square():
    shifted = np.add(DENSE_MU1, [3, 0, 0, -4])
    assert frechet_distance(DENSE_MU1, DENSE_SIGMA1, shifted, DENSE_SIGMA1) == pytest.approx(25, rel=1e-12)


def test_degenerate_covariances():
    zero, one = np.zeros((3, 3)), np.ones(3)
    assert frechet_distance(np.zeros(3), zero, one, zero) == pytest.approx(3, rel=1e-12)
    # an eigenvalue below zero by rounding counts as zero in the root, in full in the trace
    value = frechet_distance([0, 0], np.diag([1, -1e-7]), [1, 1], np.eye(2))
    assert value == pytest.approx(2.9999999, abs=1e-12)


def test_fewer_samples_than_dimensions():
    features = np.random.default_rng(1).standard_normal((10, 50))
    mu, sigma = statistics(features)
    # 2·features has root 2·Σ^½: tr(Σ + 4Σ − 2·2Σ) = tr Σ
    expected = np.square(mu).sum() + np.trace(sigma)
    assert frechet_distance(mu, sigma, *statistics(2 * features)) == pytest.approx(expected, rel=1e-12)


def test_statistics_are_unbiased_and_float64():
    mu, sigma = statistics(np.array([[0, 0], [2, 4]], dtype=np.uint8))
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_array_equal(mu, [1, 2])
    np.testing.assert_array_equal(sigma, [[2, 4], [4, 8]])
    assert statistics(np.array([[1.0], [3.0]]))[1].shape == (1, 1)


def test_statistics_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        frechet_distance([0, 0], np.eye(2), [0, 0, 0], np.eye(3))


def test_statistics_need_two_rows():
    with pytest.raises(ValueError, match="at least 2"):
        statistics(np.zeros((1, 4)))


def rows_with_large_mean(count=500, width=7):
    return torch.from_numpy(np.random.default_rng(2).standard_normal((count, width)) * 1e-2 + 100)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_running_statistics_do_not_depend_on_the_batch(batch):
    rows = rows_with_large_mean()
    running = RunningStatistics(7)
    for part in rows.split(batch):
        running.add(part)
    running.add(rows[:0])
    mu, sigma = running.finish()
    # a sum of squares minus N·μμᵀ loses eight digits here
    np.testing.assert_allclose(sigma, np.cov(rows.numpy(), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(mu, rows.numpy().mean(axis=0), rtol=1e-12)


def merged(rank, world, folder):
    """One of the processes of the test below: every third row, and none for the last process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    running, rows = RunningStatistics(7), rows_with_large_mean()
    running.add(rows[rank :: world - 1] if rank < world - 1 else rows[:0])
    running.merge_processes()
    gathered = Processes(rank, world, torch.device("cpu"), None).gather_rows(torch.full((rank, 2), float(rank)))
    torch.save((*map(torch.from_numpy, running.finish()), gathered), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_merged_processes_give_the_statistics_of_one(tmp_path):
    ranks = [programs.server().Process(target=merged, args=(rank, 4, str(tmp_path))) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    mu, sigma = statistics(rows_with_large_mean())
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_allclose(found[0], mu, rtol=1e-12)
        np.testing.assert_allclose(found[1], sigma, rtol=1e-9)
        assert found[2].tolist() == [[1.0] * 2] + [[2.0] * 2] * 2 + [[3.0] * 2] * 3


def test_one_row_has_no_covariance():
    running = RunningStatistics(2)
    running.add(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        running.finish()
