"""Photographs with captions, by the commands that a person types: prepare, train, kill, resume, sample, score."""

import json
import time

import captioned
import numpy as np
import programs
import pytest
import tiny
from evaluation_helpers import script

TOOL, METRICS = ("-m", "preprocessing.dataset_tools"), ("-m", "evaluations.calculate_metrics")
TRAIN = {"model": "DeepFlow-MMDiT-Ti/2", "trans_depth": 2, "df_idxs": "1", "batch_size": 3, "max_train_steps": 40}
TRAIN.update(sampling_steps=0, rolling_steps=10, log_every=1, learning_rate=1e-3, resume="auto")


def run(*command, starter=programs.run):
    done = starter(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_command(data, output_dir):
    return ["train_t2i.py", *tiny.flags(exp_name="run", data_dir=data, output_dir=output_dir, **TRAIN)]


def kill_after_a_checkpoint(command, folder):
    """Start training and end it by SIGKILL once it has written a checkpoint."""
    process = programs.start(*command)
    try:
        while not list(folder.glob("run/checkpoints/*.pt")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_from_photographs_to_scores(tmp_path):
    photos, data = captioned.photos(tmp_path / "photos"), tmp_path / "data"
    annotations = captioned.coco_json(tmp_path / "captions.json")
    vae, clip = tiny.vae_folder(tmp_path / "vae"), captioned.text_folder(tmp_path / "clip")
    size = ["--resolution", "16x16", "--transform", "center-crop", "--workers", "1"]
    run(*TOOL, "convert", "--source", photos, "--dest", data / "images", *size)
    run(*TOOL, "encode", "--source", data / "images", "--dest", data / "vae-sd", "--vae", vae, "--packed")
    text = ["--annotations", annotations, "--text-encoder", clip, "--batch-size", "4"]
    run(*TOOL, "captions", "--source", data / "images", "--dest", data / "text", *text)
    assert "no fault found" in run(*TOOL, "verify", data)

    kill_after_a_checkpoint(train_command(data, tmp_path / "killed"), tmp_path / "killed")
    for folder in ("killed", "whole"):
        run(*train_command(data, tmp_path / folder))
    last = "run/checkpoints/0000040.pt"
    resumed, whole = tiny.load(tmp_path / "killed" / last), tiny.load(tmp_path / "whole" / last)
    assert resumed["steps"] == 40
    assert [tiny.differences(resumed[name], whole[name]) for name in ("model", "ema", "opt")] == [[], [], []]

    ckpt, samples = tmp_path / "killed" / last, tmp_path / "samples"
    values = {"ckpt": ckpt, "sample_dir": samples, "prompts": annotations, "num_steps": 4, "per_proc_batch_size": 2}
    run(2, "generate_t2i.py", *tiny.flags(**values), starter=programs.run_ranks)
    folder, images, manifest = tiny.results(samples)
    assert images.shape == (captioned.COUNT, 16, 16, 3)
    assert len(list(folder.glob("*.png"))) == len(manifest["labels"]) == captioned.COUNT
    assert len(np.unique(images.reshape(captioned.COUNT, -1), axis=0)) == captioned.COUNT

    measured = ["--features", script(tmp_path / "corners.pt"), "--json", tmp_path / "adm.json"]
    assert "FD (corners)" in run("-m", "evaluations.evaluator", data / "images", f"{folder}.npz", *measured)
    features = ["--metrics", "", "--features", tmp_path / "corners.pt"]
    run(*METRICS, "ref", "--data", data / "images", "--dest", tmp_path / "ref.pkl", *features)
    command = [*METRICS, "calc", "--images", f"{folder}.npz", "--ref", tmp_path / "ref.pkl", *features]
    assert "fd_corners = " in run(*command, "--num", captioned.COUNT)

    scored = captioned.clip_folder(tmp_path / "clip-score")
    command = ["-m", "evaluations.clip_score", f"{folder}.npz", "--clip", scored, "--json", tmp_path / "r.json"]
    assert "clip_score_raw" in run(*command)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["manifest"]["step"] == 40
    assert all(np.isfinite(value) for value in result["metrics"].values())


def test_a_small_model_learns_four_captioned_latents():
    """The loss of the final branch falls; text decides which of the four it is."""
    import torch

    from loss import deepflow_loss
    from models import create_model
    from models.paths import PATHS

    torch.manual_seed(0)
    options = {"depth": 3, "df_idxs": (1, 2), "hidden_size": 96, "num_heads": 3, "projector_dim": 32}
    model = create_model("DeepFlow-MMDiT-Ti/2", **options, input_size=8, context_dim=16)
    x0, context = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16)
    optimizer, losses, path = torch.optim.AdamW(model.parameters(), lr=2e-3), [], PATHS["linear"]
    for _ in range(120):
        noise, t = torch.randn_like(x0), torch.rand(4)
        times = torch.stack([t, (t + 0.005).clamp(max=1), (t + 0.01).clamp(max=1)])
        out = model(path.interpolate(x0, noise, t), list(times), context)
        loss = deepflow_loss(out, x0, noise, times, path, [0.2, 0.2, 1.0], 1.0)
        optimizer.zero_grad()
        loss.total.mean().backward()
        optimizer.step()
        losses.append(loss.velocity[-1].mean().item())
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:5]) / 5
