"""Checkpoints are written in a thread: training continues, and a file holds the state of its own step."""

import contextlib
import os
import signal
import threading
import time

import pytest
import tiny
import torch

import train
from common.errors import EXIT_STOPPED, InputError
from training import checkpoint
from training.checkpoint import CheckpointWriter, checkpoint_path, existing_steps, on_host, save_checkpoint


class Log:
    """The two methods of RunLog that the writer needs."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    @contextlib.contextmanager
    def reporting_disk_errors(self, path, fatal):
        try:
            yield
        except OSError as error:
            if fatal:
                raise InputError(str(error)) from None
            self.say(f"warning: {error}")


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def at_call(number, act, objective=train.objective):
    """train.objective that also calls act() in the call of that number."""
    calls = iter(range(1, 100))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            act()
        return objective(*args, **kwargs)

    return wrapped


def test_training_goes_on_while_the_state_of_an_earlier_step_is_written(data, tmp_path, monkeypatch):
    """The write of step 2 ends only once step 4 has begun, and the write of step 4 begins only after that."""
    step_4, under_way, most = threading.Event(), [], []

    def slow(path, **content):
        under_way.append(path)
        most.append(len(under_way))
        assert step_4.wait(60), "training waits for the writer"
        save_checkpoint(path, **content)
        under_way.remove(path)

    whole = tiny.run_train(data, tmp_path / "whole", checkpointing_steps=2)
    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(train, "objective", at_call(4, step_4.set))
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=2)
    assert most == [1, 1]
    for step in (2, 4):
        found, expected = (tiny.load(checkpoint_path(run, step)) for run in (run_dir, whole))
        assert found.keys() == expected.keys()
        for entry in ("model", "ema", "opt", "steps", "train_state", "data"):
            assert not tiny.differences(found[entry], expected[entry]), entry


def test_a_stop_waits_for_its_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a, **b: (time.sleep(0.3), save_checkpoint(*a, **b)))
    monkeypatch.setattr(train, "objective", at_call(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as caught:
        tiny.run_train(data, tmp_path, checkpointing_steps=100)
    assert caught.value.code == EXIT_STOPPED
    assert tiny.load(checkpoint_path(tmp_path / "run", 2))["steps"] == 2


@pytest.mark.parametrize("place", ["check", "save", "end"])
def test_an_error_of_the_thread_is_raised_in_the_loop(tmp_path, monkeypatch, place):
    def fail(path, **content):
        raise OSError(f"no room for {path}")

    monkeypatch.setattr(checkpoint, "save_checkpoint", fail)
    log = Log()
    writer = CheckpointWriter(tmp_path, 2, log)
    writer.save(2, False, {})
    writer.check(wait=True)
    assert [line.split(" for ")[0] for line in log.said] == ["warning: no room"]
    writer.save(3, True, {})
    with pytest.raises(InputError, match=r"no room for .*0000003.pt"):
        if place == "save":
            writer.save(4, False, {})
        while True:
            writer.check(wait=place == "end")
    assert existing_steps(tmp_path) == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_on_the_host_stays_as_it_was(device):
    weight = torch.arange(6.0, device=device).view(2, 3).t()
    content = {"model": {"weight": weight}, "steps": 3, "groups": [{"lr": 0.1}]}
    copy = on_host(content)
    if device == "cuda":
        torch.cuda.synchronize()
        assert copy["model"]["weight"].is_pinned()
    before, stride = weight.tolist(), weight.stride()
    weight.zero_()
    found = copy["model"].pop("weight")
    assert (found.tolist(), found.stride(), found.device.type) == (before, stride, "cpu")
    assert copy == {"model": {}, "steps": 3, "groups": [{"lr": 0.1}]}
