"""script/t2i/preprocess.sh and eval.sh: flags that exist, steps in order; a missing file is named first."""

import os
import subprocess

import pytest
import tiny
from data_helpers import write_class_folders

from common.flags import parse_commands, parse_flags
from evaluations.calculate_metrics import CalcFlags, RefFlags
from evaluations.clip_score import ClipFlags
from evaluations.evaluator import EvaluatorFlags
from evaluations.geneval import CheckFlags
from generate_t2i import TextGenerateConfig
from preprocessing.convert import convert
from preprocessing.dataset_tools import COMMANDS
from preprocessing.info import describe
from preprocessing.options import ConvertFlags

PREPARE = {name: flags for name, (flags, _) in COMMANDS.items()}
METRICS = {"calc": CalcFlags, "ref": RefFlags}
# notes how it was called, and leaves what the real program would leave for the next one
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    *"${FAILS:-none}"*" --check-only") exit 2 ;;
    *" info "*) cat "$INFO" ;;
    *generate_t2i.py*) while [ "$1" != --sample-dir ]; do shift; done; mkdir -p "$2/NAME"; touch "$2/NAME.npz" ;;
esac
"""


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    """A file with what `info` prints about seven converted images."""
    folder = tmp_path_factory.mktemp("info")
    write_class_folders(folder / "source", classes=1, per_class=7)
    convert(ConvertFlags(folder / "source", folder / "images", (16, 16), workers=1))
    (folder / "info").write_text("\n".join(describe(folder / "images")))
    return folder / "info"


@pytest.fixture
def environment(tmp_path, info):
    """A stub of python, and files where the scripts look for them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    names = {"CKPT": "step.pt", "VAL_JSON": "val.json", "VAL_IMAGES": "val/images", "GENEVAL": "metadata.jsonl"}
    values = {name: tmp_path / file for name, file in names.items()}
    for path in values.values():
        path.parent.mkdir(exist_ok=True)
        path.touch()
    values.update(CALLS=tmp_path / "calls", INFO=info, NUM_GPUS=2, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    values.update(SAMPLE_DIR=tmp_path / "samples", RESULTS=tmp_path / "results", EXP_NAME="run")
    return {name: str(value) for name, value in values.items()}


def run(script, environment, *flags):
    """(completed process, [[program or module, flag, …], …] of what it started)."""
    command = ["bash", f"script/t2i/{script}.sh", *flags]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False)
    calls = open(environment["CALLS"]).read().splitlines() if os.path.exists(environment["CALLS"]) else []
    lines = [line.removeprefix("python -m common.launch --standalone --nproc-per-node 2 ").split() for line in calls]
    return done, [[word for word in line if word not in ("python", "-m")] for line in lines]


def programs(calls):
    """What was started, in order: the program, or the command of one that has several."""
    with_commands = ("dataset_tools", "calculate_metrics", "geneval")
    return [
        line[1] if line[0].endswith(with_commands) else line[0].removesuffix(".py").split(".")[-1] for line in calls
    ]


def test_preprocessing_of_both_splits(environment):
    places = {"COCO": "/c", "DATA_DIR": "/d"}
    done, calls = run("preprocess", {**environment, **places, "TRAIN_COUNT": "7", "VAL_COUNT": ""})
    assert done.returncode == 0, done.stderr
    steps = ["convert", "info", "encode", "captions", "verify", "info"]
    assert programs(calls) == 2 * steps
    for split, first in (("train", 0), ("val", 6)):
        convert, _, encode, captions, *_ = (parse_commands(PREPARE, line[1:])[1] for line in calls[first : first + 6])
        assert (convert.source, convert.dest) == (f"/c/{split}2014", f"/d/{split}/images")
        assert (convert.resolution, convert.transform) == ((256, 256), "center-crop")
        assert (encode.source, encode.dest, encode.packed) == (f"/d/{split}/images", f"/d/{split}/vae-sd", True)
        assert captions.annotations == f"/c/annotations/captions_{split}2014.json"
        assert (captions.dest, captions.stored_dtype) == (f"/d/{split}/text", "fp16")
        assert captions.text_encoder == "openai/clip-vit-large-patch14"


def test_missing_images_of_coco_end_it_before_anything_is_encoded(environment):
    done, calls = run("preprocess", environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "train/images holds 7 images instead of 82783" in line and "TRAIN_COUNT=" in line
    assert programs(calls) == ["convert", "info"]


def test_samples_without_an_npz_are_refused_before_anything_is_sampled(environment):
    done, calls = run("eval", environment, "--format", "png")
    assert done.returncode == 2 and "REF=none" in done.stderr and not calls


def test_another_number_of_images_is_a_variable_and_not_a_flag(environment):
    done, calls = run("eval", environment, "--num-fid-samples", "5")
    assert done.returncode == 2 and "NUM_FID_SAMPLES=N" in done.stderr and not calls
    done, calls = run("eval", {**environment, "NUM_FID_SAMPLES": "5"})
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line) for line in calls]
    assert any("--num-fid-samples 5" in line for line in lines) and any("--num-images 5" in line for line in lines)


