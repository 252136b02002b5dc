"""Measuring a run while it trains: evaluations.watch."""

import json
import os
import re
import shutil
from pathlib import Path

import programs
import pytest
import tiny
from evaluation_helpers import pictures, save_npz, script
from PIL import Image

from common.errors import InputError
from evaluations import measuring, watch
from training.checkpoint import clear_way

STEPS = {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0}  # distance that the stub measures at each step


class Training:
    """A folder as a trainer of four steps leaves it, which keeps one checkpoint; and a stand-in for what watch starts.

    deleting: whether each checkpoint is deleted while it is sampled.
    """

    def __init__(self, folder, deleting=False):
        self.folder, self.deleting, self.step, self.calls = folder, deleting, 0, []
        (folder / "checkpoints").mkdir(parents=True)
        config = {"model": "DeepFlow-Ti/2", "max_train_steps": 4, "epochs": 9, "other": [1]}
        (folder / "config.json").write_text(json.dumps(config))

    def path(self, step):
        return self.folder / f"checkpoints/{step:07d}.pt"

    def train(self, *_):
        self.step += 1
        self.path(self.step).write_text(f"weights of step {self.step}")
        self.path(self.step - 1).unlink(missing_ok=True)
        (self.folder / "checkpoints/.0000009.pt.1.tmp").write_text("half")
        line = json.dumps({"step": self.step, "epoch": self.step / 2, "loss": 1.0})
        (self.folder / "log.jsonl").write_text(line + '\n{"step": 9')  # and an incomplete line

    def run_python(self, processes, *words):
        words = list(map(str, words))
        if words[0] == "-m":
            step = int(Path(words[-1]).stem)
            metrics = {"Fréchet distance of digits": STEPS[step], "label agreement": STEPS[step] / 10}
            Path(words[-1]).write_text(json.dumps({"metrics": metrics}))
            return
        step = int(Path(words[words.index("--ckpt") + 1]).stem)
        self.calls.append(step)
        if self.deleting:
            self.path(step).unlink()
        assert Path(words[words.index("--ckpt") + 1]).read_text().startswith(f"weights of step {step}")
        samples = Path(words[words.index("--sample-dir") + 1])
        samples.mkdir(parents=True)
        (samples / "a.npz").touch()


@pytest.fixture
def training(tmp_path, monkeypatch):
    training = Training(tmp_path / "run")
    monkeypatch.setattr(measuring, "run_python", training.run_python)
    monkeypatch.setattr(watch.time, "sleep", training.train)
    return training


def start(training, *words):
    watch.main([str(training.folder), "--ref", "digits", *words])
    return json.loads((training.folder / "watch/curve.json").read_text())


@pytest.mark.parametrize("deleting", [False, True])
def test_a_run_is_watched_to_its_end_and_the_best_checkpoint_is_kept(training, capsys, deleting):
    training.deleting = deleting
    curve = start(training)
    assert training.calls == [1, 2, 3, 4] == [step for step, _ in curve["curves"]["label agreement"]]
    assert curve["best"] == 2 and curve["curves"][curve["metric"]] == [list(pair) for pair in STEPS.items()]
    out = training.folder / "watch"
    assert (out / "best.pt").read_text() == "weights of step 2" and not training.path(2).exists()
    assert not any((out / "checkpoints").iterdir()) and not any((out / "samples").iterdir())
    assert Image.open(out / "curve.png").size[0] > 300
    assert "step 3: Fréchet distance of digits 4\n" in (printed := capsys.readouterr().out)
    assert "step 2: Fréchet distance of digits 3, the best so far" in printed and f"in {out}: curve.json" in printed


def test_a_run_may_end_by_epochs(training):
    training.folder.joinpath("config.json").write_text('{"model": "x", "max_train_steps": 400, "epochs": 1}')
    start(training)
    assert training.calls == [1, 2]


def test_higher_is_better_for_other_metrics(training):
    assert start(training, "--metric", "label agreement")["best"] == 4


def test_once_measures_existing_checkpoints_and_nothing_the_second_time(training):
    training.train()
    for _ in range(2):
        assert start(training, "--once")["best"] == 1
    training.train()
    assert start(training, "--once")["best"] == 2 and training.calls == [1, 2]


