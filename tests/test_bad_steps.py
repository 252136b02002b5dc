"""Steps whose loss or gradients are not finite: skipped to the bit, by all processes alike, without any waiting."""

import numpy as np
import programs
import pytest
import tiny
import torch
from faulty_train import infinite_gradient, infinite_loss, injected
from torch.utils._python_dispatch import TorchDispatchMode

import train
import training.run
from common.errors import InputError
from training.checkpoint import existing_steps
from training.loader import SeekableSampler
from training.trainer import BadSteps, Trainer

STATE = ("model", "ema", "opt")


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def checkpoints(run_dir, *steps):
    return [tiny.load(run_dir / f"checkpoints/{step:07d}.pt") for step in steps]


def poison(data, indices):
    """Put an infinity into the moments of the given images."""
    for index in indices:
        path = tiny.moments_file(data, index)
        moments = np.load(path)
        moments[0, 0, 0] = np.inf
        np.save(path, moments)


def test_a_step_with_an_infinite_latent_is_skipped_and_counted(data, tmp_path, capsys):
    poison(data, [SeekableSampler(12, 4, seed=0).batch(1)[2]])
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=1, max_train_steps=3, ema_decay=0.9)
    first, second, third = (tiny.load(run_dir / f"checkpoints/{step:07d}.pt") for step in (1, 2, 3))
    for entry in ("model", "ema", "opt"):
        assert not tiny.differences(first[entry], second[entry]), entry
        assert tiny.differences(second[entry], third[entry]), entry
    assert [line["bad_steps"] for line in tiny.log_lines(run_dir)] == [0, 1, 1]
    assert third["train_state"]["bad_steps"] == 1
    assert "warning: skipped, as loss or gradients were not finite: 1 of the steps up to 2" in capsys.readouterr().out


def test_a_skipped_step_enters_no_mean_of_the_log(data, tmp_path):
    poison(data, [SeekableSampler(12, 4, seed=0).batch(1)[2]])
    each = tiny.log_lines(tiny.run_train(data, tmp_path / "each", max_train_steps=3))
    (line,) = tiny.log_lines(tiny.run_train(data, tmp_path / "all", max_train_steps=3, log_every=3))
    assert [("loss" in record) for record in each] == [True, False, True]
    assert line["loss"] == pytest.approx((each[0]["loss"] + each[2]["loss"]) / 2, rel=1e-6)
    assert line["grad_norm"] == pytest.approx((each[0]["grad_norm"] + each[2]["grad_norm"]) / 2, rel=1e-6)


def test_an_infinite_micro_batch_skips_the_whole_step(data, tmp_path):
    poison(data, [SeekableSampler(12, 4, seed=0).batch(1)[0]])
    flags = {"checkpointing_steps": 1, "max_train_steps": 2, "gradient_accumulation_steps": 4}
    run_dir = tiny.run_train(data, tmp_path, **flags)
    assert not tiny.differences(*(content["model"] for content in checkpoints(run_dir, 1, 2)))
    assert checkpoints(run_dir, 2)[0]["train_state"]["bad_steps"] == 1


def test_persistent_infinities_end_the_run_and_keep_its_checkpoints(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    before = (run_dir / "checkpoints/0000002.pt").read_bytes()
    poison(data, range(12))
    with pytest.raises(
        InputError, match=r"not finite for 20 steps in a row, up to step 22; the last good .*0000002.pt"
    ):
        tiny.run_train(data, tmp_path, max_train_steps=50, resume="auto")
    assert existing_steps(run_dir) == [2]
    assert (run_dir / "checkpoints/0000002.pt").read_bytes() == before
    assert tiny.log_lines(run_dir)[-1]["bad_steps"] == 20


@pytest.mark.parametrize("inject", [infinite_loss, infinite_gradient])
@pytest.mark.parametrize("at_call", [1, 2])
def test_an_injected_infinity_changes_no_bit(data, tmp_path, monkeypatch, inject, at_call):
    """at_call 1: even the very first step, where the optimizer has no state yet, leaves zeros."""
    monkeypatch.setattr(train, "objective", injected(inject, at_call))
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=1, max_train_steps=3, ema_decay=0.9)
    contents = checkpoints(run_dir, 1, 2, 3)
    if at_call == 2:
        for entry in STATE:
            assert not tiny.differences(contents[0][entry], contents[1][entry]), entry
            assert tiny.differences(contents[1][entry], contents[2][entry]), entry
    else:
        states = contents[0]["opt"]["state"].values()
        assert all(not tensor.any() for state in states for tensor in state.values())
        assert not tiny.differences(contents[0]["model"], contents[0]["ema"])
    assert [line["bad_steps"] for line in tiny.log_lines(run_dir)] == [at_call == 1, 1, 1]


