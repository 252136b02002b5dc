"""script/*/eval.sh: sampling, then evaluation; what is missing is said before anything is sampled."""

import os
import subprocess

import pytest
import tiny

SIZES = ("base", "large", "xlarge")
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
mkdir -p "$SAMPLE_DIR"
[[ "$*" == *"--format png"* ]] || touch "$SAMPLE_DIR/NAME.npz"
"""


@pytest.fixture
def environment(tmp_path):
    """Stubs of torchrun and python that note how they were called, a checkpoint and a reference."""
    for name in ("bin/torchrun", "bin/python"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
    for name in ("step.pt", "ref.npz", "weights.pth"):
        (tmp_path / name).touch()
    values = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": tmp_path / "calls", "NUM_GPUS": 2}
    values.update(CKPT=tmp_path / "step.pt", REF=tmp_path / "ref.npz", SAMPLE_DIR=tmp_path / "fid", EXP_NAME="run")
    return {name: str(value) for name, value in values.items()}


def run(size, environment, *flags):
    command = ["bash", f"script/{size}/eval.sh", *flags]
    return subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", SIZES)
def test_samples_and_measures_as_published(environment, tmp_path, size):
    done = run(size, {**environment, "INCEPTION_WEIGHTS": str(tmp_path / "weights.pth")}, "--cfg-scale", "1.3")
    assert done.returncode == 0, done.stderr
    sample, evaluate, table = (tmp_path / "calls").read_text().splitlines()
    for flag in (
        "--num-fid-samples 50000",
        "--mode sde",
        "--num-steps 250",
        "--cfg-scale 1.0",
        f"--ckpt {tmp_path}/step.pt",
    ):
        assert flag in sample
    assert sample.startswith("torchrun --standalone --nproc-per-node 2 generate.py") and sample.endswith(
        "--cfg-scale 1.3"
    )
    expected = f"evaluations/evaluator.py {tmp_path}/ref.npz {tmp_path}/fid/NAME.npz --json results/run-NAME.json"
    assert evaluate == f"torchrun --standalone --nproc-per-node 2 {expected} --inception-weights {tmp_path}/weights.pth"
    assert table == "python evaluations/table.py results/run-NAME.json"


@pytest.mark.parametrize("size", ["b", "xl", "xl_512"])
def test_flow_maps_of_some_steps_have_their_own_results(environment, tmp_path, size):
    command = ["bash", f"script/dmf/eval_{size}.sh", "--mode", "restart"]
    done = subprocess.run(
        command, cwd=tiny.ROOT, env={**environment, "NUM_STEPS": "2"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sample, evaluate, table = (tmp_path / "calls").read_text().splitlines()
    assert "--num-fid-samples 50000" in sample and "--num-steps 2 " in sample and sample.endswith("--mode restart")
    assert evaluate.endswith("--json results/steps-2/run-NAME.json")
    assert table == "python evaluations/table.py results/steps-2/run-NAME.json"


def test_sampling_alone(environment, tmp_path):
    done = run("base", {**environment, "REF": "none"}, "--format", "png")
    assert done.returncode == 0 and "fid is not measured" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_without_an_npz_there_is_nothing_to_measure(environment, tmp_path):
    done = run("base", environment, "--format", "png")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/fid holds no npz to measure; leave out --format png\n"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"REF": ""}, "error: REF is not set: download ADM's reference batch"),
        ({"REF": "/nowhere.npz"}, "error: REF /nowhere.npz does not exist"),
        ({"CKPT": "/nowhere.pt"}, "error: CKPT /nowhere.pt does not exist"),
        ({"INCEPTION_WEIGHTS": "/nowhere.pth"}, "error: INCEPTION_WEIGHTS /nowhere.pth does not exist"),
    ],
)
def test_what_is_missing_is_said_first(environment, tmp_path, size, changes, message):
    done = run(size, {**environment, **changes})
    assert done.returncode == 2
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "calls").exists()
