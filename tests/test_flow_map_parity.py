"""Flow maps against the reference values of the published Decoupled MeanFlow."""

import inspect

import parity
import pytest
import torch
from test_models_parity import TOLERANCE, ids

from models.checkpoints import load_strictly
from models.deepflow import DeepFlow
from models.flow_map import FlowMap


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
