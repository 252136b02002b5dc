"""A resumed run equals one that was never stopped, to the bit."""

import os
import shutil

import numpy as np
import programs
import pytest
import tiny
import torch

from common.errors import InputError
from common.flags import parse_flags
from models import create_model
from training.checkpoint import checkpoint_path, existing_steps
from training.config import TrainConfig
from training.loader import SeekableSampler

RUN_LENGTH = ("resume", "max_train_steps", "output_dir", "checkpointing_steps", "rolling_steps")


def state_of(run_dir, step):
    """Content of a checkpoint without the flags that tell how far and where to a run goes."""
    content = tiny.load(checkpoint_path(run_dir, step))
    content["config"] = {key: value for key, value in content["config"].items() if key not in RUN_LENGTH}
    return content


# 20 images are five steps an epoch: all four steps in one epoch; 12: the second part crosses a border; 8: starts on one
@pytest.mark.parametrize("count", [20, 12, 8])
@pytest.mark.parametrize("resume", ["2", "latest"])
def test_two_steps_and_two_more_equal_four(tmp_path, count, resume):
    data = tiny.data_folder(tmp_path / "data", count=count)
    whole = tiny.run_train(data, tmp_path / "whole", max_train_steps=4)
    parts = tiny.run_train(data, tmp_path / "parts", max_train_steps=2)
    halfway = state_of(parts, 2)
    tiny.run_train(data, tmp_path / "parts", max_train_steps=4, resume=resume)
    assert not tiny.differences(state_of(parts, 4), state_of(whole, 4))
    for entry in ("model", "ema", "opt"):
        assert tiny.differences(halfway[entry], state_of(parts, 4)[entry]), entry


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {
            "model": "SiT-Ti/2",
            "df_idxs": "[]",
            "weighting": "lognormal",
            "path_type": "cosine",
            "adam_weight_decay": 0.1,
        },
    ],
    ids=["accumulation", "bf16", "sit"],
)
def test_other_settings_resume_to_the_bit_too(tmp_path, changes):
    data = tiny.data_folder(tmp_path / "data")
    whole = tiny.run_train(data, tmp_path / "whole", max_train_steps=4, checkpointing_steps=2, **changes)
    copy = tmp_path / "copy/run"
    shutil.copytree(whole, copy)
    tiny.run_train(data, tmp_path / "copy", max_train_steps=4, resume=2, **changes)
    assert not tiny.differences(state_of(copy, 4), state_of(whole, 4))
    assert os.stat(checkpoint_path(copy, 4)).st_mtime_ns != os.stat(checkpoint_path(whole, 4)).st_mtime_ns


def test_data_order_is_that_of_the_undisturbed_run(tmp_path):
    """Read from the outside: access to the files of one step only is enough to make that step."""
    data = tiny.data_folder(tmp_path / "data", count=12)
    tiny.run_train(data, tmp_path, max_train_steps=2)
    sampler = SeekableSampler(12, 4, seed=0)
    for index in range(12):
        if index not in sampler.batch(2):
            np.save(tiny.moments_file(data, index), np.full((8, 8, 8), np.nan, np.float32))
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=3, resume="auto")
    tiny.run_train(data, tmp_path, max_train_steps=4, resume="auto")
    skipped = {line["step"]: line["bad_steps"] for line in tiny.log_lines(run_dir)}
    assert skipped == {1: 0, 2: 0, 3: 0, 4: 1}  # step 4 is of the next epoch and reads other files


