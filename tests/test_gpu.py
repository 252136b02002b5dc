"""What only a CUDA device shows: mixed precision with a scaler, compiled training, no waits, CPU and GPU agree.

    python -m pytest -m gpu tests/test_gpu.py

So that their code does not rot, most run on a CPU as well (with --slow), where nothing is compiled. Packages that a GPU
machine may lack are imported where they are needed.
"""

import numpy as np
import pytest
import tiny
import torch

import train
from common.flags import parse_flags
from models import create_model
from models.flow_map import FlowMap
from models.paths import PATHS
from samplers import SAMPLERS, GuidedVelocity, integrate, sample_noise
from training.config import TextTrainConfig
from training.trainer import Trainer

ENCODER = "dinov2-vit-b"


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The kind of device that programs take."""
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with torch.compiler.set_stance("force_eager"):
        yield "cpu"


@pytest.mark.parametrize(("precision", "compiled"), [("no", False), ("bf16", False), ("bf16", True), ("fp16", False)])
def test_training_learns_in_every_precision(tmp_path, device, precision, compiled):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("needs a GPU")
    data, steps = tiny.data_folder(tmp_path / "data"), 60 if device == "cuda" else 20
    flags = {"mixed_precision": precision, "compile": compiled, "max_train_steps": steps, "log_every": steps // 3}
    run_dir = tiny.run_train(data, tmp_path, **flags)
    losses = [line["loss"] for line in tiny.log_lines(run_dir)]
    assert losses[-1] < losses[0]
    checkpoint = tiny.load(run_dir / f"checkpoints/{steps:07d}.pt")
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint["model"].values())
    assert (checkpoint["scaler"] is not None) == (precision == "fp16")


def train_map(data, folder, **changes):
    return tiny.run_train_dmf(data, folder, None, cfg_prob=0.3, **changes)


def train_text(data, folder, **changes):
    line = tiny.train_flags(data, folder, model="DeepFlow-MMDiT-Ti/2", **changes)
    with tiny.fresh_accelerate():
        train.train(parse_flags(TextTrainConfig, line))
    return folder / "run"


def captioned_folder(folder):
    pytest.importorskip("skimage")
    import captioned

    return captioned.foreign_folder(folder)


DATA = {"alignment": tiny.aligned_folder, "text": captioned_folder}
PROGRAMS = {"train": tiny.run_train, "alignment": tiny.run_train, "flow map": train_map, "text": train_text}


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_step_waits_for_the_device_between_logs(tmp_path, monkeypatch, device, program, precision):
    """From the third step on: the first two create the optimizer's state and select kernels."""
    if device == "cpu" and precision != "bf16":
        pytest.skip("is for GPUs")
    flags = {"mixed_precision": precision, "max_train_steps": 8, "log_every": 4}
    if program == "alignment":
        tiny.shrink_encoder(monkeypatch, ENCODER, width=16, depth=1)
        flags.update(ssl_align=True, enc_ckpt=tiny.encoder_file(ENCODER, tmp_path))
    data = DATA.get(program, tiny.data_folder)(tmp_path / "data")
    checked = []

    def train_step(self, batch, draws, original=Trainer.train_step):
        torch.cuda.set_sync_debug_mode("error" if batch.step >= 2 else "default")
        try:
            checked.append(batch.step)
            return original(self, batch, draws)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run_dir = PROGRAMS[program](data, tmp_path, **flags)
    assert [line["step"] for line in tiny.log_lines(run_dir)] == [4, 8] and checked == [*range(8)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(tmp_path, device, compiled):
    """Equal up to the summation order of a GPU; a wrong state or data order differs by far more."""
    data = tiny.data_folder(tmp_path / "data")
    flags = {"mixed_precision": "bf16", "compile": compiled, "checkpointing_steps": 3}
    whole = tiny.run_train(data, tmp_path, exp_name="whole", max_train_steps=6, **flags)
    tiny.run_train(data, tmp_path, exp_name="parts", max_train_steps=3, **flags)
    parts = tiny.run_train(data, tmp_path, exp_name="parts", max_train_steps=6, resume="latest", **flags)
    losses = [[line["loss"] for line in tiny.log_lines(run_dir)] for run_dir in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    a, b = (tiny.load(run_dir / "checkpoints/0000006.pt") for run_dir in (whole, parts))
    assert tiny.largest_difference(a["ema"], b["ema"]) < 1e-5 and a["steps"] == b["steps"] == 6


@pytest.mark.parametrize("name", ["DMFT-Ti/2", "DeepFlow-DMF-Ti/2"])
def test_the_compiled_derivative_is_the_eager_one(device, name):
    torch.set_float32_matmul_precision("highest")
    model = tiny.fill_(create_model(name, input_size=8, num_classes=3), std=0.05).to(device)
    g = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 4, 4, 8, 8, generator=g).to(device)
    r, t = torch.rand(2, 4, generator=g).sort(dim=0).values.to(device)
    y = torch.tensor([0, 1, 2, 3], device=device)
    eager = FlowMap.derivative(model, x, t, r, y, tangent)
    model.compile_derivative()
    for a, b in zip(model.derivative(x, t, r, y, tangent), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_one_process_of_data_parallel_trains_as_one_without(tmp_path, device):
    """nccl on a GPU, gloo on a CPU, under the real launcher."""
    data, precision = tiny.data_folder(tmp_path / "data"), {"mixed_precision": "bf16"}
    alone = tiny.run_train(data, tmp_path, exp_name="alone", **precision)
    line = tiny.train_flags(data, tmp_path, **precision)
    done = tiny.run_torchrun(1, "train.py", *line)
    assert done.returncode == 0, done.stderr
    losses = [[entry["loss"] for entry in tiny.log_lines(run_dir)] for run_dir in (alone, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"dtype": "bf16", "vae_dtype": "bf16"}, {"dtype": "fp16"}, {"compile": True}])
def test_images_of_the_device_are_those_of_the_cpu(tmp_path, monkeypatch, changes):
    pytest.importorskip("diffusers")
    ckpt = tiny.checkpoint(tmp_path / "c.pt", tiny.vae_folder(tmp_path / "tiny-vae"))
    _, array, _ = tiny.run_generate(ckpt, tmp_path / "gpu", cfg_scale=1.5, guidance_high=0.5, **changes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, expected, _ = tiny.run_generate(ckpt, tmp_path / "cpu", cfg_scale=1.5, guidance_high=0.5)
    assert np.abs(array.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_on_the_device_agrees_with_the_cpu(device, name):
    sampler = SAMPLERS[name]
    preset = "DeepFlow-DMF-Ti/2" if sampler.is_map else "DeepFlow-Ti/2"
    model = tiny.fill_(create_model(preset, input_size=8, num_classes=3), std=0.05)
    torch.set_float32_matmul_precision("highest")
    results = []
    for where in ("cpu", device):
        y = torch.arange(4, device=where) % 3
        model.to(where)
        network = model.average_velocity if sampler.is_map else model.velocity
        velocity = GuidedVelocity(network, y, torch.full_like(y, 3))
        start = sample_noise(0, range(4), 0, (4, 8, 8)).to(where)
        noise = lambda step: sample_noise(0, range(4), step + 1, (4, 8, 8))  # noqa: E731
        result = integrate(sampler.step(PATHS["linear"], noise), velocity, start, sampler.times(20))
        assert result.dtype == torch.float64
        results.append(result.cpu().numpy())
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)
