"""What only a CUDA device shows: mixed precision with a scaler, pinned copies, CPU and GPU agreeing.

python -m pytest -m gpu
"""

import json

import numpy as np
import pytest
import tiny
import torch

from models import create_model
from models.paths import PATHS
from samplers import SAMPLERS, GuidedVelocity, integrate, sample_noise
from training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_learns_in_every_precision(tmp_path, precision):
    data = tiny.data_folder(tmp_path / "data")
    run_dir = tiny.run_train(data, tmp_path, mixed_precision=precision, max_train_steps=60, log_every=20)
    losses = [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    checkpoint = tiny.load(run_dir / "checkpoints" / "0000060.pt")
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint["model"].values())
    assert (checkpoint["scaler"] is not None) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_step_waits_for_the_device_between_logs(tmp_path, monkeypatch, precision):
    """From the third step on: the first make the optimizer's state and find the kernels."""
    data = tiny.data_folder(tmp_path / "data")

    def train_step(self, batch, draws, original=Trainer.train_step):
        torch.cuda.set_sync_debug_mode("error" if batch.step >= 2 else "default")
        try:
            return original(self, batch, draws)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run_dir = tiny.run_train(data, tmp_path, mixed_precision=precision, max_train_steps=8, log_every=4)
    assert [line["step"] for line in tiny.log_lines(run_dir)] == [4, 8]


@pytest.mark.parametrize("changes", [{"dtype": "bf16", "vae_dtype": "bf16"}, {"dtype": "fp16"}, {"compile": True}])
def test_images_of_the_device_are_those_of_the_cpu(tmp_path, monkeypatch, changes):
    ckpt = tiny.checkpoint(tmp_path / "c.pt", tiny.vae_folder(tmp_path / "tiny-vae"))
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "gpu", cfg_scale=1.5, guidance_high=0.5, **changes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, expected, _ = tiny.run_generate(ckpt, tmp_path / "cpu", cfg_scale=1.5, guidance_high=0.5)
    assert np.abs(array.astype(int) - expected).mean() < 1


def test_sampler_on_the_device_agrees_with_the_cpu():
    model = create_model("DeepFlow-Ti/2", input_size=8, num_classes=3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    torch.set_float32_matmul_precision("highest")
    results = []
    for device in ("cpu", "cuda"):
        y = torch.arange(4, device=device) % 3
        velocity = GuidedVelocity(model.to(device).velocity, y, torch.full_like(y, 3))
        start = sample_noise(0, range(4), 0, (4, 8, 8)).to(device)
        noise = lambda step: sample_noise(0, range(4), step + 1, (4, 8, 8))  # noqa: E731
        sde = SAMPLERS["sde"]
        result = integrate(sde.step(PATHS["linear"], noise), velocity, start, sde.times(20))
        assert result.dtype == torch.float64
        results.append(result.cpu().numpy())
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)