def test_a_run_with_a_bad_step_equals_one_that_never_had_its_batch(data, tmp_path, monkeypatch):
    """Step 2 is bad; steps 1 and 3 from the same states give what the run gives that is resumed around it."""
    monkeypatch.setattr(train, "objective", injected(infinite_loss))
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=1, max_train_steps=3)
    monkeypatch.undo()
    first, third = checkpoints(run_dir, 1, 3)
    first["steps"] = 2  # goes on with the third batch
    torch.save(first, tmp_path / "skipped.pt")
    around = tiny.run_train(data, tmp_path / "around", max_train_steps=3, resume=tmp_path / "skipped.pt")
    for entry in STATE:
        assert not tiny.differences(checkpoints(around, 3)[0][entry], third[entry]), entry


class CountReads(TorchDispatchMode):
    """Counts the operations by which the host reads a value, for which it would wait on a GPU."""

    READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.READS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_between_logs(data, tmp_path, monkeypatch):
    counts = []  # reads so far, before and after after_step of each step

    def after_step(self, *args, original=Trainer.after_step):
        counts.append(len(mode.found))
        original(self, *args)
        counts.append(len(mode.found))

    def counted(name):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self: mode.found.append(name) or original(self))

    counted("tolist")  # these read a CPU tensor's memory without an operation
    counted("cpu")
    monkeypatch.setattr(Trainer, "after_step", after_step)
    with CountReads() as mode:
        tiny.run_train(data, tmp_path, max_train_steps=5, log_every=3, gradient_accumulation_steps=2)
    in_steps = np.diff(counts)[1::2]
    assert in_steps.tolist() == [0] * 4  # from the end of one step to that of the next
    after_steps = np.diff(counts)[::2] > 0
    assert after_steps.tolist() == [False, False, True, False, True]  # and a log does read


def test_counters_of_bad_steps():
    bad_steps = BadSteps("cpu")
    for bad in (True, False, True, True, True, False, True):
        bad_steps.count(torch.tensor(bad))
    assert bad_steps.read() == (5, 5, 3)
    resumed = BadSteps("cpu")
    resumed.load_state_dict(bad_steps.state_dict())
    resumed.count(torch.tensor(True))
    assert resumed.read() == (6, 1, 2)
    resumed.load_state_dict({"bad_steps": 9, "bad_steps_in_a_row": 4})
    resumed.count(torch.tensor(False))
    assert resumed.read() == (9, 0, 0)  # cured: bad steps before this start do not end the run


@pytest.mark.parametrize(("max_bad_steps", "log_every", "stops_at"), [(2, 1, 2), (2, 5, 5), (3, 2, 4)])
def test_a_run_stops_at_the_first_log_after_too_many(data, tmp_path, max_bad_steps, log_every, stops_at):
    poison(data, range(12))
    flags = {"max_bad_steps": max_bad_steps, "log_every": log_every, "max_train_steps": 20}
    with pytest.raises(InputError, match=rf"in a row, up to step {stops_at}; no checkpoint yet"):
        tiny.run_train(data, tmp_path, **flags)
    assert tiny.log_lines(tmp_path / "run")[-1]["step"] == stops_at