def test_evaluation_samples_and_measures_as_table_6(environment, tmp_path):
    done, calls = run("eval", environment, "--global-seed", "5")
    assert done.returncode == 0, done.stderr
    measured = ["calc", "evaluator", "clip_score"]
    checks, calls = calls[:5], calls[5:]
    assert programs(checks) == ["score", "ref", *measured]
    assert all(line[-1] == "--check-only" for line in checks if line is not checks[1])
    assert programs(calls) == ["generate_t2i", *measured, "generate_t2i", "check"]
    sampled = parse_flags(TextGenerateConfig, calls[0][1:])
    assert sampled.num_fid_samples == 40192
    assert sampled.mode in (None, "sde") and sampled.num_steps in (None, 250)
    assert (sampled.compile, sampled.dtype, sampled.vae_dtype) == (True, "bf16", "bf16")
    assert (sampled.cfg_scale, sampled.global_seed, sampled.prompts) == (2.0, 5, [str(tmp_path / "val.json")])
    npz, images = str(tmp_path / "samples/coco/NAME.npz"), str(tmp_path / "val/images")
    (_, ref), (_, calc) = (parse_commands(METRICS, line[1:]) for line in (checks[1], calls[1]))
    assert (ref.data, ref.dest, calc.ref) == (images, str(tmp_path / "val.pkl"), str(tmp_path / "val.pkl"))
    assert (calc.images, calc.num, calc.metrics) == (npz, 40192, "fid,fd_dinov2")
    suite = parse_flags(EvaluatorFlags, calls[2][1:])
    assert (suite.reference, suite.samples, suite.splits) == (images, npz, 10)
    assert parse_flags(ClipFlags, calls[3][1:]).samples == npz
    written = [line[line.index("--json") + 1] for line in calls[1:4]]
    assert [name.rpartition("NAME")[2] for name in written] == ["-coco.json", "-adm.json", "-clip.json"]
    shown = parse_flags(TextGenerateConfig, calls[4][1:])
    assert (shown.prompts, shown.format) == ([str(tmp_path / "metadata.jsonl")], "png")
    _, checked = parse_commands({"check": CheckFlags}, calls[5][1:])
    assert checked.samples.rstrip("/") == str(tmp_path / "samples/geneval/NAME")


def test_a_reference_that_exists_is_used(environment, tmp_path):
    (tmp_path / "own.npz").touch()
    (tmp_path / "w.pth").touch()
    own = {"REF": str(tmp_path / "own.npz"), "INCEPTION_WEIGHTS": str(tmp_path / "w.pth"), "GENEVAL": ""}
    done, calls = run("eval", {**environment, **own, "DINOV2_WEIGHTS": str(tmp_path / "w.pth")})
    assert done.returncode == 0, done.stderr
    measured = ["calc", "evaluator", "clip_score"]
    assert programs(calls) == [*measured, "generate_t2i", *measured]
    _, calc = parse_commands(METRICS, calls[4][1:])
    assert calc.dinov2_weights == str(tmp_path / "w.pth")
    for arguments in (calc, parse_flags(EvaluatorFlags, calls[5][1:])):
        assert arguments.inception_weights == str(tmp_path / "w.pth")


@pytest.mark.parametrize("program", ["calc", "evaluator", "clip_score", "geneval"])
def test_what_measuring_lacks_ends_it_before_anything_is_sampled(environment, program):
    done, calls = run("eval", {**environment, "FAILS": program})
    assert done.returncode == 2
    assert calls[-1][-1] == "--check-only" and "generate_t2i" not in programs(calls)


def test_sampling_alone(environment):
    done, calls = run("eval", {**environment, "REF": "none", "VAL_IMAGES": "/nowhere", "GENEVAL": ""})
    assert done.returncode == 0, done.stderr
    assert programs(calls) == ["generate_t2i"]


@pytest.mark.parametrize("name", ["CKPT", "VAL_JSON", "VAL_IMAGES", "INCEPTION_WEIGHTS", "DINOV2_WEIGHTS", "GENEVAL"])
def test_a_missing_file_is_named_before_anything_is_sampled(environment, name):
    done, calls = run("eval", {**environment, name: "/nowhere"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} /nowhere does not exist") and len(done.stderr.splitlines()) == 1
    assert calls == []
