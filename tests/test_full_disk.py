"""A disk that is full while a checkpoint, a log line or a grid is written: reported, and what was there stays."""

import contextlib
import dataclasses
import errno
import resource

import pytest
import tiny
import torch

from common.errors import InputError
from training.checkpoint import existing_steps, save_checkpoint
from training.logs import RunLog


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


@contextlib.contextmanager
def largest_file(size):
    """Writes beyond `size` bytes of a file fail, by the kernel, as they would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(run_dir):
    paths = (run_dir / "checkpoints").iterdir()
    return {path: path.read_bytes() for path in paths if path.name != "rolling.json"}  # a list of what may be deleted


def test_a_rolling_checkpoint_that_does_not_fit_is_reported_and_training_goes_on(data, tmp_path, capsys):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    before = files(run_dir)
    with largest_file(1_000_000), pytest.raises(InputError, match=r"0000005.pt is not written"):
        tiny.run_train(data, tmp_path, max_train_steps=5, rolling_steps=1, resume="auto")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "is not written" in line]
    expected = [f"warning: {run_dir}/checkpoints/{step:07d}.pt is not written (File too large)" for step in (3, 4)]
    assert [line.split(";")[0] for line in warnings] == expected
    assert files(run_dir) == before
    assert [line["step"] for line in tiny.log_lines(run_dir)] == [1, 2, 3, 4, 5]


def test_a_lasting_checkpoint_that_does_not_fit_ends_the_run_in_one_line(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    before = files(run_dir)
    culprit = (
        r"0000003.pt is not written \(File too large\); earlier checkpoints are kept; free space .*--resume latest"
    )
    with largest_file(1_000_000), pytest.raises(InputError, match=culprit) as caught:
        tiny.run_train(data, tmp_path, max_train_steps=8, checkpointing_steps=3, resume="auto")
    assert "\n" not in str(caught.value)
    assert files(run_dir) == before
    tiny.run_train(data, tmp_path, max_train_steps=3, resume="latest")
    assert existing_steps(run_dir) == [2, 3]


@pytest.mark.parametrize("allowed", [0, 100, 4096, 300_000])
def test_a_failed_write_is_an_oserror_wherever_it_fails(tmp_path, allowed):
    content = {"model": [torch.zeros(50_000), torch.zeros(50_000)]}
    with largest_file(allowed), pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path / "0000001.pt", **content)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_costs_its_lines_only(data, tmp_path, capsys, monkeypatch):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    (run_dir / "log.jsonl").unlink()
    monkeypatch.setattr(RunLog, "_forget_after", lambda self, step: None)
    (run_dir / "log.jsonl").symlink_to("/dev/full")
    tiny.run_train(data, tmp_path, max_train_steps=4, resume="auto")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "is not written" in line]
    assert (
        warnings
        == [f"warning: {run_dir}/log.jsonl is not written (No space left on device); free space, training continues"]
        * 2
    )
    assert existing_steps(run_dir) == [2, 4]


def test_a_grid_that_cannot_be_written_costs_the_grid_only(tmp_path, capsys):
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    data = tiny.data_folder(tmp_path / "data", spec=dataclasses.replace(tiny.SPEC, vae=str(vae)))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "samples").write_text("a file where the folder should be")
    tiny.run_train(data, tmp_path, max_train_steps=2, sampling_steps=1)
    assert capsys.readouterr().out.count(f"warning: {run_dir}/samples is not written (") == 2
    assert existing_steps(run_dir) == [2]
