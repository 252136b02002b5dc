"""benchmarks/train_step.py and benchmarks/dmf_step.py run from beginning to end and report every row."""

import programs
import pytest

SMALL = ["--batch-size", "1", "--repeats", "1", "--no-compile"]


@pytest.mark.slow
def test_training_steps_of_deepflow_sit_and_diffusers():
    done = programs.run("-m", "benchmarks.train_step", "--model", "DeepFlow-Ti/2", *SMALL)
    assert done.returncode == 0, done.stderr
    for model in ("DeepFlow-Ti/2", "SiT, equal width and depth", "diffusers DiT, equal width and depth"):
        assert f"| {model} | eager | " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DMFT-Ti/2", "DeepFlow-DMF-Ti/2"])
def test_parts_of_a_flow_maps_step(model):
    done = programs.run("-m", "benchmarks.dmf_step", "--model", model, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "guidance passed 4 N rows through the network" in done.stdout
    for part in ("flow step", "flow map step", "  guidance", "  derivative", "  forward", "  forward and backward"):
        assert f"| {part} | eager | " in done.stdout
