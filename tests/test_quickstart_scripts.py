"""script/quickstart*.sh: STEPS and WORK, with stand-ins for what they start."""

import os
import re
import subprocess

import pytest
import tiny

from common.flags import parse_flags
from evaluations import sweep
from sampling.flags import GenerateConfig

STUB = """#!/usr/bin/env bash
echo "python $*" >> "$CALLS"
case " $*" in *" train"*.py*)
    [ "${TRAINED:-0}" = 0 ] || echo "error: of training" >&2
    exit "${TRAINED:-0}" ;;
esac
dirname "$CALLS"
while [ $# -gt 0 ] && [ "$1" != --sample-dir ]; do shift; done
[ $# = 0 ] || { mkdir -p "$2"; touch "$2/NAME.npz"; }
"""
RUNS = {"quickstart": "digits", "quickstart_dmf": "digits-map", "quickstart_t2i": "digits"}


@pytest.fixture
def run(tmp_path):
    """Run a quickstart in the folder `work` with an environment; returns (completed process, calls of programs)."""
    path = tmp_path / "bin/python"
    path.parent.mkdir()
    path.write_text(STUB)
    path.chmod(0o755)
    values = {"CALLS": tmp_path / "calls", "WORK": tmp_path / "work", "VIRTUAL_ENV": tmp_path}
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **{name: str(value) for name, value in values.items()}}

    def call(script, **changes):
        command, settings = ["bash", f"script/{script}.sh"], {**env, **changes}
        done = subprocess.run(command, cwd=tiny.ROOT, env=settings, capture_output=True, text=True, check=False)
        return done, (tmp_path / "calls").read_text().splitlines()

    return call


def trained(tmp_path, script, *steps):
    """Leave checkpoints of these steps in a quickstart's run, and the flow model that a map starts from."""
    for name, number in (("digits", 3000), *((RUNS[script], step) for step in steps)):
        path = tmp_path / f"work/exps/{name}/checkpoints/{number:07d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("script", [*RUNS, "branches_study", "test"])
def test_help_is_the_comment_at_the_top(script):
    command = ["bash", f"../script/{script}.sh", "--help"]
    done = subprocess.run(command, cwd=tiny.ROOT / "tests", capture_output=True, text=True, check=True)
    first, usage, *others = done.stdout.splitlines()
    assert first.endswith(".") and usage.startswith(f"  bash script/{script}.sh [--")
    assert len(others) >= 3 and "set -" not in done.stdout and not done.stderr


@pytest.mark.parametrize("script", RUNS)
def test_the_header_and_the_step_of_training_name_the_model(script):
    text = (tiny.ROOT / f"script/{script}.sh").read_text()
    model = re.search(r"--model (\S+)", text)[1]
    assert model in text.partition("set -euo")[0] and re.search(rf'^step "./. (train|fine-tune) .*{model}', text, re.M)


@pytest.mark.parametrize("script", RUNS)
def test_fewer_steps_than_are_trained_are_an_error_before_anything_starts(run, tmp_path, script):
    trained(tmp_path, script, 4000)
    done, calls = run(script, STEPS="50")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error:") and "STEPS=50" in line and "WORK=" in line
    assert f"work/exps/{RUNS[script]} " in line and not any("-m digits" in call for call in calls)


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize("steps", ["50", "60"])
def test_kept_steps_and_further_ones_are_trained_and_sampled(run, tmp_path, script, steps):
    trained(tmp_path, script, *([50, 70] if steps == "50" else []))
    if steps == "60":
        (tmp_path / "work/exps/digits/checkpoints/0003000.pt").rename(tmp_path / "other.pt")
    done, calls = run(script, STEPS=steps)
    assert done.returncode == 0, done.stderr
    started = {word: [call for call in calls if f" {word}" in call] for word in ("train", "generate")}
    assert f"--max-train-steps {steps} " in started["train"][-1]
    ckpt = f"{tmp_path / 'work'}/exps/{RUNS[script]}/checkpoints/{int(steps):07d}.pt "
    assert any(f"--ckpt {ckpt}" in call for call in started["generate"])