def test_an_interrupted_measurement_resumes_after_training_deleted_the_checkpoint(training, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    training.train()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_python", fail)
        with pytest.raises(KeyboardInterrupt):
            start(training, "--once")
    training.train()
    assert start(training, "--once")["best"] == 2 and training.calls == [1, 2]


def test_a_checkpoint_deleted_before_it_is_held_is_skipped(training, monkeypatch, capsys):
    def vanished(source, target):
        Path(source).unlink()
        raise FileNotFoundError

    training.train()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", vanished)
        with pytest.raises(InputError, match="no checkpoint was measured"):
            start(training, "--once")
    assert "0000001.pt is gone" in capsys.readouterr().err and training.calls == []


def test_without_links_checkpoints_are_copied(training, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    training.deleting = True
    assert start(training)["best"] == 2
    assert (training.folder / "watch/best.pt").read_text() == "weights of step 2"


def test_steps_that_a_rewound_run_repeats_are_measured_again(training):
    training.train()
    start(training, "--once")
    later = (training.folder / "watch/0000001.json").stat().st_mtime + 5
    training.path(1).write_text("weights of step 1, again")
    os.utime(training.path(1), (later, later))
    start(training, "--once")
    assert training.calls == [1, 1] and (training.folder / "watch/best.pt").read_text().endswith("again")


def test_a_step_that_a_rewind_has_set_aside_is_forgotten(training):
    for _ in range(2):
        training.train()
        assert start(training, "--once")["best"]
    watched = training.folder / "watch"
    assert json.loads((watched / "curve.json").read_text())["best"] == 2
    os.utime(watched / "0000002.json", (0, 0))  # long before the rewind
    training.path(1).write_text("weights of step 1")
    os.utime(training.path(1), (0, 0))
    clear_way(training.folder, 1)
    found = start(training, "--once")
    assert found["best"] == 1 and not (watched / "0000002.json").exists() and not (watched / "best.pt").exists()


def test_a_held_checkpoint_that_a_rewind_has_set_aside_is_not_measured(training, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        training.train()
    os.utime(training.path(2), (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_python", fail)
        with pytest.raises(KeyboardInterrupt):
            start(training, "--once")
    training.path(1).write_text("weights of step 1")
    clear_way(training.folder, 1)
    assert start(training, "--once")["best"] == 1 and training.calls == [1]


def test_a_copy_that_is_all_that_is_left_of_a_checkpoint_is_measured(training, monkeypatch):
    """The one that was set aside is of an earlier rewind."""

    def fail(*_):
        raise KeyboardInterrupt

    training.train()
    aside = Path(f"{training.path(1)}.abandoned")
    aside.write_text("weights of step 1, before a rewind")
    os.utime(aside, (0, 0))  # sets its ctime, too
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_python", fail)
        with pytest.raises(KeyboardInterrupt):
            start(training, "--once")
    held = training.folder / "watch/checkpoints/0000001.pt"
    later = aside.stat().st_ctime - 5
    os.utime(held, (later, later))
    training.train()
    start(training, "--once")
    assert training.calls == [1, 2]


def test_after_a_rewind_the_best_checkpoint_may_be_gone_which_is_said(training, monkeypatch, capsys):
    for _ in range(2):
        training.train()
        start(training, "--once")
    assert f"next: python generate.py --ckpt {training.folder / 'watch/best.pt'}" in capsys.readouterr().out
    later = (training.folder / "watch/0000002.json").stat().st_mtime + 5
    monkeypatch.setitem(STEPS, 2, 9.0)
    os.utime(training.path(2), (later, later))
    assert start(training, "--once")["best"] == 1 and not (training.folder / "watch/best.pt").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("best: step 1;") and lines[-2].endswith("no best.pt any more")
    assert lines[-1] == f"next: python generate.py --ckpt {training.folder}"


def test_training_leaves_temporary_files_of_other_programs_alone(training):
    training.train()
    others = training.folder / "watch/.curve.json.7.tmp"
    others.parent.mkdir()
    others.touch()
    clear_way(training.folder, 1)
    assert others.exists() and not list(training.folder.glob("checkpoints/.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "fid"], "--metric fid .*label agreement"),
        (["--once"], "holds no checkpoint yet; leave --once out"),
        (["--", "--num-stepz", "4"], "--num-stepz"),
        (["--", "--num-samples", "7"], "--num-fid-samples is not allowed after --: .*leave it out"),
        (["--", "--ckpt", "other.pt"], "--ckpt is not allowed after --: .*leave it out"),
        (["--", "--no-decode"], "--no-decode is not allowed after --: .*leave it out"),
        (["--ref", "nowhere.npz"], "--ref nowhere.npz does not exist"),
        (["--every", "0"], "--every 0 is out of range"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(training, words, message):
    with pytest.raises(InputError, match=message):
        start(training, *words)
    assert training.calls == [] and not (training.folder / "watch/watch.json").exists()


def test_only_runs_are_watched_and_results_of_other_settings_are_not_mixed(training, tmp_path):
    training.train()
    start(training, "--once")
    with pytest.raises(InputError, match=r"--num-fid-samples was 5000, is now 10; name another --out"):
        start(training, "--once", "--num-samples", "10")
    (training.folder / "watch/0000001.json").write_text("{")
    with pytest.raises(InputError, match=re.escape("0000001.json is not JSON") + ".*delete it"):
        start(training, "--once")
    with pytest.raises(InputError, match=r"config\.json cannot be read.*name the folder of a run"):
        watch.main([str(tmp_path), "--ref", "digits"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_checkpoints_of_a_real_run_are_sampled_and_measured(tmp_path, monkeypatch):
    def run_python(processes, *command):
        done = programs.run(*command)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(measuring, "run_python", run_python)
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    run = tmp_path / "exps/run"
    tiny.checkpoint(run / "checkpoints/0000003.pt", vae)
    config = {"model": "DeepFlow-Ti/2", "max_train_steps": 3, "epochs": 9}
    (run / "config.json").write_text(json.dumps(config))
    (run / "log.jsonl").write_text('{"step": 3.0, "loss": 1.0}\n')
    weights = (run / "checkpoints/0000003.pt").read_bytes()
    reference, features = save_npz(tmp_path / "ref.npz", pictures(8, 1)), script(tmp_path / "corners.pt")
    flags = [str(run), "--ref", reference, "--num-samples", "4", "--features", features, "--", "--num-steps", "2"]
    watch.main(flags)
    result = json.loads((run / "watch/0000003.json").read_text())
    curve = json.loads((run / "watch/curve.json").read_text())
    assert result["count"] == 4 and curve["metric"] == "fd_corners"
    assert curve["curves"]["fd_corners"] == [[3, result["metrics"]["fd_corners"]]]
    shutil.rmtree(run / "checkpoints")
    assert (run / "watch/best.pt").read_bytes() == weights
