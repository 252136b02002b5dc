"""script/*/eval.sh: sampling, then evaluation; a missing file is named before anything is sampled."""

import os
import subprocess

import pytest
import tiny

from common.flags import parse_commands, parse_flags
from evaluations import sweep
from evaluations.calculate_metrics import CalcFlags
from generate import GenerateConfig

LAUNCHER = "python -m common.launch --standalone --nproc-per-node 2"
FAST = (True, "bf16", "bf16", 64)
SIZES = ("base", "large", "xlarge")
MAPS = {"b": ("dmft-b", 1.0), "xl": ("dmft-xl", 1.0), "xl_512": ("dmft-xl-512", 1.5)}
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
best="--num-steps 50 --cfg-scale 1.4 --guidance-low 0 --guidance-high 0.7"
[[ "$*" != *evaluations.sweep* ]] || echo "$best" > "$SWEEP/best.txt"
[[ "$*" != *--check-only* ]] || exit ${CHECK:-0}
[[ "$*" != *--format\\ png* ]] || exit 0
while [ $# -gt 0 ] && [ "$1" != --sample-dir ]; do shift; done
[ $# = 0 ] || { mkdir -p "$2"; touch "$2/NAME.npz"; }
"""


@pytest.fixture
def environment(tmp_path):
    """A stub of python that notes how it was called, a checkpoint and a reference."""
    path = tmp_path / "bin/python"
    path.parent.mkdir()
    path.write_text(STUB)
    path.chmod(0o755)
    for name in ("step.pt", "ref.npz", "weights.pth"):
        (tmp_path / name).touch()
    values = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": tmp_path / "calls", "NUM_GPUS": 2}
    values.update(CKPT=tmp_path / "step.pt", REF=tmp_path / "ref.npz", SAMPLE_DIR=tmp_path / "fid", EXP_NAME="run")
    return {name: str(value) for name, value in values.items()}


def run(script, environment, *flags):
    command = ["bash", f"script/{script}.sh", *flags]
    return subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False)


def sampled(line, fast=FAST):
    """The configuration that a recorded call gives to generate.py: compiled, in half precision."""
    program, _, flags = line.partition(" generate.py ")
    assert program == LAUNCHER
    config = parse_flags(GenerateConfig, flags.split())
    assert (config.compile, config.dtype, config.vae_dtype, config.per_proc_batch_size) == fast
    return config


@pytest.mark.parametrize("size", SIZES)
def test_samples_and_measures_as_published(environment, tmp_path, size):
    done = run(f"{size}/eval", {**environment, "INCEPTION_WEIGHTS": str(tmp_path / "weights.pth")})
    assert done.returncode == 0, done.stderr
    check, sample, evaluate, table = (tmp_path / "calls").read_text().splitlines()
    config = sampled(sample)
    assert (config.ckpt, config.sample_dir) == (str(tmp_path / "step.pt"), str(tmp_path / "fid"))
    assert (config.num_fid_samples, config.cfg_scale, config.labels) == (50_000, 1.0, "random")
    assert config.mode in (None, "sde") and config.num_steps in (None, 250) and config.weights == "ema"
    # the checkpoint knows its model
    assert [config.model, config.trans_depth, config.df_idxs, config.path_type, config.legacy_scaling] == [None] * 5
    program = f"-m evaluations.evaluator {tmp_path}/ref.npz"
    own = f"--inception-weights {tmp_path}/weights.pth"
    measured = f"{tmp_path}/fid/NAME.npz"
    assert evaluate == f"{LAUNCHER} {program} {measured} --json results/run-NAME.json {own}"
    assert check == f"python {program} samples --json results/run.json {own} --check-only"
    assert table == "python -m evaluations.table results/run-NAME.json"


def test_a_result_tells_the_run_once(environment):
    command = ["bash", "-c", "source script/measure.sh; result_of a/run-0400000.npz; result_of a/xl.npz -steps-1"]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["results/run-0400000.json", "results/run-xl-steps-1.json"], done.stderr


def test_further_flags_win_over_those_of_the_recipe(environment, tmp_path):
    own = ["--cfg-scale", "1.3", "--num-steps", "50", "--no-compile", "--dtype", "fp32"]
    done = run("base/eval", environment, *own)
    assert done.returncode == 0, done.stderr
    config = sampled((tmp_path / "calls").read_text().splitlines()[1], (False, "fp32", "bf16", 64))
    assert (config.cfg_scale, config.num_steps) == (1.3, 50)


@pytest.mark.parametrize("size", MAPS)
def test_flow_maps_are_measured_as_published_with_each_number_of_steps(environment, tmp_path, size):
    own = {"DINOV2_WEIGHTS": str(tmp_path / "weights.pth"), "NUM_FID_SAMPLES": "700"}
    done = run(f"dmf/eval_{size}", {**environment, **own}, "--mode", "restart")
    assert done.returncode == 0, done.stderr
    check, *calls, table = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6 and f"calc --images samples --ref {tmp_path}/ref.npz" in check and "--check-only" in check
    results = [f"results/run-NAME-steps-{steps}.json" for steps in (1, 2, 4)]
    for steps, sample, measure, result in zip((1, 2, 4), calls[::2], calls[1::2], results, strict=True):
        config = sampled(sample)
        assert (config.num_fid_samples, config.num_steps, config.mode) == (700, steps, "restart")
        assert (config.shift, config.dmf_depth, config.cfg_scale) == (MAPS[size][1], None, 1.0)
        assert config.sample_dir == f"{tmp_path}/fid/fid-steps-{steps}"
        launcher, _, flags = measure.partition(" -m evaluations.calculate_metrics ")
        assert launcher == LAUNCHER
        _, calc = parse_commands({"calc": CalcFlags}, flags.split())
        assert (calc.images, calc.ref) == (f"{config.sample_dir}/NAME.npz", str(tmp_path / "ref.npz"))
        assert (calc.metrics, calc.num, calc.json) == ("fid,fd_dinov2", 700, result)
        assert (calc.dinov2_weights, calc.inception_weights) == (str(tmp_path / "weights.pth"), None)
    assert table == f"python -m evaluations.table {' '.join(results)}"


@pytest.mark.parametrize("changes", [{"STEPS": "8"}, {"NUM_STEPS": "8"}])
def test_other_numbers_of_steps(environment, tmp_path, changes):
    done = run("dmf/eval_xl", {**environment, **changes, "REF": "none"})
    assert done.returncode == 0 and "fid-steps-8 is not measured" in done.stdout, done.stderr
    (sample,) = (tmp_path / "calls").read_text().splitlines()
    assert sampled(sample).num_steps == 8 and sampled(sample).num_fid_samples == 50_000


def test_guided_evaluation_searches_then_measures_the_best_setting(environment, tmp_path):
    own = {"SCALES": "1.5 2", "INTERVALS": "0,0.7", "SWEEP": str(tmp_path), "SWEEP_SAMPLES": "40"}
    done = run("guided", {**environment, **own}, "--mode", "ode")
    assert done.returncode == 0, done.stderr
    check, search, sample_check, sample, evaluate, table = (tmp_path / "calls").read_text().splitlines()
    assert check == sample_check and check.endswith("--check-only")
    args, generate = sweep.parse(search.removeprefix("python -m evaluations.sweep ").split())
    assert (args.cfg_scale, args.interval, args.num_steps, args.num_samples) == ([1.5, 2.0], [(0.0, 0.7)], [250], 40)
    assert (args.ckpt, args.ref, args.processes) == ([str(tmp_path / "step.pt")], str(tmp_path / "ref.npz"), 2)
    made = parse_flags(GenerateConfig, ["--ckpt", "x", *generate])
    assert (made.compile, made.dtype, made.vae_dtype, made.per_proc_batch_size, made.mode) == (*FAST, "ode")
    config = sampled(sample)
    assert (config.num_steps, config.cfg_scale, config.guidance_low, config.guidance_high) == (50, 1.4, 0.0, 0.7)
    assert (config.num_fid_samples, config.mode) == (50_000, "ode")
    assert " -m evaluations.evaluator " in evaluate and table.endswith("results/run-NAME.json")


@pytest.mark.parametrize("script", ["base/eval", "dmf/eval_xl", "guided"])
def test_what_measuring_lacks_ends_it_before_anything_is_sampled(environment, tmp_path, script):
    done = run(script, {**environment, "CHECK": "2"})
    assert done.returncode == 2
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith("--check-only")


def test_a_place_that_cannot_be_written_ends_the_search(environment, tmp_path):
    done = run("guided", {**environment, "SAMPLE_DIR": f"{tmp_path}/ref.npz/fid"})
    assert done.returncode == 2 and "ref.npz/fid cannot be written" in done.stderr and "SAMPLE_DIR=" in done.stderr
    assert "evaluations.sweep" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("script", "words", "remedy"),
    [
        ("base/eval", ["--sample-dir", "other"], "SAMPLE_DIR=FOLDER"),
        ("base/eval", ["--num_samples=5"], "NUM_FID_SAMPLES=N"),
        ("t2i/eval", ["--ckpt", "other.pt"], "CKPT=FILE"),
        ("dmf/eval_xl", ["--num-steps", "8"], 'STEPS="1 2 4"'),
        ("base/eval", ["--format=png"], "REF=none"),
        ("dmf/eval_xl", ["--no-create-npz"], "REF=none"),
    ],
)
def test_flags_that_a_recipe_needs_for_itself_are_refused(environment, tmp_path, script, words, remedy):
    (tmp_path / "VAL").mkdir()
    own = {"VAL_JSON": str(tmp_path / "ref.npz"), "VAL_IMAGES": str(tmp_path / "VAL")}
    done = run(script, {**environment, **own}, *words)
    assert done.returncode == 2 and remedy in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    calls = tmp_path / "calls"
    assert not calls.exists() or "generate" not in calls.read_text()


def test_guided_evaluation_needs_a_reference(environment, tmp_path):
    done = run("guided", {**environment, "REF": "none"})
    assert done.returncode == 2 and done.stderr.startswith("error: REF=none leaves nothing")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("script", "run_and_step"),
    [
        ("base/eval", "deepflow-b-2t/checkpoints/0400000"),
        ("large/eval", "deepflow-l-3t/checkpoints/0400000"),
        ("xlarge/eval", "deepflow-xl-3t/checkpoints/2000000"),
        ("dmf/eval_b", "dmft-b/checkpoints/0400000"),
        ("dmf/eval_xl", "dmft-xl/checkpoints/0400000"),
        ("dmf/eval_xl_512", "dmft-xl-512/checkpoints/0800000"),
        ("t2i/eval", "deepflow-t2i-3t/checkpoints/0150000"),
        ("guided", "deepflow-xl-3t/checkpoints/2000000"),
    ],
)
def test_the_last_checkpoint_of_the_recipe_is_the_default(environment, tmp_path, script, run_and_step):
    own = {name: value for name, value in environment.items() if name not in ("CKPT", "EXP_NAME")}
    done = run(script, {**own, "OUTPUT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: CKPT {tmp_path}/{run_and_step}.pt does not exist")


def test_sampling_alone(environment, tmp_path):
    done = run("base/eval", {**environment, "REF": "none"}, "--format", "png")
    assert done.returncode == 0 and "fid is not measured" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize("script", ["base/eval", "dmf/eval_xl"])
def test_without_an_npz_there_is_nothing_to_measure(environment, tmp_path, script):
    done = run(script, environment, "--format", "png")
    assert done.returncode == 2
    assert done.stderr.startswith("error: without an npz there is nothing to measure") and "REF=none" in done.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("script", "kind"), [("base/eval", "ADM"), ("dmf/eval_xl", "Decoupled"), ("guided", "ADM")])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"REF": ""}, "error: REF is not set: download KIND"),
        ({"REF": "/nowhere.npz"}, "error: REF /nowhere.npz does not exist"),
        ({"CKPT": "/nowhere.pt"}, "error: CKPT /nowhere.pt does not exist"),
        ({"INCEPTION_WEIGHTS": "/nowhere.pth"}, "error: INCEPTION_WEIGHTS /nowhere.pth does not exist"),
        ({"DINOV2_WEIGHTS": "/nowhere.pth"}, "error: DINOV2_WEIGHTS /nowhere.pth does not exist"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_sampled(environment, tmp_path, script, kind, changes, message):
    done = run(script, {**environment, **changes})
    assert done.returncode == 2
    assert done.stderr.startswith(message.replace("KIND", kind)) and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "calls").exists()
