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
from common.records import check_record
from models import create_model
from training.checkpoint import REMEDY, Checkpoint, check_same, checkpoint_path, existing_steps, find_resume, restore
from training.config import TrainConfig
from training.ema import EMA
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
    says = f"{run_dir} is complete at step 2; raise --max-train-steps or --epochs to continue"
    assert capsys.readouterr().out.splitlines()[-1] == says
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_beyond_its_end_is_complete_and_a_file_elsewhere_is_not(tmp_path, capsys):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    capsys.readouterr()
    tiny.run_train(data, tmp_path, max_train_steps=1, resume="auto")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{run_dir} is complete at step 2; raise --max-train-steps or --epochs to continue"
    copy = tmp_path / "20251128.pt"
    shutil.copyfile(checkpoint_path(run_dir, 2), copy)
    assert tiny.run_train(data, tmp_path, exp_name="other", max_train_steps=3, resume=copy)


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
    (folder / "0000003.pt").mkdir()
    (folder / "²³.pt").touch()
    assert existing_steps(tmp_path) == [2]


@pytest.mark.parametrize("wanted", ["²", "9" * 5000, "x" * 300, "a\0b", "checkpoints", "loop", ""], ids=ascii)
def test_what_cannot_be_resumed_from(tmp_path, wanted):
    (tmp_path / "loop").symlink_to("loop")
    wanted = str(tmp_path / wanted) if wanted in ("loop", "checkpoints") else wanted
    with pytest.raises(InputError, match="--resume"):
        find_resume(tmp_path, wanted)


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


def resumed_from(content, data, folder):
    """Message of the InputError that ends a run resumed from a checkpoint with this content."""
    path = folder / "another.pt"
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        tiny.run_train(data, folder / "on", resume=path, max_train_steps=3)
    message = str(caught.value)
    assert "\n" not in message and "another.pt" in message
    return message


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(data, checkpoint of step 1)."""
    folder = tmp_path_factory.mktemp("start")
    data = tiny.data_folder(folder / "data")
    return data, checkpoint_path(tiny.run_train(data, folder, max_train_steps=1), 1)


def not_restored(content):
    """Message of the InputError with which a model and its optimizer refuse this content, unchanged themselves."""
    model = create_model("DeepFlow-Ti/2", **content["config"]["model_options"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"^a\.pt.* choose a checkpoint") as caught:
        restore(check_record(Checkpoint, content, "a.pt", REMEDY), "a.pt", model, EMA(model, 0.9), optimizer, None)
    assert not tiny.differences(before, dict(model.state_dict())) and not optimizer.state
    assert "\n" not in str(caught.value)
    return str(caught.value)


OTHER_STATES = {
    "shorter": lambda state: state[3].update(exp_avg=state[3]["exp_avg"][:1].clone()),
    "transposed": lambda state: state[matrix(state)].update(exp_avg=state[matrix(state)]["exp_avg"].T.contiguous()),
    "laid out otherwise": lambda state: state[matrix(state)].update(
        exp_avg=state[matrix(state)]["exp_avg"].T.contiguous().T
    ),
    "of another type": lambda state: state[3].update(exp_avg_sq=state[3]["exp_avg_sq"].double()),
    "a number": lambda state: state[3].update(step=1.0),
    "empty": lambda state: state.clear(),
    "of one parameter empty": lambda state: state[3].clear(),
    "lacks one": lambda state: state.pop(3),
    "has one more": lambda state: state.update({9999: state[3]}),
    "lacks a part": lambda state: state[3].pop("exp_avg_sq"),
    "has a part more": lambda state: state[3].update(max_exp_avg_sq=state[3]["exp_avg"]),
    "a list": lambda state: state.update({3: [1, 2]}),
}


def matrix(state):
    """Index of the first parameter that is a non-square matrix."""
    shapes = {i: part["exp_avg"].shape for i, part in state.items()}
    return next(i for i, shape in shapes.items() if len(shape) == 2 and shape[0] != shape[1])


@pytest.mark.parametrize("change", OTHER_STATES)
def test_the_state_of_another_optimizer(start, change):
    content = tiny.load(start[1])
    OTHER_STATES[change](content["opt"]["state"])
    assert " opt" in not_restored(content)


@pytest.mark.parametrize("groups", [None, [], [{}], [{"params": "all"}], [{"params": [1, 0]}], [[1]], 5], ids=str)
def test_the_groups_of_another_optimizer(start, groups):
    content = tiny.load(start[1])
    content["opt"]["param_groups"] = groups
    assert "opt" in not_restored(content)


OTHER_WEIGHTS = {
    "final_layer.1.linear.weight": lambda tensor: tensor[:1],
    "blocks.0.attn.qkv.weight": torch.Tensor.half,
    "blocks.0.attn.qkv.bias": lambda tensor: [tensor],
}


@pytest.mark.parametrize("entry", ["model", "ema"])
@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_of_another_form(start, entry, name):
    content = tiny.load(start[1])
    content[entry][name] = OTHER_WEIGHTS[name](content[entry][name])
    assert name in not_restored(content)
    del content[entry][name]
    assert f"Missing {name}" in not_restored(content)


@pytest.mark.parametrize(
    ("entry", "key", "value"),
    [
        ("train_state", None, {}),
        ("train_state", "bad_steps", -1),
        ("train_state", "bad_steps", 10**30),
        ("train_state", "noise_block", "x"),
        ("data", "num_classes", torch.ones(2)),
        ("config", "model", 5),
        ("config", "model", "unknown"),
        ("config", "changes", 3),
        ("config", "model_options", None),
        ("config", "scale_weight", {"a": 1}),
        ("config", "scale_weight", "heavy"),
        ("config", "learning_rate", [[1]]),
        ("config", "enc_type", 3.5),
        ("config", "resolution", "large"),
        ("steps", None, 10**30),
        ("steps", None, "one"),
        ("scaler", None, 3),
    ],
    ids=str,
)
def test_entries_of_another_type(start, tmp_path, entry, key, value):
    data, path = start
    content = tiny.load(path)
    content[entry] = value if key is None else {**content[entry], key: value}
    resumed_from(content, data, tmp_path)


def test_a_scaler_of_another_form():
    found, expected = {"scale": 2.0, "_growth_tracker": 0}, {"scale": 65536.0, "_growth_tracker": 3}
    check_same(found, expected, "a.pt", "scaler")
    for other in ({"scale": 2.0}, {**found, "more": 1}, {**found, "scale": "2"}, {}):
        with pytest.raises(InputError, match=r"a\.pt .*scaler"):
            check_same(other, expected, "a.pt", "scaler")
