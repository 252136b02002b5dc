"""benchmarks/data.py runs from beginning to end and reports every row."""

import programs
import pytest


@pytest.mark.slow
def test_benchmark_reports_every_row(tmp_path):
    small = ["--count", "600", "--images", "20", "--repeats", "1", "--work", str(tmp_path)]
    done = programs.run("-m", "benchmarks.data", *small)
    assert done.returncode == 0, done.stderr
    rows = ["2 workers", "batches of 16", "| packed |", "| folder |", "DataLoader, 2 workers", "1,281,167 entries"]
    rows += ["1,281,167 images listed"]
    assert all(row in done.stdout for row in rows)
    assert not list(tmp_path.iterdir())
