"""Twenty steps of a fixed run against their stored losses: a change of what is computed shows here.

python tests/test_golden_losses.py    writes tests/fixtures/golden_losses.json anew, for a change that is meant
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import pytest
import tiny

GOLDEN = Path(__file__).parent / "fixtures/golden_losses.json"
FLAGS = {"batch_size": 8, "max_train_steps": 20, "weighting": "lognormal", "tg_upper_bound": 0.05, "adam_epsilon": 1e-3}
NAMES = ("loss", "loss_v1", "loss_v2", "loss_a1", "grad_norm")


def losses(folder):
    """{name: value of each step} of the fixed run, with the noise of runs older than blocks of rows."""
    data = tiny.data_folder(Path(folder) / "data", count=24)
    with mock.patch("training.run.BLOCK", 0):
        lines = tiny.log_lines(tiny.run_train(data, folder, **FLAGS))
    return {name: [line[name] for line in lines] for name in NAMES}


def test_losses_are_the_stored_ones(tmp_path):
    """One machine repeats them to the bit. Others sum in another order; with ε = 1e-3 Adam does not magnify that.

    Other instruction sets (SSE 4.1, none) changed them by 2e-7, relative, at the most.
    """
    found, golden = losses(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name in NAMES:
        assert found[name] == pytest.approx(golden[name], rel=1e-5), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(folder), indent=1) + "\n")
    print(f"written: {GOLDEN}")
