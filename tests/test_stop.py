"""Signals, launchers and machines: a told run stops with a checkpoint, and the same command continues from there."""

import os
import signal
import socket
import subprocess
import sys
import time

import programs
import pytest
import tiny

import train
from common.errors import EXIT_STOPPED, InputError
from common.files import locked
from training.checkpoint import existing_steps
from training.stop import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def heeded_interrupt():
    """As in a terminal; a shell starts background commands with this signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def signalled(number, at_call, objective=train.objective):
    """train.objective that sends this process a signal in its `at_call`-th call."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), number)
        return objective(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_run_goes_on(data, tmp_path, monkeypatch, number, capsys):
    monkeypatch.setattr(train, "objective", signalled(number, at_call=2))
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(SystemExit) as caught:
        tiny.run_train(data, tmp_path, log_every=100, checkpointing_steps=100)
    assert caught.value.code == EXIT_STOPPED == 75
    assert existing_steps(tmp_path / "run") == [2]
    assert [line["step"] for line in tiny.log_lines(tmp_path / "run")] == [2]
    assert "stopped by a signal after step 2; --resume auto continues" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    monkeypatch.undo()
    stopped = tiny.run_train(data, tmp_path, resume="auto")
    straight = tiny.run_train(data, tmp_path / "straight")
    for entry in ("model", "ema", "opt", "train_state"):
        a, b = (tiny.load(run / "checkpoints/0000004.pt")[entry] for run in (stopped, straight))
        assert not tiny.differences(a, b), entry


def test_a_signal_in_the_last_step_is_no_stop(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "objective", signalled(signal.SIGTERM, at_call=4))
    assert existing_steps(tiny.run_train(data, tmp_path)) == [4]  # and no SystemExit


def test_checkpoints_of_stops_are_rolling(data, tmp_path, monkeypatch):
    for step in range(1, 4):
        monkeypatch.setattr(train, "objective", signalled(signal.SIGUSR1, at_call=1))
        with pytest.raises(SystemExit):
            tiny.run_train(data, tmp_path, resume="auto", max_train_steps=9, keep_last=2)
        assert existing_steps(tmp_path / "run")[-1] == step
        monkeypatch.undo()
    assert existing_steps(tmp_path / "run") == [2, 3]


def test_no_answer_is_wanted_from_other_processes_where_there_are_none():
    with StopRequest(num_processes=1) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed()


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    with (
        locked(tmp_path / "run", "--exp-name"),
        pytest.raises(InputError, match=rf"another process is writing {tmp_path}/run; .* another --exp-name"),
    ):
        tiny.run_train(data, tmp_path)
    assert not (tmp_path / "run/checkpoints").exists()
    tiny.run_train(data, tmp_path, max_train_steps=1)


def test_a_second_interrupt_ends_at_once(data, tmp_path):
    run = programs.start("tests/faulty_train.py", "interrupt-twice", *tiny.train_flags(data, tmp_path))
    assert run.wait() == 130
    assert "--resume auto continues" in run.stderr.read_text()
    tiny.run_train(data, tmp_path, resume="auto")


def test_signals_that_a_shell_has_the_process_ignore_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(num_processes=1) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_names_the_exit_code():
    done = programs.run(tiny.ROOT / "train.py", "--help")
    assert "the exit code is 75" in " ".join(done.stdout.split())


# ------------------------------------------------------------------------------------------- real processes

TORCHRUN = (*programs.launcher(2), "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
LONG = {"max_train_steps": 4000, "checkpointing_steps": 100_000, "ema_decay": 0.9}


def start(command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT), **environment}
    command = [str(part) for part in command]
    return subprocess.Popen(
        command, cwd=tiny.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run_dir, step, process):
    """Until the log has a line of that step or a later one."""
    log = run_dir / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, said(process)
        time.sleep(0.05)


def said(process):
    """What a program printed before its end."""
    if isinstance(process, programs.Program):
        return process.stdout.read_text() + process.stderr.read_text()
    return process.stdout.read()


def check_stop_and_go_on(run_dir, data, output_dir):
    """The newest checkpoint is that of the last logged step, and the run continues from there."""
    (step,) = existing_steps(run_dir)
    assert tiny.log_lines(run_dir)[-1]["step"] == step
    tiny.run_train(data, output_dir, **{**LONG, "max_train_steps": step + 2}, resume="auto")
    assert [line["step"] for line in tiny.log_lines(run_dir)] == list(range(1, step + 3))


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_alone_exits_with_the_documented_code(data, tmp_path, number):
    process = programs.start("train.py", *tiny.train_flags(data, tmp_path, **LONG))
    wait_for_step(tmp_path / "run", 10, process)
    os.kill(process.process.pid, number)
    assert process.wait(60) == EXIT_STOPPED, said(process)
    check_stop_and_go_on(tmp_path / "run", data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])  # torchrun passes SIGTERM on as it does SIGUSR1
