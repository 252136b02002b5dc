"""Networks against the reference values of the published implementations."""

import inspect

import parity
import pytest
import torch

from models.checkpoints import load_strictly
from models.deepflow import DeepFlow
from models.flow_map import FlowMap
from models.presets import build as build_model
from models.published import config_from_state, convert

TOLERANCE = 2e-6


def ids(case):
    return case["id"] if isinstance(case, dict) else str(case)


def build(config, dtype=torch.float32, **extra):
    """A DeepFlow from a case's configuration, in the published constructor's words."""
    known = inspect.signature(DeepFlow).parameters
    return DeepFlow(**{key: value for key, value in config.items() if key in known}, **extra).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", parity.cases("deepflow"), ids=ids)
def test_parity_deepflow_outputs(case, dtype):
    model = build(case["config"], dtype)
    torch.testing.assert_close(model.pos_embed.float(), parity.arrays("deepflow", case["id"])["pos_embed"])
    load_strictly(model, parity.parameters("deepflow", case), case["id"])
    values = parity.arrays("deepflow", case["id"])
    with torch.no_grad():
        out = model(values["x"].to(dtype), list(values["t"].to(dtype)), values["y"])
    assert parity.relative_error(torch.stack(out.velocities), values["velocities"]) < TOLERANCE
    assert parity.relative_error(torch.stack(out.accelerations), values["accelerations"]) < TOLERANCE
    expected = [values[key] for key in sorted(values) if key.startswith("projections")]
    assert len(out.projections) == len(expected)
    for projection, reference in zip(out.projections, expected, strict=True):
        assert parity.relative_error(projection, reference) < TOLERANCE


@pytest.mark.parametrize("case", parity.cases("sit"), ids=ids)
def test_parity_sit_release_turned_round_in_time(case):
    state = parity.parameters("sit", case)
    heads = case["config"]["num_heads"]
    config = {**config_from_state(state), "num_heads": heads}
    state = convert(state, config, "sit")
    model = DeepFlow(**config).eval()
    load_strictly(model, state, case["id"])
    values = parity.arrays("sit", case["id"])
    with torch.no_grad():
        velocity = model.velocity(values["x"], values["t"], values["y"])
    assert parity.relative_error(velocity, values["project_velocity"]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", parity.cases("repa"), ids=ids)
def test_parity_repa_velocity_and_projection(case, dtype):
    """Sizes come from the state dict; heads and the aligned block, which no weight tells, from the case."""
    state = parity.parameters("repa", case)
    config = config_from_state(state)
    config.update({key: case["config"][key] for key in ("num_heads", "encoder_depth")})
    state = convert(state, config)
    model = DeepFlow(**config).to(dtype).eval()
    values = parity.arrays("repa", case["id"])
    torch.testing.assert_close(model.pos_embed.float(), values["pos_embed"])
    load_strictly(model, state, case["id"])
    with torch.no_grad():
        out = model(values["x"].to(dtype), values["t"].to(dtype), values["y"])
    (projection,) = out.projections
    assert parity.relative_error(out.velocities[-1], values["velocity"]) < TOLERANCE
    assert parity.relative_error(projection, values["projection"]) < TOLERANCE


@pytest.mark.parametrize("family", ["deepflow", "sit", "repa", "dmf"])
def test_parity_manifests_load_strictly(family):
    manifests = parity.family(family)[0]["manifests"]
    assert manifests or parity.FIXTURES != parity.OWN_FIXTURES
    for name, shapes in manifests.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        config = config_from_state(state)
        state = convert(state, config, "sit" if family == "sit" else "repa")
        with torch.device("meta"):
            model = build_model(config)
        load_strictly(model, state, name)
        assert (model.num_branches > 1) == (family == "deepflow")
        assert isinstance(model, FlowMap) == ("logvar_linear.weight" in shapes)
        assert config.get("dmf_depth", 20) == 20  # of XL
        assert family != "repa" or (len(model.projectors), config["z_dims"], config["encoder_depth"]) == (1, (768,), 8)
        assert config["num_heads"] == {384: 6, 768: 12, 1024: 16, 1152: 16}[config["hidden_size"]]
