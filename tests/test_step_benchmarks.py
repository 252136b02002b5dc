"""benchmarks/train_step.py and benchmarks/dmf_step.py run from beginning to end and report every row."""

import programs
import pytest
import torch

from benchmarks import train_step
from benchmarks.memory import fixed_bytes, saved_bytes

SMALL = ["--batch-size", "1", "--repeats", "1", "--no-compile"]


@pytest.fixture
def flags(monkeypatch):
    """Function that makes flags of a small run; memory is not measured in a separate process."""
    monkeypatch.setattr(train_step, "build_and_weigh", lambda args, key, build: (build(), 1.0))
    small = {"model": "DeepFlow-Ti/2", "batch_size": 1, "repeats": 1, "compile": False}
    return lambda **changes: train_step.TrainStepFlags(**{**small, **changes})


@pytest.mark.slow
def test_training_steps_of_deepflow_sit_and_diffusers(flags, capsys):
    args = flags()
    rows, medians = train_step.measure(args)
    models = ["DeepFlow-Ti/2", "SiT, equal width and depth", "diffusers DiT, equal width and depth"]
    assert [row[:2] for row in rows] == [[model, "eager"] for model in models]
    train_step.print_ratios(medians, args)
    assert capsys.readouterr().out.count("run in turns") == 2


def test_what_does_not_fit_together_is_measured_one_after_the_other(flags, monkeypatch, capsys):
    """A network that does not fit at all, or a missing package, leaves the other rows."""

    def weigh(args, key, build):
        if key[0].startswith("SiT"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(), 1.0

    monkeypatch.setattr(train_step, "build_and_weigh", weigh)
    monkeypatch.setattr(train_step, "installed", lambda package: False)
    monkeypatch.setattr(train_step, "groups", lambda args, keys: [[key] for key in keys])
    rows, medians = train_step.measure(flags())
    assert [(row[0], row[2] == "out of memory") for row in rows] == [
        ("DeepFlow-Ti/2", False),
        ("SiT, equal width and depth", True),
    ]
    assert "diffusers is not installed" in capsys.readouterr().out and [*map(len, medians)] == [1, 0]


def test_groups_are_as_large_as_the_prediction_lets_fit(flags, monkeypatch):
    args = flags(batch_size=32)
    options, keys = args.options(), [("a", "eager"), ("b", "eager"), ("c", "eager")]
    monkeypatch.setattr(train_step, "ON_GPU", True)
    memory = 2 * fixed_bytes(options) + 32 * saved_bytes(options, "eager")
    monkeypatch.setattr(train_step, "gpu_bytes", lambda: memory)
    assert train_step.groups(args, keys) == [keys[:2], keys[2:]]
    monkeypatch.setattr(train_step, "gpu_bytes", lambda: 1)
    assert train_step.groups(args, keys) == [[key] for key in keys]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DMFT-Ti/2", "DeepFlow-DMF-Ti/2"])
def test_parts_of_a_flow_maps_step(model):
    done = programs.run("-m", "benchmarks.dmf_step", "--model", model, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "guidance passed 2 N rows through the network" in done.stdout
    for part in ("flow step", "flow map step", "  guidance", "  derivative", "  forward", "  forward and backward"):
        assert f"| {part} | eager | " in done.stdout
