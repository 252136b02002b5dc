"""Ranges of flags: every number of every program has bounds, and a value beyond them ends in one line."""

import ast
import dataclasses
import math

import pytest
import tiny

import generate
import generate_t2i
import train
import train_dmf
import train_t2i
from common.errors import InputError
from common.flags import LARGEST, Range, flag, parse_flags, shown
from digits import train_vae
from evaluations import calculate_metrics, clip_score, count_flops, evaluator, feature_distance, geneval, sweep
from models import export
from preprocessing.dataset_tools import COMMANDS

PROGRAMS = [train.TrainConfig, train_dmf.FlowMapConfig, train_t2i.TextTrainConfig, generate.GenerateConfig]
PROGRAMS += [
    generate_t2i.TextGenerateConfig,
    train_vae.VaeFlags,
    export.ExportFlags,
    *(cls for cls, _ in COMMANDS.values()),
]
PROGRAMS += [evaluator.EvaluatorFlags, clip_score.ClipFlags, count_flops.FlopsFlags, feature_distance.DistanceFlags]
PROGRAMS += [sweep.SweepFlags, calculate_metrics.CalcFlags, calculate_metrics.RefFlags, geneval.ScoreFlags]


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
