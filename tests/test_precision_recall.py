"""Precision and recall of points on a line, where distances are done in the head; blocks and fall-back."""

import pytest
import torch

from evaluations.metrics.precision_recall import distance_block, distances, memberships, precision_recall, radii

LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])


@DTYPES
@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1, 1, 4, 16, 64]), (2, [9, 4, 9, 36, 144]), (4, [225, 196, 144, 64, 225])]
)
def test_radius_is_the_squared_distance_to_the_kth_neighbour(dtype, k, expected):
    for block in (2, 3, 10):
        assert radii(LINE, k, dtype, block).tolist() == expected


@DTYPES
@pytest.mark.parametrize("block", [1, 2, 100])
def test_membership_is_within_the_radius_of_any_point(dtype, block):
    # k = 1: the line's balls are [-1, 1], [0, 2], [1, 5], [3, 11], [7, 23]
    # the sample's are [3.5, 4.5], [4, 5], [4.5, 59.5]
    sample = torch.tensor([[4.0], [4.5], [32.0]])
    sample_inside, reference_inside = memberships(LINE, sample, 1, dtype, block)
    assert sample_inside.tolist() == [True, True, False]
    assert reference_inside.tolist() == [False, False, False, True, True]


def test_numbers_are_fractions_of_either_set():
    sample = torch.tensor([[4.0], [4.5], [32.0]])
    assert precision_recall(LINE, sample, 1) == (2 / 3, 2 / 5)
    assert precision_recall(LINE, LINE, 2) == (1.0, 1.0)
    assert precision_recall(LINE, LINE + 1000, 2) == (0.0, 0.0)


def test_half_rounds_after_every_operation():
    u, v = torch.tensor([[2049.0 / 64]]), torch.tensor([[1.0]])
    # 2049/64 is halfway between halves and becomes 32; its square 1024; 1024 − 64 + 1
    assert distances(u, v, torch.float16).item() == 961
    assert distances(u, v, torch.float32).item() == pytest.approx((2049 / 64 - 1) ** 2, rel=1e-6)


def test_a_block_that_overflows_is_computed_in_float32_and_no_other():
    rows = torch.tensor([[1.0 / 3, 0], [300.0, 1.0 / 3], [301.0, 1.0 / 3]])
    first, second = (distance_block(rows[:1], columns, torch.float16) for columns in (rows[:1], rows[1:]))
    assert first.dtype == second.dtype == torch.float32
    torch.testing.assert_close(first, distances(rows[:1], rows[:1], torch.float16).float(), rtol=0, atol=0)
    torch.testing.assert_close(second, distances(rows[:1], rows[1:], torch.float32), rtol=0, atol=0)
    assert not distances(rows[:1], rows[1:], torch.float16).isfinite().all()


def test_features_that_half_cannot_hold_are_said(capsys):
    rows = torch.tensor([[200.0, 0], [201.0, 0], [0, 202.0], [0, 203.0]])
    precision_recall(rows, rows, 1)
    assert "float16 distances overflow unnoticed" in capsys.readouterr().err
    precision_recall(rows, rows, 1, precision="float32")
    assert capsys.readouterr().err == ""
