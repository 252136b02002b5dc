"""benchmarks/sampling.py runs from beginning to end and reports every row."""

import programs
import pytest

SMALL = ["--latent-size", "4", "--batch-size", "2", "--steps", "4", "--repeats", "1", "--no-compile"]


@pytest.mark.slow
def test_benchmark_reports_every_row():
    done = programs.run("-m", "benchmarks.sampling", *SMALL)
    assert done.returncode == 0, done.stderr
    for model in ("SiT-S/2", "DeepFlow-S/2", "diffusers DiT-S/2"):
        for guidance in ("none", "all steps", "[0.3, 0.7]"):
            assert f"| {model} | eager | {guidance} | " in done.stdout
    for target in ("2.1 unguided", "at most 1.45", "overhead under 2 %", "diffusers'"):
        assert f"{target}" in done.stdout


@pytest.mark.slow
def test_branches_report_every_row():
    done = programs.run("-m", "benchmarks.sampling", "--branches", *SMALL)
    assert done.returncode == 0, done.stderr
    for k in (2, 3):
        for what in ("internal guidance", "classifier-free guidance", "the same", "exit after branch 1"):
            assert f"| {k} | {what}" in done.stdout
