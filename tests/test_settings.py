"""The settings of a run: names that tell them, changes on resume that are recorded, what may be left out."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re

import programs
import pytest
import tiny
import torch

from common.flags import parse_flags
from models.presets import model_config
from models.specs import TRAINING
from training.checkpoint import checkpoint_path
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig
from training.logs import resumed_steps

# Settings that the manifests of samples record otherwise (the model, the path), or that only say how a file is read.
UNRECORDED = {"model", "trans_depth", "path_type", "prediction", "enc_ckpt", "convention"}
LOGNORMAL = ["--weighting", "lognormal"]


@pytest.mark.parametrize("config", [TrainConfig, FlowMapConfig, TextTrainConfig])
def test_every_setting_that_affects_the_weights_is_recorded(config):
    recorded = UNRECORDED | {*TRAINING, *model_config(config().model)}
    fields = {field.name: field.metadata["free"] for field in dataclasses.fields(config)}
    assert {name for name, free in fields.items() if not free} <= recorded
    assert not {name for name, free in fields.items() if free} & {*TRAINING}


def name_of(cls, *line, resolution=256):
    """The derived name of a command line."""
    return parse_flags(cls, line).resolve().named(resolution).exp_name


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "deepflow-xl-3t"),
        ("--weighting uniform", "deepflow-xl-3t-uniform"),
        ("--model DeepFlow-B/2 --trans-depth 12 --df-idxs [6] --scale-weight 0.2 1", "deepflow-b-2t"),
        ("--model DeepFlow-L/2 --trans-depth 21", "deepflow-l-3t-d21"),
        ("--model DeepFlow-B/2 --df-idxs 4", "deepflow-b-2t-k4"),
        ("--model DeepFlow-B/2 --df-idxs 4 8", "deepflow-b-3t"),
        ("--model DeepFlow-B/2 --df-idxs []", "deepflow-b-1t"),
        ("--model SiT-XL/2 --ssl-align", "sit-xl-dinov2b"),
        ("--model SiT-XL/2 --ssl-align --enc-ckpt x.pth", "sit-xl-dinov2b"),
        ("--model SiT-S/4 --ssl-align --enc-type mae-vit-l,clip-vit-L --proj-coeff 1", "sit-s-p4-mael_clipl-proj1.0"),
        ("--model DeepFlow-B/2 --tg-upper-bound 0.05 --acc-coeff 0.5", "deepflow-b-2t-alpha0.05-lambda0.5"),
        ("--model DeepFlow-B/2 --tg-upper-bound 0.01 --acc-coeff 1 --vera gap", "deepflow-b-2t-vera-gap"),
        ("--model DeepFlow-B/2 --vera none --weighting uniform", "deepflow-b-2t-uniform-vera-none"),
        ("--model DeepFlow-B/2 --acc-mlp 2048", "deepflow-b-2t-acc-mlp2048"),
        ("--scale-weight 1 1 1 --qk-norm --mirror", "deepflow-xl-3t-beta1.0_1.0_1.0-qk-norm-mirror"),
        ("--seed 1 --learning-rate 2e-4 --adam-beta2 0.95", "deepflow-xl-3t-lr0.0002-seed1-adam-beta2-0.95"),
        ("--max-train-steps 9 --data-dir x --compile --mixed-precision no", "deepflow-xl-3t"),
        ("--exp-name own", "own"),
    ],
)
def test_names_tell_what_differs_from_the_method(line, name):
    assert name_of(TrainConfig, *LOGNORMAL, *line.split()) == name


@pytest.mark.parametrize(
    ("line", "resolution", "name"),
    [
        ("--init-from x", 256, "dmft-xl"),
        ("--init-from x --model DeepFlow-DMF-B/2 --dmf-depth 6", 256, "deepflow-dmf-b-2t"),
        ("--init-from x --qk-norm --g-max 0.8", 512, "dmft-xl-512"),
        ("--init-from x", 512, "dmft-xl-512-no-qk-norm-g-max-0.7"),
        ("--init-from x --qk-norm --g-max 0.8", 256, "dmft-xl-qk-norm-g-max-0.8"),
        ("--init-from x --g-type distill --omega 1.5", 256, "dmft-xl-g-distill-omega1.5"),
        ("--from-scratch --P-mean-r -1 --dmf-depth 16", 256, "dmft-xl-from-scratch-dmf-depth-16-P-mean-r--1.0"),
    ],
)
def test_names_of_flow_maps(line, resolution, name):
    assert name_of(FlowMapConfig, *line.split(), resolution=resolution) == name


def test_names_of_text_to_image():
    assert name_of(TextTrainConfig) == "deepflow-t2i-3t"
    assert name_of(TextTrainConfig, "--ssl-align", "--legacy-scaling") == "deepflow-t2i-3t-dinov2b-legacy-scaling"
    assert name_of(TextTrainConfig, "--model", "MMDiT-L/2") == "mmdit"
    assert name_of(TextTrainConfig, "--model", "DeepFlow-MMDiT-S/2", *LOGNORMAL) == "deepflow-t2i-s-2t-lognormal"


def test_resolution_is_that_of_the_data():
    assert name_of(TrainConfig, *LOGNORMAL, resolution=512) == "deepflow-xl-3t-512"


def test_a_run_without_a_name_says_which_it_has(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    line = tiny.train_flags(data, tmp_path / "exps", max_train_steps=2)[2:]
    done = programs.run("train.py", *line)
    name = "deepflow-ti-2t-16-d2-bs4-lr0.001"
    assert done.returncode == 0, done.stderr
    assert f"results: {tmp_path}/exps/{name}\n" in done.stdout
    assert tiny.load(checkpoint_path(tmp_path / "exps" / name, 2))["config"]["exp_name"] == name
    done = programs.run("train.py", *line, "--resume", "auto")
    assert (done.returncode, "is complete at step 2" in done.stdout.splitlines()[-1]) == (0, True)


# ------------------------------------------------------------------------------------------- changes on resume


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


def test_changes_are_recorded_in_config_starts_and_checkpoint(data, tmp_path, capsys):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    tiny.run_train(data, tmp_path, max_train_steps=4, resume="auto", learning_rate=1e-4, seed=1, allow_changes=True)
    assert (
        "; changed from here on: --learning-rate was 0.001, is 0.0001, --seed was 0, is 1\n" in capsys.readouterr().out
    )
    first = {"step": 2, "changes": {"learning_rate": [1e-3, 1e-4], "seed": [0, 1]}}
    assert json.loads((run_dir / "config.json").read_text())["changes"] == [first]
    assert tiny.load(checkpoint_path(run_dir, 4))["config"]["changes"] == [first]
    again = {"max_train_steps": 5, "learning_rate": 1e-4, "allow_changes": True}
    tiny.run_train(data, tmp_path, resume="auto", seed=1, **again)  # as recorded: no change
    tiny.run_train(data, tmp_path, resume="auto", seed=2, **{**again, "max_train_steps": 6})
    second = {"step": 5, "changes": {"seed": [1, 2]}}
    assert tiny.load(checkpoint_path(run_dir, 6))["config"]["changes"] == [first, second]
    assert [line["step"] for line in tiny.log_lines(run_dir)] == [1, 2, 3, 4, 5, 6]
    starts = [(line["step"], line["changes"]) for line in tiny.log_lines(run_dir, "starts.jsonl")]
    assert starts == [(0, {}), (2, first["changes"]), (4, {}), (5, second["changes"])]


def test_every_start_is_kept(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, checkpointing_steps=2)
    tiny.run_train(data, tmp_path, resume=2, seed=1, allow_changes=True)
    tiny.run_train(data, tmp_path, resume=2)  # back to the branch before
    tiny.run_train(data, tmp_path, resume="auto")  # complete: no start
    starts = tiny.log_lines(run_dir, "starts.jsonl")
    assert [(line["step"], line["changes"]) for line in starts] == [(0, {}), (2, {"seed": [0, 1]}), (2, {})]
    for line in starts:
        assert datetime.datetime.fromisoformat(line["time"]).tzinfo and line["host"] == platform.node()
        assert line["versions"]["torch"] == importlib.metadata.version("torch")
    assert resumed_steps(run_dir) == [2, 2]
    assert "changes" not in tiny.load(checkpoint_path(run_dir, 4))["config"]


def test_runs_from_before_starts_were_kept(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=2)
    (run_dir / "starts.jsonl").unlink()
    with open(run_dir / "log.jsonl", "a") as file:
        file.write('{"step": 2, "changes": {"seed": [0, 1]}}\n')
    assert resumed_steps(run_dir) == []
    tiny.run_train(data, tmp_path, resume="auto")
    assert resumed_steps(run_dir) == [2]
    assert [line["step"] for line in tiny.log_lines(run_dir) if "changes" not in line] == [1, 2, 3, 4]


def test_what_is_free_or_said_in_other_words_is_no_change(data, tmp_path):
    tiny.run_train(data, tmp_path, max_train_steps=2)
    same = {"scale_weight": [0.2, 1.0], "tg_upper_bound": 0.01, "resolution": 16, "num_classes": 3}
    same["acc_mlp"] = [256, 512, 256]
    free = {"gradient_accumulation_steps": 2, "fused_attn": False, "log_every": 2, "gradient_checkpointing": True}
    run_dir = tiny.run_train(data.rename(tmp_path / "moved"), tmp_path, resume="auto", **same, **free)
    assert "changes" not in tiny.load(checkpoint_path(run_dir, 4))["config"]


def test_old_runs_had_the_defaults_of_newer_flags(data, tmp_path):
    path = checkpoint_path(tiny.run_train(data, tmp_path, max_train_steps=2), 2)
    content = tiny.load(path)
    for name in ("vera", "acc_mlp", "max_bad_steps", "proj_coeff", "mirror", "acc_coeff"):
        content["config"].pop(name)
        content["config"]["model_options"].pop(name, None)
    content["config"].update(scale_weight=None, resolution=None)
    torch.save(content, path)
    tiny.run_train(data, tmp_path, max_train_steps=3, resume="auto")


def test_a_resumed_flow_map_may_leave_out_where_it_started(data, tmp_path):
    flow, other = (tiny.flow_file(tmp_path / f"{name}.pt") for name in ("flow", "other"))
    tiny.run_train_dmf(data, tmp_path, flow, max_train_steps=2)
    flow.unlink()
    run_dir = tiny.run_train_dmf(data, tmp_path, None, max_train_steps=3, from_scratch=False, resume="auto")
    assert tiny.load(checkpoint_path(run_dir, 3))["config"]["init_from"] == str(flow)
    with pytest.raises(ValueError, match=f"--init-from was {flow}, is {other}; start afresh"):
        tiny.run_train_dmf(data, tmp_path, other, resume="auto")


# ------------------------------------------------------------------------------------------------------- hours


def test_a_dry_run_tells_the_hours(tmp_path, capsys):
    flags = {"model": "DeepFlow-B/2", "trans_depth": 12, "df_idxs": "6", "dry_run": True, "max_train_steps": 400_000}
    flags.update(batch_size=256, hours_on="H100", mfu=0.5)
    tiny.run_train(tmp_path / "nowhere", tmp_path, **flags)
    lines = capsys.readouterr().out.splitlines()
    (gflop,) = (float(re.search(r"([\d.]+) GFLOP", line)[1]) for line in lines if line.startswith("model: "))
    hours = 3 * gflop * 1e9 * 400_000 * 256 / (0.5 * 989.5e12) / 3600
    assert f"{hours:,.1f} hours on 1 H100 at 50% of the bf16 peak, {hours:,.1f} GPU-hours" in lines


def test_operations_are_counted_once(data, tmp_path, monkeypatch):
    from training import run

    counted = []
    monkeypatch.setattr(run, "count_flops", lambda model, count=run.count_flops: counted.append(model) or count(model))
    tiny.run_train(data, tmp_path, max_train_steps=1)
    assert len(counted) == 1
