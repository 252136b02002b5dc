"""Speed of the networks on this machine, as ratios measured in one run.

    python benchmarks/network.py [--model DeepFlow-B/2] [--batch-size 8] [--seconds 10]

Compares the inference path (`velocity`, no intermediate layer) with the whole forward pass, fused with plain attention,
and a training step of DeepFlow with one of SiT-{same size}, which has one branch.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loss import deepflow_loss
from models import create_model
from models.errors import exit_on_input_error
from models.paths import PATHS
from training.distributed import set_math


def best_seconds(run, device, seconds):
    """Shortest of repeated runs within a time budget, after one warm-up."""
    run()
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def inputs(model, batch_size, device):
    """Random x (N, C, H, W), t (N,), y (N,)."""
    g = torch.Generator(device).manual_seed(0)
    size = int(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    x = torch.randn(batch_size, model.in_channels, size, size, generator=g, device=device)
    return x, torch.rand(batch_size, generator=g, device=device), torch.arange(batch_size, device=device)


def training_step(model, x, t, y):
    """Forward, DeepFlow's loss and backward."""
    times = torch.stack([t] * model.num_branches)
    weights = [0.2] * (model.num_branches - 1) + [1.0]
    out = model(x, list(times), y)
    deepflow_loss(out, x, x, times, PATHS["linear"], weights, 1.0).total.mean().backward()
    model.zero_grad()


def sampling_call(model, x, t, y, whole):
    with torch.no_grad():
        return model(x, t, y).velocities[-1] if whole else model.velocity(x, t, y)


def measure(args, device):
    """[(what, seconds)] in the order of measurement."""
    model = create_model(args.model).to(device)
    batch = inputs(model, args.batch_size, device)
    rows = [("velocity", best_seconds(lambda: sampling_call(model, *batch, False), device, args.seconds))]
    rows.append(("whole forward", best_seconds(lambda: sampling_call(model, *batch, True), device, args.seconds)))
    set_math(allow_tf32=True, fused_attn=False)
    rows.append(
        ("velocity, plain attention", best_seconds(lambda: sampling_call(model, *batch, False), device, args.seconds))
    )
    set_math(allow_tf32=True, fused_attn=True)
    rows.append(
        (f"training step {args.model}", best_seconds(lambda: training_step(model, *batch), device, args.seconds))
    )
    baseline = create_model(args.model, df_idxs=()).to(device)
    rows.append(
        ("training step, one branch", best_seconds(lambda: training_step(baseline, *batch), device, args.seconds))
    )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DeepFlow-B/2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10, help="time for each row")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{args.model}, batch {args.batch_size}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    set_math(allow_tf32=True)
    rows = measure(args, device)
    for what, seconds in rows:
        rate = args.batch_size / seconds
        print(f"{what:32s} {seconds * 1e3:9.1f} ms {rate:9.1f} samples/s {seconds / rows[0][1]:5.2f} x the first")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
