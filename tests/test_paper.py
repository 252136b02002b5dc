"""docs/paper.md is what evaluations/paper.py writes, and its commands train what the rows of the papers' tables say."""

import functools
import json
import os
import re
import subprocess

import pytest
import tiny
import torch

import train
import train_dmf
import training.run
from common.errors import InputError
from common.flags import parse_flags
from evaluations import paper
from evaluations.published import CONFIGS, PUBLISHED, STEPS_PER_EPOCH
from models import create_model, model_config
from models.flops import Flops
from training.settings import settings

COMMANDS = {}
for published in PUBLISHED:
    COMMANDS.setdefault(paper.training_command(published), []).append(published)
ROUNDED_UP = {507: 506, 547: 546}  # millions in Table 8 that are not rounded down


def test_all_rows_are_there():
    counts = {table: sum(row.table == table for row in PUBLISHED) for table in paper.ABOUT}
    assert counts == {"2": 12, "3": 13, "4": 5, "5": 6, "6": 4, "7a": 5, "7b": 5, "7c": 8, "8": 20, "2d": 3, "DMF": 7}
    assert sum(counts.values()) == len(PUBLISHED)
    totals = [sum(row.numbers.get(name, 0) for row in PUBLISHED) for name in ("fid", "sfid", "inception_score")]
    assert totals == pytest.approx([1253.78, 186.27, 5335.5])


def without_cost(page):
    """Cells of the page's lines, without GFLOP and hours."""
    return [[cell for i, cell in enumerate(line.split(" | ")) if i not in (3, 4)] for line in page.splitlines()]


def test_the_page_is_up_to_date_but_for_the_cost(monkeypatch):
    monkeypatch.setattr(paper, "flops_per_image", lambda config, options: 1)  # counting takes a second a model
    page = paper.PAGE.read_text()
    assert without_cost(page) == without_cost(paper.render(page)), "run python -m evaluations.paper"
    assert "Table 7a as it is read here" in page.partition(paper.MARK)[0]


@pytest.mark.slow
def test_the_page_is_up_to_date():
    page = paper.PAGE.read_text()
    assert page == paper.render(page), "run python -m evaluations.paper"


def test_help_leaves_the_page_alone(monkeypatch, capsys):
    monkeypatch.setattr(paper, "write_atomically", lambda *_: pytest.fail("the page is written"))
    with pytest.raises(SystemExit) as ended:
        paper.main(["--help"])
    assert ended.value.code == 0 and "python -m evaluations.paper" in capsys.readouterr().out
    with pytest.raises(InputError, match="--out is unknown"):
        paper.main(["--out"])


def test_hours_by_hand():
    """SiT-B/2: 22.96 G multiply-adds, three passes, 400,000 steps of 256 images on 35 % of 989 TFLOP/s."""
    (row,) = (row for row in PUBLISHED if row.table == "7a" and row.config.model == "SiT-B/2")
    flops = 3 * 2 * 22.956e9
    *_, steps, per_image, hours, published, here, _ = paper.cells(row, {"fid": 1})
    assert (steps, per_image, published, here) == ("400,000 (80)", f"{flops / 1e9:.0f}", "34.4", "")
    assert float(hours) == pytest.approx(flops * 400_000 * 256 / (0.35 * 989e12) / 3600, abs=0.5)


def test_measuring_commands_take_the_rows_checkpoint():
    for row in PUBLISHED:
        command = paper.measuring_command(row)
        if row.table == "2d":
            assert f"/{row.config.exp_name}/checkpoints/{row.steps:07d}.pt" in command
            continue
        recipe = (tiny.ROOT / re.search(r"script/\S+", command)[0]).read_text()
        own = re.search(r"LAST_STEP=(\$\{LAST_STEP:-)?(\d+)", recipe)
        given = re.search(r"LAST_STEP=(\d+)", command)
        assert own[1]
        assert int(given[1] if given else own[2]) == row.steps


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """Folder of a python that prints its arguments."""
    folder = tmp_path_factory.mktemp("bin")
    stub = folder / "python"
    stub.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    return folder


@functools.cache
def shared_model(name, options):
    return create_model(name, **json.loads(options))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_training_command_trains_its_rows(command, stubs, tmp_path, monkeypatch, capsys):
    words = dry_run(command, COMMANDS[command][0], stubs, tmp_path, monkeypatch)
    printed = capsys.readouterr().out.replace("-from-scratch", "")
    steps, epochs = re.search(r", ([\d,]+) steps = ([\d.]+) epochs", printed).groups()
    parameters = int(re.search(r" ([\d,]+) parameters", printed)[1].replace(",", ""))
    for row in COMMANDS[command]:
        config = parse_flags(CONFIGS[row.kind], words).resolve()
        options = model_config(config.model, **config.model_flags())
        assert settings(config, options) == settings(row.config, row.options)
        assert f"/{row.config.exp_name}\n" in printed and f"\nmodel: {row.config.model}, " in printed
        assert int(steps.replace(",", "")) == row.steps
        assert row.kind == "text" or float(epochs) == pytest.approx(row.steps / STEPS_PER_EPOCH, rel=0.002)
        assert row.size is None or parameters // 1_000_000 == ROUNDED_UP.get(row.size[0], row.size[0])


def dry_run(command, row, stubs, tmp_path, monkeypatch):
    """Run what a recipe starts in this process, without data, and a flow map without a model to start from.

    Returns the flags. Nothing is counted, and models of the same configuration are made once.
    """
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program, *words = re.search(r"train\w*\.py.*", done.stdout, re.DOTALL)[0].splitlines()
    assert program == {"flow": "train.py", "flow map": "train_dmf.py", "text": "train_t2i.py"}[row.kind]
    given = [*words, "--dry-run", "--data-dir", str(tmp_path / "none"), "--resolution", str(row.config.resolution)]
    if row.kind == "flow map":
        at = given.index("--init-from")
        given[at : at + 2] = ["--from-scratch"]
    monkeypatch.setattr(training.run, "count_flops", lambda model: Flops(0, 0))
    monkeypatch.setattr(training.run, "create_model", lambda name, **options: shared_model(name, json.dumps(options)))
    with tiny.fresh_accelerate(), torch.device("meta"):
        (train_dmf if row.kind == "flow map" else train).train(parse_flags(CONFIGS[row.kind], given))
    return words
