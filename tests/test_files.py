"""One writer and one lock: whole files or none, one process per result, and no leftovers of killed processes."""

import contextlib
import fcntl
import os
import signal
import time

import programs
import pytest
import tiny
from data_helpers import write_class_folders

from common.errors import InputError
from common.files import locked, write_atomically

DEAD = 2**22 + 1  # no process has it: above the largest process id of Linux


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny.vae_folder(tmp_path_factory.mktemp("vae") / "tiny-vae")


def failing(error):
    def write(file):
        file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path.mkdir() or path], ids=["new", "folder"])
def test_a_result_has_one_writer_at_a_time(tmp_path, make):
    result = make(tmp_path / "result")
    with locked(result, "--dest"):
        for name in (result, tmp_path / "x" / ".." / "result"):  # two names of the same file
            with pytest.raises(InputError, match=rf"another process is writing {result}; .* another --dest"):
                locked(name, "--dest").__enter__()
        with locked(tmp_path / "other", "--dest"), locked(result, "--dest", main=False):
            pass
    with locked(result, "--dest"):
        pass
    assert set(tmp_path.iterdir()) <= {result}


def test_a_lock_goes_with_its_process(tmp_path):
    with contextlib.suppress(ValueError), locked(tmp_path / "result", "--dest"):
        raise ValueError
    (tmp_path / ".result.lock").touch()  # left by a killed process
    with locked(tmp_path / "result", "--dest"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_in_between_is_not_believed(tmp_path, monkeypatch):
    lock, calls = tmp_path / ".result.lock", []

    def flock(file, how, original=fcntl.flock):
        calls.append(file)
        if len(calls) == 1:
            lock.unlink()  # as the process that held it does
        return original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "result", "--dest"):
        assert len(calls) == 2 and lock.exists()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "result", "--dest"):
        pass


def test_a_place_for_no_lock_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--dest {tmp_path}/file/result cannot be written"):
        locked(tmp_path / "file" / "result", "--dest").__enter__()
    os.mkfifo(tmp_path / ".pipe.lock")
    with locked(tmp_path / "pipe", "--dest"):  # a pipe: must not wait for a reader
        pass


def test_what_killed_processes_left_of_a_result_is_removed_and_nothing_else(tmp_path):
    names = [
        f".result.{DEAD}.tmp",
        f".result.{os.getpid()}.tmp",
        f".result.{os.getppid()}.tmp",
        f".results.{DEAD}.tmp",
        f".result.zip.{DEAD}.tmp",
    ]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".result.{DEAD + 1}.tmp").mkdir()
    with locked(tmp_path / "result", "--dest"):
        assert {path.name for path in tmp_path.iterdir()} == {*names[2:], ".result.lock"}


@pytest.mark.parametrize(
    ("write", "number"),
    [
        (failing(OSError(28, "No space left on device")), 28),
        (failing(OSError("1000 requested and 8 written")), 28),  # numpy
        (failing(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")), 28),  # torch
        (failing(PermissionError(13, "Permission denied")), 13),
    ],
)
def test_what_the_machine_refuses_names_the_file_and_leaves_nothing(tmp_path, write, number):
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "result", write)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "result"))
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "result", failing(KeyError("x")))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- every program that writes


def commands(tmp_path, vae):
    """{name: (command line, file or folder that it makes)}; makes the inputs too."""
    write_class_folders(tmp_path / "source", per_class=2)
    data = tiny.data_folder(tmp_path / "data")
    ckpt = tiny.checkpoint(tmp_path / "0000003.pt", vae)
    grid, out = ("generate.py", "--ckpt", ckpt, "--vae", vae, "--grid", "1x1", "--num-steps", 1), tmp_path / "g.png"
    tool, size = ("-m", "preprocessing.dataset_tools"), ("--resolution", "16x16", "--workers", "1")
    source = ("--source", tmp_path / "source")
    crop = ("--transform", "center-crop-dhariwal")
    return {
        "convert": ((*tool, "convert", *source, "--dest", tmp_path / "images", *size, *crop), tmp_path / "images"),
        "zip": ((*tool, "convert", *source, "--dest", tmp_path / "x.zip", *size, *crop), tmp_path / "x.zip"),
        "pack": ((*tool, "pack", "--source", data, "--dest", tmp_path / "packed"), tmp_path / "packed"),
        "export": (("-m", "models.export", ckpt, tmp_path / "out"), tmp_path / "out"),
        "grid": ((*grid, "--out", out), out),
    }


@pytest.mark.parametrize("name", ["convert", "zip", "pack", "export", "grid"])
def test_a_second_start_ends_in_one_line_and_a_killed_one_hinders_nothing(tmp_path, vae, name):
    words, result = commands(tmp_path, vae)[name]
    with locked(result, "x"):
        refused = programs.run(*words)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1 and f"another process is writing {result}" in refused.stderr
    assert not result.exists()
    (tmp_path / f".{result.name}.{DEAD}.tmp").touch()
    (tmp_path / f".{result.name}.lock").touch()
    done = programs.run(*words)
    assert done.returncode == 0, done.stderr
    assert result.exists() and not list(tmp_path.glob(f".{result.name}*"))


def test_generate_holds_its_folder(tmp_path, vae):
    ckpt = tiny.checkpoint(tmp_path / "0000003.pt", vae)
    flags = ("--ckpt", ckpt, "--vae", vae, "--num-fid-samples", 2, "--num-steps", 1, "--sample-dir", tmp_path / "s")
    assert programs.run("generate.py", *flags).returncode == 0
    (folder,) = (path for path in (tmp_path / "s").iterdir() if path.is_dir())
    with locked(folder, "x"):
        refused = programs.run("generate.py", *flags)
    assert refused.returncode == 2 and f"another process is writing {folder}" in refused.stderr


IDLE = """import runpy, sys, time
from models.deepflow import DeepFlow
velocity = DeepFlow.velocity
DeepFlow.velocity = lambda *inputs: time.sleep(0.1) or velocity(*inputs)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_ends_a_command_in_one_line_and_the_next_start_goes_on(tmp_path, vae):
    ckpt = tiny.checkpoint(tmp_path / "0000003.pt", vae)
    (tmp_path / "idle.py").write_text(IDLE)  # takes seconds and little time of the processor
    samples = tmp_path / "s"
    flags = ("--ckpt", ckpt, "--vae", vae, "--num-fid-samples", 12, "--per-proc-batch-size", 1, "--sample-dir", samples)
    run = programs.start(tmp_path / "idle.py", "generate.py", *flags, "--num-steps", 5)
    deadline = time.monotonic() + 60
    while not list(samples.rglob("0*.png")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert run.poll() is None, run.stderr.read_text()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.stderr.read_text()
    assert "Traceback" not in run.stderr.read_text()
    assert run.stderr.read_text().splitlines()[-1].startswith("interrupted; run the same again")
    done = programs.run("generate.py", *flags, "--num-steps", 5)
    assert done.returncode == 0 and len(list(samples.rglob("0*.png"))) == 12, done.stderr
