"""SIGKILL at any moment: at most the steps since the last checkpoint are lost, and resumed runs give the same bits."""

import contextlib
import json
import random
import re
import signal
import time

import faulty_train
import programs
import pytest
import tiny

from training.checkpoint import checkpoint_path, existing_steps

KILLS = 8
LAST = 40
ROLLING = 2
FLAGS = {"max_train_steps": LAST, "rolling_steps": ROLLING, "checkpointing_steps": 10, "resume": "auto"}


def train_slowly(data, output_dir):
    """In a process of its own: train, with checkpoints that take long to write."""
    faulty_train.apply("slow-write")
    with open(output_dir / "output.txt", "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            tiny.run_train(data, output_dir, **FLAGS)


def half_written(run_dir):
    return list(run_dir.glob("checkpoints/.*.pt.*.tmp"))


def wait_until(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.002)


def check_what_is_left(run_dir, output_dir, before):
    """Every checkpoint under its name can be read, none is lost, and the log is at most two intervals ahead.

    The second one passes while the checkpoint at the end of the first is written.
    """
    steps = existing_steps(run_dir)
    for step in steps:
        assert tiny.load(checkpoint_path(run_dir, step))["steps"] == step
    assert max(steps, default=0) >= before
    if (run_dir / "config.json").exists():
        json.loads((run_dir / "config.json").read_text())
    resumed = re.findall(r"resumed from .*/(\d+)\.pt", (output_dir / "output.txt").read_text())
    assert [int(step) for step in resumed] == ([before] if before else []) or not resumed  # killed before it said so
    log = run_dir / "log.jsonl"
    logged = [json.loads(line)["step"] for line in log.read_text().splitlines()[:-1]] if log.exists() else []
    assert max(logged, default=0) <= max(steps, default=0) + 2 * ROLLING


@pytest.mark.slow
def test_kills_at_many_moments_lose_little_and_change_nothing(tmp_path):
    """Half of the kills are inside the write of a checkpoint, the others at any moment, start-up included."""
    data = tiny.data_folder(tmp_path / "data")
    whole = tiny.run_train(data, tmp_path / "whole", **FLAGS)
    output_dir, chance, inside = tmp_path / "killed", random.Random(0), 0
    run_dir = output_dir / "run"
    output_dir.mkdir()
    for kill in range(KILLS):
        before = max(existing_steps(run_dir), default=0)
        known = set(half_written(run_dir))
        (output_dir / "output.txt").write_text("")
        process = programs.server().Process(target=train_slowly, args=(data, output_dir))
        process.start()
        wanted = before + ROLLING * chance.choice((0, 1))  # some get on by a checkpoint, others by nothing
        wait_until(lambda wanted=wanted: max(existing_steps(run_dir), default=0) >= wanted, process)
        if kill % 2:
            wait_until(lambda known=known: set(half_written(run_dir)) - known, process)
        time.sleep(chance.uniform(0, 0.1 if kill % 2 else 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (output_dir / "output.txt").read_text()
        inside += len(set(half_written(run_dir)) - known)
        check_what_is_left(run_dir, output_dir, before)
    assert inside >= 2
    assert 0 < max(existing_steps(run_dir)) < LAST
    tiny.run_train(data, output_dir, **FLAGS)
    assert not half_written(run_dir)
    assert existing_steps(run_dir) == existing_steps(whole)
    for entry in ("model", "ema", "opt", "train_state"):
        a, b = (tiny.load(checkpoint_path(run, LAST))[entry] for run in (whole, run_dir))
        assert not tiny.differences(a, b), entry
    assert [line["step"] for line in tiny.log_lines(run_dir)] == list(range(1, LAST + 1))
