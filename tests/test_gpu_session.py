"""benchmarks/gpu_session.py: every phase runs on a CPU at tiny sizes, and a failure leaves the other rows."""

import json
import time

import programs
import pytest
import tiny
import torch

from benchmarks import gpu_items, gpu_session
from benchmarks.gpu_items import Measured


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function that runs phases and returns the lines of the file; programs run in forks, and pytest not at all."""

    def run_program(*command):
        if command[0] == "-m":
            return "1 passed"
        done = programs.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(*phases):
        out = tmp_path / "out.jsonl"
        gpu_session.run(gpu_session.SessionFlags(phase=phases, tiny=True, out=str(out)))
        return [json.loads(line) for line in out.read_text().splitlines()]

    monkeypatch.setattr(gpu_items, "run_program", run_program)
    return run


@pytest.mark.parametrize("phase", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_item_of_a_phase_gives_numbers(run, phase):
    rows = run(phase)
    assert {row["item"] for row in rows} == {item.__name__.replace("_", " ") for item in gpu_session.PHASES[phase]}
    for row in rows:
        assert isinstance(row["value"], float) or row["unit"] == ""
        assert not str(row["value"]).startswith(("failed", "out of"))


def test_what_fails_leaves_the_other_rows(run, monkeypatch, capsys):
    def items():
        def memory(_sizes):
            yield Measured("before", 1.0, "s", predicted=2.0)
            raise torch.OutOfMemoryError("CUDA out of memory")

        def package(_sizes):
            yield Measured("before", float(__import__("no_such_package").x))

        def slow(_sizes):
            time.sleep(30)
            yield Measured("never", 1.0)

        def last(_sizes):
            yield Measured("after", 1.0)

        return memory, package, slow, last

    monkeypatch.setattr(gpu_session, "PHASES", {1: items()[:3], 2: items()[3:]})
    monkeypatch.setattr(gpu_session, "SECONDS", 1)
    rows = run(1, 2)
    found = [1.0, "out of memory", "no_such_package is not installed", "out of time", 1.0]
    assert [row["value"] for row in rows] == found
    assert rows[0]["ratio"] == 0.5
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1  # the table, below its header


def test_a_step_that_does_not_fit_leaves_those_that_do(run, monkeypatch):
    make_step = gpu_items.make_step

    def full(sizes, name, batch, *rest):
        if batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_step(sizes, name, batch, *rest)

    monkeypatch.setattr(gpu_items, "make_step", full)
    monkeypatch.setattr(gpu_session, "PHASES", {2: (gpu_items.compiled_steps,)})
    values = {row["what"]: row["value"] for row in run(2)}
    assert values["DeepFlow-Ti/2, 2 images, compiled"] == "out of memory"
    assert values["DeepFlow-Ti/2, 1 images, compiled"] > 0


def test_gpu_tests_and_benchmarks_import_without_what_a_gpu_machine_may_lack():
    names = [path.stem for path in (tiny.ROOT / "benchmarks").glob("[!_]*.py")]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(("diffusers", "sklearn", "skimage", "torch_fidelity", "transformers")))
sys.path.insert(0, "tests")
for name in ["test_gpu", *(f"benchmarks.{{name}}" for name in {names})]:
    importlib.import_module(name)
"""
    done = tiny.run_python("-c", code)
    assert done.returncode == 0, done.stderr
