"""benchmarks/t2i_step.py runs from beginning to end, reports every row, and by default fits on a GPU of 80 GB."""

import runpy

import programs
import pytest
import tiny
import torch

from benchmarks import t2i_step, timing
from benchmarks.memory import BYTES_PER_PARAMETER, WORKSPACE, saved_bytes
from models import model_config


@pytest.mark.slow
def test_benchmark_reports_every_row():
    small = ["--model", "DeepFlow-MMDiT-Ti/2", "--trans-depth", "2", "--batch-size", "2", "--repeats", "1"]
    done = programs.run("-m", "benchmarks.t2i_step", *small, "--no-compile")
    assert done.returncode == 0, done.stderr
    for model in ("DeepFlow-MMDiT-Ti/2", "MMDiT, one branch", "DeepFlow of classes", "SiT of classes"):
        assert f"| {model} | eager | " in done.stdout


def test_networks_that_are_held_at_once_fit(monkeypatch):
    monkeypatch.setattr(timing, "ON_GPU", True)
    args = runpy.run_path(str(tiny.ROOT / "benchmarks/t2i_step.py"))["TextStepFlags"]()
    monkeypatch.setattr(t2i_step, "make_batch", lambda options, count: (None, None, None, None))
    monkeypatch.setattr(t2i_step, "Step", lambda model, *rest: sum(p.numel() for p in model.parameters()))
    activations = args.batch_size * saved_bytes(model_config(args.model), "eager")
    for how in args.hows:
        with torch.device("meta"):
            parameters = sum(t2i_step.make_steps(args, how).values())
        assert BYTES_PER_PARAMETER * parameters + WORKSPACE + activations < 0.9 * 80e9
