"""The training objective against reference values and known answers."""

import numpy as np
import parity
import pytest
import torch
from scipy import stats
from test_models_parity import build, ids

from loss import alignment_loss, deepflow_loss, sample_times
from models.checkpoints import load_strictly
from models.deepflow import DeepFlow, DeepFlowOutput
from models.paths import PATHS

TOLERANCE = 2e-6


def recorded_losses():
    """(case, draw) for every recorded draw of the training loss."""
    for case in parity.cases("deepflow"):
        prefixes = {"/".join(key.split("/")[:2]) for key in parity.family("deepflow")[1] if "/loss_" in key}
        yield from ((case, prefix) for prefix in sorted(prefixes) if prefix.startswith(case["id"] + "/"))


@pytest.mark.parametrize(("case", "draw"), list(recorded_losses()), ids=ids)
def test_parity_loss(case, draw):
    values = parity.arrays("deepflow", draw)
    model = build(case["config"])
    load_strictly(model, parity.parameters("deepflow", case), case["id"])
    path, times = PATHS["linear"], values["t"]
    with torch.no_grad():
        out = model(path.interpolate(values["x0"], values["noise"], times[0]), list(times), values["y"])
        loss = deepflow_loss(out, values["x0"], values["noise"], times, path, case["branch_weights"], acc_coeff=1.0)
    assert parity.relative_error(loss.deep, values["denoising_loss"]) < TOLERANCE
    assert parity.relative_error(loss.acceleration.sum(0), values["acceleration_loss"]) < TOLERANCE
    torch.testing.assert_close(loss.total, loss.deep + loss.acceleration.sum(0))
    if "encoder_features" in values:
        aligned = alignment_loss(out.projections, [values["encoder_features"]]).mean()
        assert abs(aligned.item() - values["projection_loss"].item()) < 1e-7


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_at_initialisation_losses_have_closed_forms(path, branches):
    df_idxs = {1: (), 2: (1,), 3: (1, 2)}[branches]
    model = DeepFlow(
        input_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=3, df_idxs=df_idxs, projector_dim=8
    )
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 4, 4, generator=g)
    times = torch.rand(branches, 5, generator=g)
    path = PATHS[path]
    out = model(path.interpolate(x0, noise, times[0]), list(times), torch.tensor([0, 1, 2, 3, 3]))
    assert all((v == 0).all() for v in out.velocities + out.accelerations)
    loss = deepflow_loss(out, x0, noise, times, path, [0.2] * (branches - 1) + [1.0], acc_coeff=1.0)
    target = path.velocity(x0, noise, times[0])
    for row in loss.velocity:
        torch.testing.assert_close(row, target.square().mean(dim=(1, 2, 3)))
    assert len(loss.acceleration) == branches - 1
    for row, t in zip(loss.acceleration, times[:-1], strict=True):
        moved = path.interpolate(x0, noise, t) - x0
        torch.testing.assert_close(row, moved.square().mean(dim=(1, 2, 3)))


def test_acceleration_does_not_train_the_velocity_it_extrapolates():
    v1, v2, a1 = (torch.randn(2, 4, 2, 2, requires_grad=True) for _ in range(3))
    x0, noise = torch.randn(2, 2, 4, 2, 2)
    times = torch.full((2, 2), 0.5)
    loss = deepflow_loss(DeepFlowOutput([v1, v2], [a1], []), x0, noise, times, PATHS["linear"], [0.0, 0.0], 1.0)
    loss.total.sum().backward()
    assert (v1.grad == 0).all()
    assert a1.grad.abs().min() > 0


def test_the_true_acceleration_has_no_loss():
    """On the cosine path, solve x_t − v·t + ½·a·t² = x_0 for a; the loss there is zero for any v."""
    path = PATHS["cosine"]
    x0, noise, v = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    times = torch.rand(2, 2, dtype=torch.float64) * 0.5 + 0.5
    t = times[0].view(-1, 1, 1, 1)
    a = 2 * (x0 - path.interpolate(x0, noise, times[0]) + v * t) / t**2
    out = DeepFlowOutput([v, v], [a], [])
    assert deepflow_loss(out, x0, noise, times, path, [0.2, 1.0], 1.0).acceleration.max() < 1e-12


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_target_is_the_derivative_of_the_path(path):
    path = PATHS[path]
    x0, noise = torch.randn(2, 7, 4, 2, 2, dtype=torch.float64)
    t = torch.rand(7, dtype=torch.float64) * 0.9 + 0.05
    h = 1e-6
    difference = (path.interpolate(x0, noise, t + h) - path.interpolate(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(x0, noise, t), difference, rtol=1e-7, atol=1e-8)


def test_times_follow_their_distributions():
    draw = {
        (w, p): sample_times(np.random.default_rng(0), 20_000, 1, w, PATHS[p], 0.01)[0].double().numpy()
        for w in ("uniform", "lognormal")
        for p in ("linear", "cosine")
    }
    assert stats.kstest(draw["uniform", "linear"], "uniform").pvalue > 0.01
    assert stats.kstest(draw["uniform", "cosine"], "uniform").pvalue > 0.01
    t = draw["lognormal", "linear"]
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 0.01
    t = draw["lognormal", "cosine"]
    assert stats.kstest(np.log(np.tan(t * np.pi / 2)), "norm").pvalue > 0.01


def test_gaps_are_bounded_and_share_one_sign():
    rng = np.random.default_rng(0)
    signs = set()
    for _ in range(20):
        times = sample_times(rng, 500, 3, "uniform", PATHS["linear"], 0.05).double()
        gaps = times.diff(dim=0)
        assert times.min() >= 0 and times.max() <= 1
        assert gaps.abs().max() <= 0.05 + 1e-6
        assert (gaps >= 0).all() or (gaps <= 0).all()
        signs.add(gaps.sum().sign().item())
        inside = gaps[:, (times.min(0).values > 0) & (times.max(0).values < 1)].abs().flatten().numpy()
        assert stats.kstest(inside / 0.05, "uniform").pvalue > 1e-4
    assert signs == {1.0, -1.0}


def test_losses_are_fp32_under_autocast():
    v = torch.full((2, 4, 2, 2), 300.0, dtype=torch.bfloat16)
    x0 = noise = torch.zeros(2, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = DeepFlowOutput([v, v], [v], [])
        loss = deepflow_loss(out, x0, noise, torch.ones(2, 2), PATHS["linear"], [0.2, 1.0], 1.0)
        aligned = alignment_loss([v.flatten(2)], [v.flatten(2)])
    assert loss.total.dtype == aligned.dtype == torch.float32
    assert loss.velocity[0, 0].item() == 90_000.0  # bf16 would round it to 90112


def test_alignment_of_equal_and_opposite_features():
    f = torch.randn(2, 3, 5)
    assert alignment_loss([f, 2 * f], [f]).tolist() == pytest.approx([-1, -1], abs=1e-6)
    assert alignment_loss([f, -f], [f]).tolist() == pytest.approx([-1, 1], abs=1e-6)


def test_alignment_pairs_projections_with_encoders_block_by_block():
    """Two blocks, two encoders of other widths: the projections of a block follow each other."""
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    assert alignment_loss([a, b, -a, b], [a, b]).tolist() == pytest.approx([-1, -1, 1, -1], abs=1e-6)
    with pytest.raises(ValueError, match="3 projections do not fit 2 encoders"):
        alignment_loss([a, b, a], [a, b])
