"""Ranges of flags: every number of every program has bounds, and a value beyond them ends in one line."""

import ast
import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import generate
import generate_t2i
import studies.run
import train
import train_dmf
import train_t2i
from benchmarks import steps
from common import precision
from common.errors import InputError
from common.flags import LARGEST, Range, flag, parse_flags, shown
from digits import gallery, report, train_vae
from evaluations import (
    calculate_metrics,
    clip_score,
    count_flops,
    evaluator,
    feature_distance,
    geneval,
    probe,
    sweep,
    table,
    watch,
)
from evaluations.metrics import precision_recall
from models import attention, deepflow, encoders, export, mmdit, paths
from models.flags import ENCODERS
from preprocessing import convert, transforms
from preprocessing.dataset_tools import COMMANDS
from samplers import SAMPLERS
from studies import features, train_judge
from studies import report as cifar10_report
from training import plot

PROGRAMS = [train.TrainConfig, train_dmf.FlowMapConfig, train_t2i.TextTrainConfig, generate.GenerateConfig]
PROGRAMS += [
    generate_t2i.TextGenerateConfig,
    train_vae.VaeFlags,
    gallery.GalleryFlags,
    export.ExportFlags,
    *(cls for cls, _ in COMMANDS.values()),
]
PROGRAMS += [evaluator.EvaluatorFlags, clip_score.ClipFlags, count_flops.FlopsFlags, feature_distance.DistanceFlags]
PROGRAMS += [
    sweep.SweepFlags,
    probe.ProbeFlags,
    watch.WatchFlags,
    train_judge.JudgeFlags,
    features.JudgeFeatureFlags,
    calculate_metrics.CalcFlags,
    calculate_metrics.RefFlags,
    geneval.ScoreFlags,
]
PROGRAMS += [plot.PlotFlags, table.TableFlags, studies.run.StudyFlags]


@dataclasses.dataclass
class Flags:
    count: int = flag(1, "", range=Range(low=1))
    any: int = flag(1, "")
    rate: float = flag(0.5, "")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda cls: cls.__name__)
def test_every_number_has_bounds(program):
    for field in dataclasses.fields(program):
        allowed = field.metadata["range"]
        if field.metadata["kind"] is int:
            assert math.isfinite(allowed.low) and allowed.high < 2**63, field.name
        if field.metadata["kind"] in (int, float):
            assert math.nan not in allowed and math.inf not in allowed
        if "workers" in field.name:
            assert allowed.high <= 1024
        if "seed" in field.name:
            assert 2**62 in allowed and 2**63 not in allowed


@pytest.mark.parametrize("program", [plot.PlotFlags, table.TableFlags, studies.run.StudyFlags, export.ExportFlags])
def test_every_flag_has_a_heading_in_the_help(program):
    fields = (field for field in dataclasses.fields(program) if not field.metadata.get("positional"))
    assert not [field.name for field in fields if field.metadata["group"] is None]


@pytest.mark.parametrize("text", ["0", "-1", str(LARGEST + 1), "1" + 20 * "0"])
def test_a_count_beyond_its_range_is_named_with_it(text):
    with pytest.raises(InputError, match=rf"--count {text} is out of range; .* 1 and at most {LARGEST}"):
        parse_flags(Flags, ["--count", text])


@pytest.mark.parametrize(("name", "text"), [("any", "-1" + 20 * "0"), ("rate", "nan"), ("rate", "1e999")])
def test_numbers_without_a_range_of_their_own_are_finite(name, text):
    with pytest.raises(InputError, match=rf"{shown(name)} .* is out of range"):
        parse_flags(Flags, [f"--{name}={text}"])


@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "a\\b", "a:b", ".hidden", "..", "a\nb", "a\x00b", "\udcff"])
def test_a_name_of_a_run_is_that_of_one_folder(tmp_path, name):
    with pytest.raises(InputError, match="--exp-name"):
        tiny.run_train(tmp_path, tmp_path / "exps", exp_name=name)
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize("name", ["run", "dmft-xl_2", "Lauf über 3 Tage", "a.b", "-x="])
def test_other_names_are_taken(name):
    train.TrainConfig(exp_name=name).check()


def test_no_program_needs_its_docstring_or_an_assertion():
    """python -OO has neither."""
    files = [*tiny.ROOT.glob("*.py"), *(path for room in tiny.ROOT.glob("*/") for path in room.rglob("*.py"))]
    rooms = {"tests", "benchmarks", ".venv"}
    for path in (path for path in files if not rooms.intersection(path.relative_to(tiny.ROOT).parts)):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            of_doc = isinstance(node, ast.Attribute | ast.Subscript) and ast.unparse(node.value).endswith("__doc__")
            assert not of_doc, f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------------- before torch

ROOMS = ("training", "preprocessing", "evaluations", "digits", "models", "studies")
HEAVY = "torch torchvision scipy sklearn matplotlib diffusers accelerate timm transformers safetensors".split()
ANSWER = """
import runpy, sys
for words in {commands}:
    sys.argv = words
    try:
        run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
        run(words[0], run_name="__main__")
    except SystemExit as end:
        print("ends:", *words, end.code, *sys.modules.keys() & set({heavy}))
"""