def test_bad_steps_with_good_ones_between_do_not_stop_a_run(data, tmp_path):
    """Six images of the twelve are bad, so that an epoch of twelve steps of one image has rows of them."""
    poison(data, range(0, 12, 2))
    run_dir = tiny.run_train(data, tmp_path, batch_size=1, max_train_steps=24, max_bad_steps=7, log_every=24)
    assert tiny.log_lines(run_dir)[-1]["bad_steps"] == 12


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)

    def diverge(self, norm, bad, original=Trainer.update):
        original(self, norm, bad)
        next(self.model.parameters()).data.view(-1)[0] = float("nan")

    monkeypatch.setattr(Trainer, "update", diverge)
    with pytest.raises(InputError, match=r"weights at step 3 are not finite and are not saved; the last .*0000002.pt;"):
        tiny.run_train(data, tmp_path, max_train_steps=3, resume="auto")
    assert existing_steps(run_dir) == [2]


# -------------------------------------------------------------------------------------------------- fp16 scaler


@pytest.fixture
def with_scaler(monkeypatch):
    """Runs get fp16 with its gradient scaler on CPU, where accelerate would refuse."""

    def start(config, original=training.run.start_accelerator):
        accelerator = original(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(training.run, "start_accelerator", start)


def test_the_scaler_skips_with_the_optimizer_and_lowers_its_scale(data, tmp_path, monkeypatch, with_scaler):
    monkeypatch.setattr(train, "objective", injected(infinite_gradient))
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=1, max_train_steps=3, ema_decay=0.9)
    first, second, third = checkpoints(run_dir, 1, 2, 3)
    for entry in STATE:
        assert not tiny.differences(first[entry], second[entry]), entry
        assert tiny.differences(second[entry], third[entry]), entry
    assert [content["scaler"]["scale"] for content in (first, second, third)] == [2.0**10, 2.0**9, 2.0**9]
    assert [line["bad_steps"] for line in tiny.log_lines(run_dir)] == [0, 1, 1]


def test_gradients_are_unscaled_before_they_are_clipped_and_logged(data, tmp_path, with_scaler, monkeypatch):
    scaled = tiny.log_lines(tiny.run_train(data, tmp_path / "scaled"))
    monkeypatch.undo()
    plain = tiny.log_lines(tiny.run_train(data, tmp_path / "plain"))
    for name in ("loss", "grad_norm"):
        assert [a[name] for a in scaled] == pytest.approx([b[name] for b in plain], rel=0.01), name


def test_the_scaler_resumes_to_the_bit(data, tmp_path, with_scaler):
    """Its scale grows after the third good step, which only one who knows of the first two can tell."""
    whole, parts = (tmp_path / name / "run" for name in ("whole", "parts"))
    tiny.run_train(data, tmp_path / "whole", max_train_steps=4)
    tiny.run_train(data, tmp_path / "parts", max_train_steps=2)
    tiny.run_train(data, tmp_path / "parts", max_train_steps=4, resume="latest")
    (a,), (b,) = checkpoints(whole, 4), checkpoints(parts, 4)
    assert a["scaler"]["scale"] == 2.0**11
    for entry in (*STATE, "scaler"):
        assert not tiny.differences(a[entry], b[entry]), entry


# ------------------------------------------------------------------------------------------------ two processes


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["infinite-loss", "infinite-gradient"])
def test_an_infinity_on_one_of_two_processes_skips_the_step_on_both(data, tmp_path, fault):
    flags = tiny.train_flags(data, tmp_path, checkpointing_steps=1, max_train_steps=3, ema_decay=0.9)
    done = programs.run_ranks(2, tiny.ROOT / "tests/faulty_train.py", fault, *flags)
    assert done.returncode == 0, done.stderr
    first, second, third = checkpoints(tmp_path / "run", 1, 2, 3)
    for entry in STATE:
        assert not tiny.differences(first[entry], second[entry]), entry
        assert tiny.differences(second[entry], third[entry]), entry
    assert [line["bad_steps"] for line in tiny.log_lines(tmp_path / "run")] == [0, 1, 1]
    assert all(np.isfinite(line["loss"]) for line in tiny.log_lines(tmp_path / "run") if "loss" in line)
