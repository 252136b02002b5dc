"""benchmarks/data.py runs from beginning to end and reports every row."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/data.py"


@pytest.mark.slow
def test_benchmark_reports_every_row(tmp_path):
    small = ["--count", "600", "--images", "20", "--repeats", "1", "--work", str(tmp_path)]
    result = subprocess.run([sys.executable, SCRIPT, *small], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = ["2 workers", "batches of 16", "| packed |", "| folder |", "DataLoader, 2 workers", "1,281,167 entries"]
    rows += ["1,281,167 images listed"]
    assert all(row in result.stdout for row in rows)
    assert not list(tmp_path.iterdir())
