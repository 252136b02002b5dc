"""Grids of images: gaps, enlarging, names."""

import numpy as np
from PIL import Image

from common.pictures import GAP, SMALL, image_grid, save_grid


def images(count, side):
    return np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((count, side, side, 3), np.uint8)


def opened(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_images_stand_in_rows_with_gaps_between_and_white_where_missing():
    grid = image_grid(images(5, 4), 3)
    assert grid.shape == (2 * 4 + GAP, 3 * 4 + 2 * GAP, 3)
    assert grid[0, :, 0].tolist() == [0] * 4 + [255] * GAP + [1] * 4 + [255] * GAP + [2] * 4
    assert (grid[4 : 4 + GAP] == 255).all() and (grid[4 + GAP :, 2 * (4 + GAP) :] == 255).all()


def test_small_images_are_enlarged_and_large_ones_left(tmp_path):
    for side, width in ((16, SMALL), (48, 96), (SMALL, SMALL), (100, 100)):
        save_grid(images(2, side), 2, tmp_path / "grid.png")
        assert opened(tmp_path / "grid.png").shape == (width, 2 * width + GAP, 3)


def test_names_of_rows_and_columns_leave_the_images_as_they_are(tmp_path):
    save_grid(images(6, 64), 3, tmp_path / "plain.png")
    names = {"row_names": [["robin"], ["tabby", "tench"]], "column_names": ["1 step", "2 steps", "4 steps"]}
    save_grid(images(6, 64), 3, tmp_path / "named.png", **names)
    plain, named = opened(tmp_path / "plain.png"), opened(tmp_path / "named.png")
    height, width = plain.shape[:2]
    assert np.array_equal(named[-height:, -width:], plain)
    beside, above = named[-height:, :-width], named[:-height, -width:]
    for part in (beside[:64], beside[64 + GAP :], *(above[:, 66 * column :][:, :64] for column in range(3))):
        assert part.min() < 128  # letters
    assert (named[:-height, :-width] == 255).all()


def test_more_names_than_a_row_has_lines_for_are_joined(tmp_path):
    names = [[], [f"class {number}" for number in range(20)], []]
    save_grid(images(3, 64), 1, tmp_path / "grid.png", row_names=names)
    beside = opened(tmp_path / "grid.png")[:, :-64]
    assert [beside[66 * row :][:64].min() < 128 for row in range(3)] == [False, True, False]
    assert (beside[66 + 32 : 66 + 64] < 128).any()  # more than two lines
