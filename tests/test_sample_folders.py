"""Where samples lie and what their folders are called; a finished rerun says so in one line."""

import shutil
import types

import pytest
import tiny

from common.flags import parse_flags
from generate import GenerateConfig, generate
from models.checkpoints import Checkpoint
from models.specs import LatentSpec
from sampling.results import default_folder, result_name

CKPT = "exps/b/checkpoints/0400000.pt"


def name(steps=400_000, exp_name="b", decoder="a" * 64, **changes):
    """The name of a result of a checkpoint with step, run and VAE only; decoder: hash of the one used."""
    settings = {"ckpt": CKPT, "sample_dir": "samples", "mode": "sde", "num_steps": 250, **changes}
    checkpoint = Checkpoint(None, {}, {"exp_name": exp_name}, {"decoder_sha256": "a" * 64}, steps, CKPT)
    spec = LatentSpec(decoder_sha256=decoder)
    return result_name(types.SimpleNamespace(config=GenerateConfig(**settings), checkpoint=checkpoint, spec=spec))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "b-0400000-sde-250-seed-0"),
        ({"mode": "ode", "heun": True, "num_steps": 50, "global_seed": 7}, "b-0400000-ode-heun-50-seed-7"),
        ({"weights": "raw", "decode": False}, "b-0400000-raw-sde-250-seed-0-latents"),
        ({"cfg_scale": 1.5}, "b-0400000-sde-250-cfg-1.5-seed-0"),
        (
            {"cfg_scale": 1.5, "guidance_low": 0.3, "guidance_high": 0.7},
            "b-0400000-sde-250-cfg-1.5-interval-0.3-0.7-seed-0",
        ),
        ({"guidance_low": 0.3}, "b-0400000-sde-250-seed-0"),  # without guidance
        ({"mode": "euler", "num_steps": 4, "shift": 1.5}, "b-0400000-euler-4-shift-1.5-seed-0"),
        ({"ckpt": "published/XL 2.pt", "steps": None, "exp_name": None}, "XL-2-sde-250-seed-0"),
        ({"ckpt": "a.pt", "steps": None, "exp_name": None, "model": "SiT-B/2"}, "SiT-B-2-a-sde-250-seed-0"),
        ({"labels": "balanced", "dtype": "bf16"}, "b-0400000-sde-250-labels-balanced-bf16-seed-0"),
        ({"vae_dtype": "fp16", "tf32": False}, "b-0400000-sde-250-vae-fp16-no-tf32-seed-0"),
        ({"fused_attn": False, "per_proc_batch_size": 4}, "b-0400000-sde-250-no-fused-attn-seed-0"),
        ({"vae": "mse", "decoder": "b" * 64}, "b-0400000-sde-250-vae-bbbbbbbb-seed-0"),
        ({"labels": "lists/a.txt", "vae": "/vaes/mse/"}, "b-0400000-sde-250-labels-a.txt-seed-0"),  # a VAE may move
        ({"labels": ",".join(["7"] * 40)}, "b-0400000-sde-250-labels-5499fac9-seed-0"),
        ({"exp_name": "../α = 1"}, "..-α-=-1-0400000-sde-250-seed-0"),
    ],
)
def test_a_result_is_called_after_what_differs(changes, expected):
    assert name(**changes) == expected


def test_the_default_folder_lies_in_the_run(tmp_path):
    ckpt = tmp_path / CKPT
    ckpt.parent.mkdir(parents=True)
    assert default_folder(ckpt) == "samples"  # a folder of published files may be called so
    (tmp_path / "exps/b/config.json").touch()
    assert default_folder(ckpt) == str(tmp_path / "exps/b/generated")


def run(ckpt, **changes):
    """Sample without --sample-dir."""
    line = tiny.flags(**{"ckpt": ckpt, "num_fid_samples": 5, "num_steps": 2, "per_proc_batch_size": 2, **changes})
    with tiny.one_thread():
        return generate(parse_flags(GenerateConfig, line).resolve())


@pytest.mark.parametrize("format", ["both", "npz", "png"])
def test_samples_lie_in_their_run_and_a_finished_rerun_is_one_line(ckpt, tmp_path, monkeypatch, capsys, format):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "exps/tiny/checkpoints/0000003.pt"
    copy.parent.mkdir(parents=True)
    shutil.copyfile(ckpt, copy)
    (tmp_path / "exps/tiny/config.json").touch()
    made = run("exps/tiny", format=format)
    assert str(made) == "exps/tiny/generated/tiny-0000003-sde-2-seed-0.npz" and made.exists() == (format != "png")
    other = run("exps/tiny", format=format, cfg_scale=1.5)
    assert other.parent == made.parent and other.name == "tiny-0000003-sde-2-cfg-1.5-seed-0.npz"
    capsys.readouterr()
    rows = tiny.count_calls(monkeypatch)
    run("exps/tiny", format=format)
    (line,) = capsys.readouterr().out.splitlines()
    assert "finished" in line and str(made.with_suffix("")) in line and rows == []
    assert run(ckpt).parts == ("samples", "tiny-0000003-sde-2-seed-0.npz")


def test_a_folder_under_the_name_of_an_earlier_version_goes_on_when_renamed(ckpt, tmp_path, monkeypatch):
    folder, _, _ = tiny.run_generate(ckpt, tmp_path / "old")
    (folder / "000004.png").unlink()
    (tmp_path / "new").mkdir()
    folder.rename(tmp_path / "new" / folder.name)
    rows = tiny.count_calls(monkeypatch)
    tiny.run_generate(ckpt, tmp_path / "new")
    assert rows == [1] * 4
