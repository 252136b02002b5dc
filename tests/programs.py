"""Runs programs of the repository in forks of one process that has imported all that they need: seconds less for each.

A started program is a process of its own, with its own environment, signals and exit code. What a launcher itself does
is tested with the real one: launch.sh, torchrun, accelerate.
"""

import dataclasses
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds


@dataclasses.dataclass
class Program:
    """A started program: the process, and the files that take its output."""

    process: multiprocessing.Process
    stdout: Path
    stderr: Path

    def poll(self):
        """Exit code, −number for a signal, or None while it runs; as subprocess.Popen's."""
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def wait(self, timeout=TIMEOUT):
        """The exit code. Kills the program after `timeout` seconds and raises TimeoutError."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"no end within {timeout} s: {self.stderr.read_text()[-2000:]}")
        return self.process.exitcode


@dataclasses.dataclass
class Done:
    """What is left of a program, or of the processes of a launch; as subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def server(preload="warm"):
    """The context whose processes are forks of one that has imported the module `preload` of this folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with pytest.MonkeyPatch.context() as patch:  # older versions of Python don't hand sys.path on
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "tests", ROOT))))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def start(*command, limits=(), folder=ROOT, interpreter=None, **environment):
    """Start `FILE.py ARGUMENTS` or `-m MODULE ARGUMENTS` with one thread; returns the Program.

    limits: ((resource.RLIMIT_…, number), …). folder: the working folder. interpreter: options of a fresh interpreter,
    which then takes the fork's place.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of what the program starts
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    output = Path(tempfile.mkdtemp(prefix="program-", dir=_outputs().name))
    program = Program(None, output / "stdout", output / "stderr")
    options = {"limits": limits, "folder": folder, "interpreter": interpreter}
    arguments = [str(part) for part in command], environment, program.stdout, program.stderr, options
    program.process = server().Process(target=_become, args=arguments)
    program.process.start()
    return program


@functools.cache
def _outputs():
    """The folder of the files that take output; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="programs-")


def run(*command, **options):
    """Run a program to its end; options as of `start`. Returns Done."""
    program = start(*command, **options)
    return Done(program.wait(), program.stdout.read_text(), program.stderr.read_text())


def launcher(count, module="torch.distributed.run"):
    """Arguments of `run` and `start` for the real torchrun with so many processes, which are not forks."""
    return "-m", module, "--standalone", "--nproc-per-node", count


def start_ranks(count, *command, **environment):
    """Start `count` processes that torch.distributed joins, as torchrun does; returns (Programs, their store)."""
    import torch.distributed

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), **environment)
    ranks = [start(*command, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return ranks, store  # the store lives as long as somebody has it


def run_ranks(count, *command, **environment):
    """Run `count` processes to their end; the first that fails ends the others. Returns Done, its exit code 0 or 1."""
    ranks, _store = start_ranks(count, *command, **environment)
    deadline = time.monotonic() + TIMEOUT
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        if rank.poll() is None:
            rank.process.terminate()
    codes = [rank.wait(30) for rank in ranks]
    output = ("".join(getattr(rank, name).read_text() for rank in ranks) for name in ("stdout", "stderr"))
    return Done(int(any(codes)), *output)


def _become(command, environment, stdout, stderr, options):
    """Turn this fork into the program."""
    assert "warm" in sys.modules
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(options["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    for which, number in options["limits"]:
        resource.setrlimit(which, (number, number))
    if options["interpreter"] is None:
        return run_here(command)
    os.environ["PYTHONPATH"] = str(ROOT)
    words = command if command[0] == "-m" else [ROOT / command[0], *command[1:]]
    os.execv(sys.executable, [sys.executable, *options["interpreter"], *map(str, words)])


def run_here(command):
    """Run a program in this process as its main program."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
