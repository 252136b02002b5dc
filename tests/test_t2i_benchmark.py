"""benchmarks/t2i_step.py runs from beginning to end and reports every row."""

import programs
import pytest


@pytest.mark.slow
def test_benchmark_reports_every_row():
    small = ["--model", "DeepFlow-MMDiT-Ti/2", "--trans-depth", "2", "--batch-size", "2", "--repeats", "1"]
    done = programs.run("-m", "benchmarks.t2i_step", *small, "--no-compile")
    assert done.returncode == 0, done.stderr
    for model in ("DeepFlow-MMDiT-Ti/2", "MMDiT, one branch", "DeepFlow of classes", "SiT of classes"):
        assert f"| {model} | eager | " in done.stdout
