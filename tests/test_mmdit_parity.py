"""Text-to-image networks against the reference values of REPA's implementation."""

import numpy as np
import parity
import pytest
import torch

from models.checkpoints import load_strictly
from models.mmdit import MMDiT
from models.presets import build
from models.published import config_from_state, convert

TOLERANCE = 2e-6


def from_state(state, name, **known):
    """MMDiT of a published state dict; known: what no weight tells."""
    config = config_from_state(state)
    state = convert(state, config)
    model = build({**config, **known})
    assert isinstance(model, MMDiT)
    load_strictly(model, state, name)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", parity.cases("mmdit"), ids=lambda case: case["id"])
def test_parity_mmdit_velocity_and_projection(case, dtype):
    config, values = case["config"], parity.arrays("mmdit", case["id"])
    known = {key: config[key] for key in ("num_heads", "encoder_depth")}
    model = from_state(parity.parameters("mmdit", case), case["id"], **known).to(dtype).eval()
    torch.testing.assert_close(MMDiT(**config, df_idxs=()).pos_embed, values["pos_embed"])
    rng = np.random.default_rng(int(values["context_seed"]))
    context = torch.from_numpy(rng.standard_normal((2, 77, config["context_dim"])).astype(np.float32)).to(dtype)
    with torch.no_grad():
        out = model(values["x"].to(dtype), values["t"].to(dtype), context)
    (projection,) = out.projections
    assert parity.relative_error(out.velocities[-1], values["velocity"]) < TOLERANCE
    assert parity.relative_error(projection, values["projection"]) < TOLERANCE
    velocity = model.velocity(values["x"].to(dtype), values["t"].to(dtype), context)
    assert torch.equal(velocity, out.velocities[-1])


def test_parity_mmdit_manifests_load_strictly():
    manifests = parity.family("mmdit")[0]["manifests"]
    assert manifests or parity.FIXTURES != parity.OWN_FIXTURES
    for name, shapes in manifests.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with torch.device("meta"):
            model = from_state(state, name)
        assert model.num_branches == 1
        heads = model.joint_blocks[0].x_block.attn.num_heads
        assert heads == len(model.joint_blocks) == 24  # REPA ties them