def test_two_processes_stop_after_the_same_step(data, tmp_path, number):
    line = tiny.train_flags(data, tmp_path, **LONG)
    process = programs.start(*TORCHRUN, "tests/faulty_train.py", "report-exit", *line)
    wait_for_step(tmp_path / "run", 10, process)
    os.kill(process.process.pid, number)
    assert process.wait(60) != 0  # the launcher's own
    assert said(process).count(f"exits with {EXIT_STOPPED}") == 2, said(process)
    check_stop_and_go_on(tmp_path / "run", data, tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(data, tmp_path):
    line = tiny.train_flags(data, tmp_path, **LONG)
    ranks, _store = programs.start_ranks(2, "tests/faulty_train.py", "report-exit-after-own-signal", *line)
    assert [rank.wait(100) for rank in ranks] == [EXIT_STOPPED, EXIT_STOPPED]
    check_stop_and_go_on(tmp_path / "run", data, tmp_path)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_reported_soon(data, tmp_path):
    before = time.monotonic()
    done = programs.run_ranks(2, "tests/faulty_train.py", "late-rank", *tiny.train_flags(data, tmp_path))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: preflight: rank 0 of 2 on ")
    assert "did not reach all others in 2 s; check that all processes started" in line
    assert time.monotonic() - before < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_never_started_is_reported_soon(data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = programs.run("tests/faulty_train.py", "late-rank", *tiny.train_flags(data, tmp_path), **alone)
    assert done.returncode == 2
    assert "error: preflight: rank 0 of 2 on " in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["failing-rank", "killed-rank"])
def test_a_lost_process_ends_the_others_and_no_checkpoint_is_cut_short(data, tmp_path, fault):
    flags = tiny.train_flags(data, tmp_path, batch_size=6, checkpointing_steps=1)
    done = programs.run_ranks(3, "tests/faulty_train.py", fault, *flags)
    assert done.returncode == 1
    assert "another process of the run ended early, so this one ends too; use --resume auto" in done.stderr
    assert ("error: rows-00003.bin is damaged; pack it again" in done.stderr) == (fault == "failing-rank")
    tiny.load(tmp_path / "run/checkpoints/0000001.pt")


@pytest.mark.slow
def test_every_rank_reports_and_a_common_error_is_printed_once(data, tmp_path):
    done = programs.run_ranks(2, "train.py", *tiny.train_flags(data, tmp_path, batch_size=3))
    for rank in (0, 1):
        assert f"rank {rank} of 2 on {os.uname().nodename}, cpu" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.startswith("error: --batch-size 3 is not divisible by 2 processes") for line in errors] == [True]


# ---------------------------------------------------------------------------------------------------- Slurm

FAKE_SRUN = """#!{python}
import os, signal, subprocess, sys
command = [part for part in sys.argv[1:] if not part.startswith("--kill-on-bad-exit")]
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}) for i in range(2)
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "scontrol $*"; fi
"""


def slurm(tmp_path, data):
    """(command, environment) of the batch script with stand-ins for srun and scontrol: two tasks on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fakes = {"srun": FAKE_SRUN.format(python=sys.executable), "scontrol": FAKE_SCONTROL}
    fakes["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in fakes.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    port = str(20_000 + os.getpid() % 20_000)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "MASTER_PORT": port, "SLURM_NTASKS": "2"}
    environment.update(SLURM_SUBMIT_DIR=str(tiny.ROOT), SLURM_JOB_NODELIST="localhost", SLURM_JOB_ID="17")
    environment.update(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path), EXP_NAME="run")
    return ["bash", "script/slurm/train.sh", "--no-compile"], environment


@pytest.mark.slow
def test_the_batch_script_requeues_a_run_that_ran_out_of_time_and_no_other(data, tmp_path):
    command, environment = slurm(tmp_path, data)
    flags = {**LONG, "mixed_precision": "no"}
    process = start([*command, *tiny.train_flags(data, tmp_path, **LONG)], **environment)
    try:
        wait_for_step(tmp_path / "run", 10, process)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, output
    assert "scontrol requeue 17" in output
    (step,) = existing_steps(tmp_path / "run")
    flags["max_train_steps"] = step + 2
    again = start([*command, *tiny.train_flags(data, tmp_path, **flags)], **environment)
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0, output
    assert "scontrol requeue" not in output
    assert [line["step"] for line in tiny.log_lines(tmp_path / "run")] == list(range(1, step + 3))
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 2\n")  # as train.py for bad input
    wrong = start(command, **environment)
    output, _ = wrong.communicate(timeout=100)
    assert wrong.returncode == 2
    assert "scontrol requeue" not in output
