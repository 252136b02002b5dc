"""Flow maps against the reference values of the published Decoupled MeanFlow."""

import inspect
import re
import types

import parity
import pytest
import torch
from test_models_parity import TOLERANCE, ids

from loss import GuidedTarget, flow_map_loss, flow_map_targets, flow_map_times, guided_samples
from models.checkpoints import load_strictly
from models.deepflow import DeepFlow
from models.flow_map import FlowMap
from models.paths import PATHS
from samplers import SAMPLERS, Guidance, GuidedVelocity, integrate


def build_map(case, dtype=torch.float32):
    """A case's flow map with its weights; its QK norm is the published RMS norm."""
    known = {*inspect.signature(DeepFlow).parameters, "dmf_depth"}
    options = {key: value for key, value in case["config"].items() if key in known}
    model = FlowMap(**{**options, "df_idxs": (), "qk_norm": options["qk_norm"] and "rms"}).to(dtype).eval()
    load_strictly(model, parity.parameters("dmf", case), case["id"])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", parity.cases("dmf"), ids=ids)
def test_parity_dmf_outputs(case, dtype):
    model, values = build_map(case, dtype), parity.arrays("dmf", case["id"])
    x, t, r, tangent = (values[name].to(dtype) for name in ("x", "t", "r", "tangent"))
    with torch.no_grad():
        out = model(x, t, values["y"], r)
    assert parity.relative_error(out.velocities[-1], values["velocity"]) < TOLERANCE
    assert parity.relative_error(out.log_variance, values["logvar"]) < TOLERANCE
    u, du_dt = model.derivative(x, t, r, values["y"], tangent)
    assert parity.relative_error(u, values["average_velocity"]) < TOLERANCE
    assert parity.relative_error(du_dt, values["du_dt"]) < TOLERANCE


def teacher(case):
    """The frozen flow model of the recorded distillation: the SiT of the same sizes with smaller weights."""
    state = parity.parameters("dmf", case, std=0.1)
    model = build_map(case)
    model.load_state_dict(state)
    return model.velocity


def recorded_losses():
    """(case, prefix) for every recorded draw of the training loss."""
    for case in parity.cases("dmf"):
        prefixes = {key.rsplit("/", 1)[0] for key in parity.family("dmf")[1] if key.startswith(f"{case['id']}/loss_")}
        yield from ((case, prefix) for prefix in sorted(prefixes))


LOSSES = list(recorded_losses())


@pytest.mark.parametrize(("case", "prefix"), LOSSES, ids=ids)
def test_parity_dmf_loss(case, prefix):
    model, values, kind = build_map(case), parity.arrays("dmf", prefix), prefix.rsplit("_", 1)[1]
    null = case["config"]["num_classes"]
    velocity = {"default": None, "mg": model.velocity, "distill": teacher(case)}[kind]
    omega = {"default": 0.0, "mg": 0.6, "distill": 1.5}[kind]
    guide = GuidedTarget(kind, omega, velocity, null)
    dropped = values["drop_uniform"] < (0.0 if kind == "distill" else 0.1)
    y = torch.where(dropped, null, values["y"])
    normals = torch.stack([values["z_fm"], values["z_t"], values["z_r"]])
    times = flow_map_times(normals, (0.0, 0.4, -1.2), (1.0, 1.0, 1.0))
    guided = guided_samples(kind, times, dropped, 0.2, 0.7)
    draws = types.SimpleNamespace(times=times, noise=values["noise_fm"], map_noise=values["noise_mf"], guided=guided)
    targets = flow_map_targets(model, guide, values["x0"], y, draws, PATHS["linear"])
    out = model(targets.x, targets.t, targets.y, targets.r)
    loss = flow_map_loss(out.velocities[-1], out.log_variance, targets.target)
    assert parity.relative_error(loss.error.detach(), torch.stack([values["fm_loss"], values["mf_loss"]])) < TOLERANCE
    adaptive = torch.stack([values["fm_p_loss"], values["mf_p_loss"]])
    assert parity.relative_error(loss.adaptive.detach(), adaptive) < TOLERANCE
    assert parity.relative_error(loss.total.detach(), values["loss"]) < TOLERANCE


def recorded_runs():
    """(prefix, restart, steps, shift, guidance scale) of every recorded sampler run."""
    prefixes = {key.rsplit("/", 1)[0] for key in parity.family("dmf")[1] if key.startswith("sampler_")}
    for prefix in sorted(prefixes):
        kind, steps, shift, scale = re.fullmatch(r"sampler_(\w+)_steps(\d+)_shift([\d.]+)_cfg([\d.]+)", prefix).groups()
        yield prefix, kind == "restart", int(steps), float(shift), float(scale)


RUNS = list(recorded_runs())


def test_parity_dmf_values_are_there():
    assert (RUNS and LOSSES) or parity.FIXTURES != parity.OWN_FIXTURES


@pytest.mark.parametrize(("prefix", "restart", "steps", "shift", "scale"), RUNS, ids=[run[0] for run in RUNS])
def test_parity_dmf_samplers(prefix, restart, steps, shift, scale):
    values = parity.arrays("dmf", prefix)

    def network(x, t, r, y):
        assert x.dtype == t.dtype == r.dtype == torch.float32
        t, r, y = (each.view(-1, 1, 1, 1) for each in (t, r, y))
        return 0.6 * x * torch.cos(2 * t - r) + 0.2 * r + 0.1 * (y % 7)

    y = values["y"]
    u = GuidedVelocity(network, y, torch.full_like(y, 1000), Guidance(scale, 0.1, 0.8))
    sampler = SAMPLERS["restart" if restart else "euler"]
    step = sampler.step(PATHS["linear"], lambda i: values["noise"][i])
    result = integrate(step, u, values["latents"], sampler.times(steps, shift))
    assert result.dtype == torch.float64
    assert parity.relative_error(result, values["result"]) < 5e-7
    assert u.calls == steps
