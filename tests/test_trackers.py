"""Trackers are set back with a resumed run, and what they need is noticed before the run begins."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import tiny

import train
from common.errors import InputError
from training.config import TrainConfig
from training.trackers import folder_of, wandb_id


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def set_back(data, folder, tracker):
    """A run of five steps, resumed from step 2 and going to step 4; returns its folder."""
    shared = {"report_to": tracker, "checkpointing_steps": 2}
    tiny.run_train(data, folder, max_train_steps=5, **shared)
    return tiny.run_train(data, folder, max_train_steps=4, resume=2, **shared)


def test_tensorboard_has_each_step_once(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = set_back(data, tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(run_dir / "logs/deepflow")).Reload()
    for name in ("loss", "images_per_s"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in tiny.log_lines(run_dir)]


def test_an_absolute_folder_has_one_for_each_run():
    of = {"output_dir": "exps", "exp_name": "a"}
    assert folder_of(TrainConfig(**of)) == Path("exps/a/logs")
    assert folder_of(TrainConfig(**of, logging_dir="/scratch/tb")) == Path("/scratch/tb/a")


class FakeRun:
    """What training uses of a run of W&B."""

    def __init__(self, server, starting_step):
        self.server, self.starting_step, self.config = server, starting_step, {}

    def log(self, values, step):
        assert step >= self.starting_step and values["loss"] > 0
        self.server.steps.append(step)

    def finish(self, exit_code=0):
        self.server.ends.append(exit_code)


class FakeWandb(types.ModuleType):
    """W&B with a server of its own, which has the history of one run."""

    class Error(Exception):
        pass

    def __init__(self, can_rewind=True, logged_in=True):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.can_rewind, self.logged_in = can_rewind, logged_in
        self.steps, self.ends, self.starts = [], [], []

    def login(self):
        if not self.logged_in:
            raise self.Error("No API key configured.\nUse `wandb login`.")

    def init(self, resume_from=None, **options):
        if resume_from and not self.can_rewind:
            raise self.Error("rewinding is not enabled")
        self.starts.append({**options, "resume_from": resume_from})
        if resume_from:
            last = int(resume_from.split("?_step=")[1])
            self.steps = [step for step in self.steps if step <= last]
        return FakeRun(self, max(self.steps, default=-1) + 1)


@pytest.fixture
def wandb(monkeypatch):
    """A function that puts a FakeWandb in the place of the module."""
    monkeypatch.delenv("WANDB_MODE")

    def install(**options):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(**options))
        return sys.modules["wandb"]

    return install


def test_wandb_is_set_back(data, tmp_path, wandb):
    server = wandb()
    run_dir = set_back(data, tmp_path, "wandb")
    assert server.steps == [1, 2, 3, 4] and server.ends == [0, 0]
    first, second = server.starts
    shared = {"project": "deepflow", "id": "run", "name": "run", "dir": str(run_dir / "logs")}
    assert first == {**shared, "resume": "allow", "resume_from": None}
    assert second == {**shared, "resume_from": "run?_step=2"}
    assert (run_dir / "logs").is_dir()  # W&B takes a temporary folder instead of a missing one


def test_a_server_that_cannot_set_back_gets_no_step_twice(data, tmp_path, wandb, capsys):
    server = wandb(can_rewind=False)
    set_back(data, tmp_path, "wandb")
    assert server.steps == [1, 2, 3, 4, 5]
    assert "warning: W&B cannot rewind the run (rewinding is not enabled)" in capsys.readouterr().err
    tiny.run_train(data, tmp_path, resume="auto", max_train_steps=7, report_to="wandb")
    assert server.steps == [1, 2, 3, 4, 5, 6, 7]


def test_wandb_is_told_that_a_run_failed(data, tmp_path, wandb, monkeypatch):
    def fail(*args, **kwargs):
        raise InputError("--data-dir is damaged")

    server = wandb()
    monkeypatch.setattr(train, "objective", fail)
    with pytest.raises(InputError, match="damaged"):
        tiny.run_train(data, tmp_path, report_to="wandb")
    assert server.ends == [1]


def test_a_missing_login_is_noticed_before_data_are_opened(tmp_path, wandb):
    server = wandb(logged_in=False)
    with pytest.raises(InputError, match=r"^--report-to wandb: No API key configured\.; run wandb login, ") as caught:
        tiny.run_train(tmp_path / "nowhere", tmp_path / "exps", report_to="wandb")
    assert "\n" not in str(caught.value) and not server.starts
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, tracker):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else find(name, *rest))
    with pytest.raises(InputError, match=rf"--report-to {tracker} .*pip install {tracker}"):
        tiny.run_train(tmp_path / "nowhere", tmp_path / "exps", report_to=tracker)


def test_ids_have_allowed_characters_and_differ_where_names_do():
    assert wandb_id("deepflow-b-2t_lr0.1") == "deepflow-b-2t_lr0.1"
    names = ["a b", "a?b", "a,b'c", "模型", "型模", "#", "a" * 200, "a" * 201]
    ids = [wandb_id(name) for name in names]
    assert len(set(ids)) == len(names)
    for found in ids:
        assert 0 < len(found) <= 64 and not set(found) & set(" :;,#?/'%\\") and found.isascii()


@pytest.mark.slow
def test_files_of_wandb_lie_in_the_logging_folder(data, tmp_path):
    pytest.importorskip("wandb")
    line = tiny.train_flags(data, tmp_path, report_to="wandb", max_train_steps=2, logging_dir="tracked")
    done = tiny.run_python("train.py", *line, WANDB_MODE="offline", WANDB_SILENT="true", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run/tracked/wandb").glob("offline-run-*-run")
    assert json.loads((tmp_path / "run/config.json").read_text())["report_to"] == "wandb"
    assert any(path.suffix == ".wandb" for path in folder.iterdir())