def test_optimizer_settings_are_those_of_the_flags(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    before = tiny.load(checkpoint_path(run_dir, 2))
    tiny.run_train(data, tmp_path, max_train_steps=3, resume=2, learning_rate=1e-7, adam_beta1=0.5, allow_changes=True)
    after = tiny.load(checkpoint_path(run_dir, 3))
    assert 0 < tiny.largest_difference(before["model"], after["model"]) < 1e-6
    (group,) = after["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (1e-7, (0.5, 0.999))


def test_log_has_each_step_once(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=4, checkpointing_steps=2)
    first = tiny.log_lines(run_dir)
    checkpoint_path(run_dir, 4).unlink()  # as if the run had been killed after the log line of step 4 …
    with open(run_dir / "log.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # … and in the middle of the next
    tiny.run_train(data, tmp_path, max_train_steps=5, resume="auto")
    lines = tiny.log_lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines[:4]] == [line["loss"] for line in first]


def test_bad_steps_stay_counted(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    np.save(tiny.moments_file(data, SeekableSampler(12, 4, seed=0).batch(0)[0]), np.full((8, 8, 8), np.inf, np.float32))
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=1)
    tiny.run_train(data, tmp_path, max_train_steps=3, resume="auto")
    assert [line["bad_steps"] for line in tiny.log_lines(run_dir)] == [1, 1, 1]


def test_auto_is_a_fresh_start_where_there_is_none(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    fresh = tiny.run_train(data, tmp_path / "a", resume="auto")
    assert not tiny.differences(state_of(fresh, 4), state_of(tiny.run_train(data, tmp_path / "b"), 4))


def test_latest_wants_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"--resume latest: .*run holds no checkpoint; --resume auto starts"):
        tiny.run_train(tiny.data_folder(tmp_path / "data"), tmp_path, resume="latest")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--resume", "--resume-step"])
def test_both_names_of_the_flag_are_one(flag):
    assert parse_flags(TrainConfig, ["--exp-name", "x", flag, "7"]).resume == "7"


def test_a_run_starts_from_the_state_of_another(tmp_path):
    """The same step, the same data order and draws: the same bits."""
    data = tiny.data_folder(tmp_path / "data")
    other = tiny.run_train(data, tmp_path / "other", checkpointing_steps=2)
    before = checkpoint_path(other, 2).read_bytes()
    run_dir = tiny.run_train(data, tmp_path, resume=checkpoint_path(other, 2))
    assert not tiny.differences(state_of(run_dir, 4), state_of(other, 4))
    assert existing_steps(run_dir) == [4]
    assert [line["step"] for line in tiny.log_lines(run_dir)] == [3, 4]
    assert checkpoint_path(other, 2).read_bytes() == before
    with pytest.raises(InputError, match=rf"{run_dir} already holds checkpoints up to step 4; pass --resume auto"):
        tiny.run_train(data, tmp_path, resume=checkpoint_path(other, 2))


def test_a_file_of_the_run_itself_is_a_step_of_it(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=2)
    whole = state_of(run_dir, 4)
    tiny.run_train(data, tmp_path, checkpointing_steps=2, resume=checkpoint_path(run_dir, 2))
    assert not tiny.differences(state_of(run_dir, 4), whole)
    assert (run_dir / "checkpoints/0000004.pt.abandoned").exists()


def test_a_file_that_is_not_there(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    with pytest.raises(InputError, match=r"--resume last: last does not exist; the run has steps \[\]"):
        tiny.run_train(data, tmp_path, resume="last")


def test_a_fresh_start_does_not_overwrite_a_run(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=1)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"{run_dir} already holds checkpoints up to step 1; pass --resume auto"):
        tiny.run_train(data, tmp_path)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_complete_run_is_left_as_it_is(tmp_path, capsys):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    tiny.run_train(data, tmp_path, max_train_steps=2, resume="auto")
    says = f"{run_dir} is complete at step 2; raise --max-train-steps to continue"
    assert capsys.readouterr().out.splitlines()[-1] == says
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_seed_makes_the_run(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    runs = [
        state_of(tiny.run_train(data, tmp_path / name, seed=seed), 4) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert not tiny.differences(runs[0], runs[1])
    assert tiny.largest_difference(runs[0]["model"], runs[2]["model"]) > 1e-3


def test_foreign_files_among_the_checkpoints_are_no_steps(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("0000002.pt", "0000007-copy.pt", ".0000009.pt.17.tmp", "best.pt", "0000008.json"):
        (folder / name).touch()
    assert existing_steps(tmp_path) == [2]


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path):
    data = tiny.data_folder(tmp_path / "data")

    def train(output_dir, **changes):
        flags = tiny.train_flags(data, tmp_path / output_dir, **changes)
        done = programs.run_ranks(2, tiny.ROOT / "train.py", *flags)
        assert done.returncode == 0, done.stderr
        return tmp_path / output_dir / "run"

    whole, parts = train("whole"), train("parts", max_train_steps=2)
    train("parts", resume="auto")
    assert not tiny.differences(state_of(parts, 4), state_of(whole, 4))


def test_initial_weights_follow_the_seed_alone(tmp_path):
    """ema_decay 1 keeps the first weights."""
    data = tiny.data_folder(tmp_path / "data")
    torch.rand(3)  # what the process drew before must not matter
    run_dir = tiny.run_train(data, tmp_path, ema_decay=1.0, seed=5, max_train_steps=1)
    content = tiny.load(checkpoint_path(run_dir, 1))
    torch.manual_seed(5)
    expected = create_model("DeepFlow-Ti/2", **content["config"]["model_options"]).state_dict()
    assert not tiny.differences(content["ema"], dict(expected))


def test_after_a_rollback_latest_follows_the_new_branch(tmp_path):
    """Steps of the branch that was left are set aside: neither resumed from, nor counted among the newest two."""
    data = tiny.data_folder(tmp_path / "data")
    intervals = {"checkpointing_steps": 100, "rolling_steps": 1}
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=8, **intervals)
    assert existing_steps(run_dir) == [6, 7, 8]
    tiny.run_train(data, tmp_path, max_train_steps=7, resume=6, learning_rate=1e-5, allow_changes=True, **intervals)
    assert existing_steps(run_dir) == [6, 7]
    assert (run_dir / "checkpoints/0000008.pt.abandoned").exists()
    assert tiny.load(checkpoint_path(run_dir, 7))["config"]["learning_rate"] == 1e-5
    tiny.run_train(data, tmp_path, max_train_steps=10, resume="auto", learning_rate=1e-5, **intervals)
    assert existing_steps(run_dir)[-3:] == [8, 9, 10]
    assert [line["step"] for line in tiny.log_lines(run_dir) if "loss" in line] == list(range(1, 11))
    straight = tiny.run_train(data, tmp_path / "straight", max_train_steps=10, **intervals)
    assert tiny.differences(state_of(run_dir, 10)["model"], state_of(straight, 10)["model"])
