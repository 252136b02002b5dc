"""benchmarks/evaluation.py runs from beginning to end and reports every row."""

import programs
import pytest

SMALL = ("--samples", 40, "--references", 20, "--width", 16, "--batch-size", 8)
ROWS = (
    "| FID |",
    "| sFID |",
    "| Inception Score |",
    "| KID |",
    "| precision and recall, float16 |",
    "precision and recall, float32",
)


def test_distances_are_reported():
    done = programs.run("-m", "benchmarks.evaluation", *SMALL, "--images", 0)
    assert done.returncode == 0, done.stderr
    assert all(row in done.stdout for row in ROWS)
    assert "all, precision and recall in float16:" in done.stdout and "target" not in done.stdout


@pytest.mark.slow
def test_extraction_is_reported():
    done = programs.run("-m", "benchmarks.evaluation", *SMALL, "--images", 8, "--resolution", 32)
    assert done.returncode == 0, done.stderr
    assert "features of 8 images of 32²" in done.stdout and " images/s" in done.stdout