@pytest.mark.parametrize("steps", ["0", "4k", "-1", "007"])
def test_what_is_no_number_of_steps_is_named(run, steps):
    done, _ = run("quickstart_t2i", STEPS=steps)
    assert done.returncode == 2 and done.stderr.startswith(f"error: STEPS={steps} ")


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize(("continued", "code"), [(False, "2"), (True, "2"), (True, "130")])
def test_a_failure_of_training_ends_with_its_own_line(run, tmp_path, script, continued, code):
    """A run that continues names WORK before, as settings may be what is refused."""
    if continued:
        trained(tmp_path, script, 50)
    done, calls = run(script, TRAINED=code, STEPS="4000")
    assert str(done.returncode) == code and done.stderr == "error: of training\n"
    assert ("WORK=OTHER" in done.stdout) == continued and not any(" generate" in call for call in calls)


@pytest.mark.parametrize("script", RUNS)
def test_existing_results_are_checked_by_one_process(run, tmp_path, script):
    """Samples older than the checkpoint belong to another one."""
    _, first = run(script)
    (tmp_path / "calls").unlink()
    trained(tmp_path, script, {"quickstart_dmf": 600, "quickstart_t2i": 2000}.get(script, 3000))
    _, second = run(script)
    for path in (tmp_path / "work").rglob("*.npz"):
        os.utime(path, (2e9, 2e9))
    _, third = run(script)
    for calls, launched in ((first, (True, True)), (second, (False, True)), (third[len(second) :], (False, False))):
        for word, expected in zip(("train", "generate"), launched, strict=True):
            found = [call for call in calls if f" {word}" in call]
            assert found and {"common.launch" in call for call in found} == {expected}, (word, found)


def test_the_study_of_branches_measures_the_quickstarts_model(run, tmp_path):
    (tmp_path / "data/vae-sd").mkdir(parents=True)
    done, calls = run("branches_study", DATA=str(tmp_path / "data"), SEEDS="0 4", LENGTHS="500 1000", SAMPLES="40")
    assert done.returncode == 0, done.stderr
    scripts = [(tiny.ROOT / f"script/{name}.sh").read_text() for name in ("quickstart", "branches_study")]
    quickstarts, own = (re.search("--model .*?--max-train-steps", text, re.DOTALL)[0].split() for text in scripts)
    assert own == quickstarts
    trained = [call for call in calls if " train.py" in call]
    assert [f"--seed {seed} " in call for seed, call in zip((0, 4), trained, strict=True)] == [True, True]
    sweeps = [call.partition("evaluations.sweep ")[2].split() for call in calls if "evaluations.sweep" in call]
    outs = []
    for words in sweeps:
        args, generate = sweep.parse(words)
        outs.append(args.out.removeprefix(f"{tmp_path / 'work'}/"))
        length = int(outs[-1].split("/")[0])
        assert args.ckpt == [f"{tmp_path / 'work'}/exps/seed-{seed}/checkpoints/{length:07d}.pt" for seed in (0, 4)]
        for setting in sweep.settings(args):
            config = parse_flags(GenerateConfig, ["--ckpt", "x", *map(str, setting.flags), *generate])
            config.resolve().for_model("flow", 2)
            assert config.weights == "raw"  # after so few steps
    curves = ("internal", "exits", "gaps", "single", "both", "cheap")
    assert outs == [f"{length}/{curve}" for length in (500, 1000) for curve in curves]


def test_a_study_without_data_names_them(run, tmp_path):
    done, _ = run("branches_study", DATA=str(tmp_path / "none"))
    assert done.returncode == 2 and f"{tmp_path}/none" in done.stderr and "DATA=" in done.stderr
