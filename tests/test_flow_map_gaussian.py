"""A flow map trained on Gaussian data, whose average velocity has a closed form.

On the linear path x_t ~ N((1 − t)·μ, s_t²) with s_t² = (1 − t)²·σ² + t², coordinate by coordinate, and the flow keeps
(x_t − (1 − t)·μ) / s_t: so u(x_t, t, r) = (x_r − x_t) / (r − t) with x_r = (1 − r)·μ + s_r/s_t · (x_t − (1 − t)·μ).
"""

import math

import pytest
import torch

from loss import GuidedTarget, flow_map_loss, flow_map_targets, flow_map_times
from models.flow_map import FlowMap
from models.paths import PATHS
from samplers import GuidedVelocity, integrate, map_step, time_grid
from training.draws import FlowMapDraws
from training.ema import EMA

MEAN = torch.tensor([1.0, -0.5, 0.25, 0.0]).view(1, 2, 2)
STD = torch.tensor([0.3, 0.8, 0.5, 1.0]).view(1, 2, 2)
PATH = PATHS["linear"]
UNUSED = torch.empty(0)
BATCH, STEPS = 512, 750
P_MEAN, P_STD = (0.0, 1.2, -2.0), (1.2, 2.2, 2.2)  # wider than published: one step goes from t = 1 to r = 0


def average_velocity(x, t, r):
    """The closed form; x (N, 1, 2, 2), t > r (N,)."""
    t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    s_t, s_r = (((1 - time) ** 2 * STD**2 + time**2).sqrt() for time in (t, r))
    x_r = (1 - r) * MEAN + s_r / s_t * (x - (1 - t) * MEAN)
    return (x_r - x) / (r - t)


def draw(normals):
    """Data and the draws of one step, from standard normal numbers (N, 15)."""
    x0, noise, map_noise, times = normals.split((4, 4, 4, 3), dim=1)
    x0, noise, map_noise = (part.reshape(-1, 1, 2, 2) for part in (x0, noise, map_noise))
    unguided = torch.zeros(2, len(normals), dtype=torch.bool)
    times = flow_map_times(times.T, P_MEAN, P_STD)
    return MEAN + STD * x0, FlowMapDraws(times, UNUSED, UNUSED, noise, map_noise, unguided)


def optimizers(model):
    """[(optimizer, learning rate)]: Muon for the matrices of blocks and times, AdamW for the rest."""
    parts = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[parameter.ndim == 2 and name.startswith(("blocks", "t_embedder"))].append(parameter)
    muon = torch.optim.Muon(parts[True], weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(parts[False], betas=(0.9, 0.99), weight_decay=0, fused=True)
    return [(muon, 2e-2), (adam, 1e-2)]


def trained_map(seed=0):
    """A small flow map of one token, trained from random weights; its averaged weights.

    What its steps draw covers the distributions more evenly than chance, so that fewer steps are enough.
    """
    torch.manual_seed(seed)
    sizes = {"input_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 1}
    model, sobol = (
        FlowMap(**sizes, df_idxs=(), dmf_depth=1),
        torch.quasirandom.SobolEngine(15, scramble=True, seed=seed),
    )
    torch.nn.init.normal_(model.t_embedder.mlp[0].weight, std=1.5)  # or it takes long until u depends on the times
    torch.nn.init.xavier_uniform_(model.t_embedder.mlp[2].weight)
    pairs, ema, y = optimizers(model), EMA(model, 0.99), torch.zeros(BATCH, dtype=torch.long)
    for step in range(STEPS):
        for optimizer, rate in pairs:
            schedule = min((step + 1) / 20, 1) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
            optimizer.param_groups[0]["lr"] = rate * schedule
            optimizer.zero_grad()
        x0, draws = draw(torch.special.ndtri(sobol.draw(BATCH, dtype=torch.float64).clamp(1e-7, 1 - 1e-7)).float())
        targets = flow_map_targets(model, GuidedTarget(), x0, y, draws, PATH)
        out = model(targets.x, targets.t, targets.y, targets.r)
        flow_map_loss(out.velocities[-1], out.log_variance, targets.target).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in pairs:
            optimizer.step()
        ema.update(model)
    model.load_state_dict({**model.state_dict(), **ema.state_dict()})
    return model.eval()


@pytest.mark.slow
def test_a_trained_flow_map_has_the_average_velocity_of_gaussian_data():
    """Four seeds gave errors of 0.049 to 0.071, 0.020 to 0.046 and 0.016 to 0.056."""
    error, off_mean, off_covariance = errors(trained_map())
    assert error < 0.1
    assert off_mean < 0.06
    assert off_covariance < 0.1


def errors(model):
    """Of the average velocity, relative; and of mean and covariance of samples of one step, absolute."""
    g, n = torch.Generator().manual_seed(1), 4000
    y = torch.zeros(n, dtype=torch.long)
    t = 0.1 + 0.9 * torch.rand(n, generator=g)
    r = 0.9 * t * torch.rand(n, generator=g)
    x0, draws = draw(torch.randn(n, 15, generator=g))
    x = PATH.interpolate(x0, draws.noise, t)
    with torch.no_grad():
        u, exact = model.average_velocity(x, t, r, y), average_velocity(x, t, r)
    error = ((u - exact).square().mean() / exact.square().mean()).sqrt()
    u = GuidedVelocity(model.average_velocity, y, y)
    one_step = integrate(map_step, u, draws.map_noise, time_grid(1)).flatten(1)
    off_mean = (one_step.mean(0) - MEAN.flatten()).abs().max()
    off_covariance = (one_step.T.cov() - torch.diag(STD.flatten() ** 2)).abs().max()
    return error.item(), off_mean.item(), off_covariance.item()