def answers(commands):
    """What each command ends with: words, exit code, slow packages imported so far; and the lines of all errors."""
    code = ANSWER.format(commands=commands, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny.ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall("^ends: (.*)$", done.stdout, re.MULTILINE), done.stderr.splitlines()


def programs():
    """Every program with flags of its own, as python starts it."""
    files = [*tiny.ROOT.glob("*.py"), *(path for room in ROOMS for path in (tiny.ROOT / room).glob("*.py"))]
    parsing = re.compile(r"^    (.* = parse_(flags|commands)|parse_early)\(", re.MULTILINE)
    files = [path.relative_to(tiny.ROOT) for path in files if parsing.search(path.read_text("utf-8"))]
    return [str(path) if path.parent == Path() else ".".join(path.with_suffix("").parts) for path in sorted(files)]


def test_help_is_printed_before_slow_packages_are_imported():
    names = programs()
    assert {"train.py", "generate_t2i.py", "evaluations.evaluator", "training.plot", "studies.run"} < {*names}
    lines, _ = answers([[name, "--help"] for name in names])
    assert lines == [f"{name} --help 0" for name in names]


def test_mistakes_are_answered_before_slow_packages_are_imported():
    commands = [["train.py", "--weighting", "log-normal"], ["generate.py", "--ckpt", "x", "--num_step", "3"]]
    commands += [["train_t2i.py", "--seed", "x"], ["evaluations.table"], ["preprocessing.dataset_tools", "convrt"]]
    lines, errors = answers(commands)
    assert lines == [" ".join([*words, "2"]) for words in commands]
    expected = ["mean lognormal", "mean --num-steps", "--seed x", "required: results", "mean convert"]
    for part, line in zip(expected, errors, strict=True):
        assert line.startswith("error: ") and part in line


def declared(cls, name):
    """What a flag is declared with: help, choices, …"""
    return next(field for field in dataclasses.fields(cls) if field.name == name).metadata


def choices(cls, name):
    return {*declared(cls, name)["choices"]}


def test_flags_name_what_there_is():
    """They say it in their own words, as the tables import torch."""
    generating, training, mapping = generate.GenerateConfig, train.TrainConfig, train_dmf.FlowMapConfig
    assert choices(generating, "mode") == SAMPLERS.keys() - {"ode-heun"}
    assert choices(generating, "path_type") == choices(training, "path_type") == {*paths.PATHS}
    assert choices(mapping, "attn_func") == {"auto", "base", "torch_sdpa", *attention.FLASH_PACKAGES}
    assert choices(train_t2i.TextTrainConfig, "init") == {*mmdit.INITIALISATIONS}
    assert choices(evaluator.EvaluatorFlags, "precision") == {*precision_recall.PRECISIONS}
    converting, encoding = (COMMANDS[name][0] for name in ("convert", "encode"))
    assert choices(converting, "transform") == {*transforms.TRANSFORMS}
    assert choices(converting, "format") == {*convert.FORMATS}
    for cls, name in ((generating, "dtype"), (generating, "vae_dtype"), (encoding, "dtype")):
        assert choices(cls, name) == {*precision.DTYPES}
    vera = declared(training, "vera")["help"]
    assert all(step in vera for step in deepflow.VERA_STEPS)
    families = re.findall(r"([\w-]+)(?:\{([\w,]+)\})?", re.sub(r", ", " ", ENCODERS))
    assert {stem + size for stem, sizes in families for size in sizes.split(",")} == {*encoders.ENCODERS}


def test_defaults_of_samplers_are_those_of_the_help():
    words = next(field for field in dataclasses.fields(generate.GenerateConfig) if field.name == "num_steps").metadata[
        "help"
    ]
    for name, sampler in SAMPLERS.items():
        assert name == "ode-heun" or f"{sampler.num_steps} for {name}" in words


@pytest.mark.parametrize(
    ("cls", "words", "name", "value"),
    [
        (calculate_metrics.CalcFlags, "--images a --ref b --num-fid-samples 7", "num", 7),
        (calculate_metrics.CalcFlags, "--images a --ref b --num-samples 7", "num", 7),
        (report.ReportFlags, "--samples a --json b.json", "out", "b.json"),
        (cifar10_report.ReportFlags, "--samples a --json b.json", "out", "b.json"),
        (steps.StepFlags, "--mixed-precision no", "precision", "no"),
        (feature_distance.DistanceFlags, "--ckpt a --num-samples 7", "num_samples", 7),
        (generate.GenerateConfig, "--ckpt a --seed 3 --batch-size 8", "global_seed", 3),
        (train.TrainConfig, "--global-seed 3 --workers 2", "seed", 3),
    ],
)
def test_a_thing_has_the_name_that_other_programs_have_for_it(cls, words, name, value):
    assert getattr(parse_flags(cls, words.split()), name) == value


PROGRAM = """import dataclasses
from common.errors import exit_on_input_error
from common.flags import flag, parse_flags

@dataclasses.dataclass
class Flags:
    steps: int = flag(1, "steps")

with exit_on_input_error():
    print(parse_flags(Flags))
"""


def test_a_program_of_another_checkout_does_not_run_with_these_modules(tmp_path):
    for name, text in {"common/flags.py": "", "evaluations/program.py": PROGRAM, "tools/program.py": PROGRAM}.items():
        path = tmp_path / ("other" if name != "tools/program.py" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = tiny.run_python(tmp_path / "other/evaluations/program.py")
    assert done.returncode == 2 and str(tmp_path / "other") in done.stderr and "pip install -e" in done.stderr
    assert tiny.run_python(tmp_path / "tools/program.py").returncode == 0
