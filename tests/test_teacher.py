"""The teacher of --g-type distill: one file for all processes and all starts of a run."""

import json

import pytest
import tiny
import torch

import training.flow_map
from common.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"), count=24)


@pytest.fixture
def teaching(tmp_path):
    """The folder of a flow model's run with one checkpoint, the teacher of runs that `distilled` makes."""
    tiny.flow_file(tmp_path / "teaching/checkpoints/0000003.pt")
    return tmp_path / "teaching"


def distilled(data, output_dir, flow, teacher, **changes):
    settings = {"g_type": "distill", "omega": 1.5, "g_max": 1.0, "resume": "auto"}
    return tiny.run_train_dmf(data, output_dir, flow, **{**settings, "teacher": teacher, **changes})


def test_a_resumed_run_keeps_its_teacher_when_the_teacher_trains_on(data, flow, teaching, tmp_path):
    first = teaching / "checkpoints/0000003.pt"
    whole = distilled(data, tmp_path / "whole", flow, first)
    parts = distilled(data, tmp_path / "parts", flow, teaching, max_train_steps=2)
    tiny.flow_file(teaching / "checkpoints/0000005.pt", std=0.1)
    distilled(data, tmp_path / "parts", flow, teaching)
    a, b = (tiny.load(run / "checkpoints/0000004.pt") for run in (whole, parts))
    assert not any(tiny.differences(a[entry], b[entry]) for entry in ("model", "ema", "opt"))
    recorded = json.loads((parts / "config.json").read_text())["teacher_source"]
    assert recorded == b["config"]["teacher_source"] == a["config"]["teacher_source"]
    assert recorded["file"] == str(first)
    first.unlink()
    distilled(data, tmp_path / "parts", flow, teaching)  # is complete and needs none
    without = tiny.run_train_dmf(data, tmp_path, flow, max_train_steps=1)
    assert "teacher_source" not in json.loads((without / "config.json").read_text())


def test_a_teacher_that_is_gone_or_another_is_refused(data, flow, teaching, tmp_path):
    run = distilled(data, tmp_path, flow, teaching, max_train_steps=2)
    first, later = teaching / "checkpoints/0000003.pt", tiny.flow_file(teaching / "checkpoints/0000005.pt", std=0.1)
    named = rf"--teacher {teaching}: {first}.* pass another --teacher with --allow-changes"
    first.rename(tmp_path / "kept.pt")
    with pytest.raises(InputError, match=named) as gone:
        distilled(data, tmp_path, flow, teaching)
    assert "is gone" in str(gone.value)
    later.rename(first)
    with pytest.raises(InputError, match=named) as other:
        distilled(data, tmp_path, flow, teaching)
    assert "has other weights" in str(other.value)
    distilled(data, tmp_path, flow, first, allow_changes=True)
    content = tiny.load(run / "checkpoints/0000004.pt")
    assert content["config"]["changes"][0]["changes"]["teacher"] == [str(teaching), str(first)]


def test_a_run_without_a_record_of_its_teacher_resumes_with_the_newest(data, flow, teaching, tmp_path):
    run = distilled(data, tmp_path, flow, teaching, max_train_steps=2)
    content = tiny.load(run / "checkpoints/0000002.pt")
    del content["config"]["teacher_source"]
    torch.save(content, run / "checkpoints/0000002.pt")
    later = tiny.flow_file(teaching / "checkpoints/0000005.pt", std=0.1)
    distilled(data, tmp_path, flow, teaching)
    assert tiny.load(run / "checkpoints/0000004.pt")["config"]["teacher_source"]["file"] == str(later)


def test_all_processes_have_the_teacher_that_the_first_one_finds(data, flow, teaching, tmp_path, monkeypatch):
    """It sends the others its finding; another process may look when there is already a newer checkpoint."""
    first, later = teaching / "checkpoints/0000003.pt", tiny.flow_file(teaching / "checkpoints/0000005.pt", std=0.1)
    monkeypatch.setattr(training.flow_map, "broadcast_object_list", lambda own: [str(first), None])
    run = distilled(data, tmp_path, flow, teaching, max_train_steps=1)
    assert later.exists()
    assert tiny.load(run / "checkpoints/0000001.pt")["config"]["teacher_source"]["file"] == str(first)
