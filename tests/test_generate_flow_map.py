"""Sampling flow maps end to end: their two modes, shift, and what they refuse."""

import numpy as np
import pytest
import tiny
import torch

from common.errors import InputError
from common.flags import parse_flags
from generate import GenerateConfig, generate
from models import load_checkpoint

MAP = {"name": "DeepFlow-DMF-Ti/2", "depth": 2, "df_idxs": (1,), "dmf_depth": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: checkpoint} of a flow map and of a flow model."""
    folder = tmp_path_factory.mktemp("files")
    vae = tiny.vae_folder(folder / "tiny-vae")
    return {"map": tiny.checkpoint(folder / "map.pt", vae, **MAP), "flow": tiny.checkpoint(folder / "flow.pt", vae)}


@pytest.mark.parametrize("mode", ["euler", "restart"])
def test_modes_of_flow_maps(files, tmp_path, mode):
    _, four, manifest = tiny.run_generate(files["map"], tmp_path / "four", mode=mode)
    assert four.shape == (5, 16, 16, 3)
    assert manifest["model_evaluations"] == 4
    assert (manifest["mode"], manifest["shift"], manifest["model_options"]["dmf_depth"]) == (mode, 1.0, 1)
    _, shifted, _ = tiny.run_generate(files["map"], tmp_path / "shifted", mode=mode, shift=1.5)
    _, other, _ = tiny.run_generate(files["map"], tmp_path / "other", mode=mode, per_proc_batch_size=5)
    assert not np.array_equal(four, shifted)
    assert np.abs(four.astype(int) - other.astype(int)).max() <= 1


def test_one_step_is_the_same_either_way(files, tmp_path):
    images = [
        tiny.run_generate(files["map"], tmp_path / mode, mode=mode, num_steps=1)[1] for mode in ("euler", "restart")
    ]
    assert np.array_equal(*images)


def test_a_flow_map_is_sampled_along_its_map_in_few_steps_by_default(files, tmp_path):
    line = ["--ckpt", str(files["map"]), "--num-fid-samples", "2", "--sample-dir", str(tmp_path)]
    with tiny.one_thread():
        generate(parse_flags(GenerateConfig, line).resolve())
    folder, images, manifest = tiny.results(tmp_path)
    assert (manifest["mode"], manifest["num_steps"], manifest["model_evaluations"]) == ("euler", 4, 4)
    assert "-euler-" in folder.name and len(images) == 2
    _, _, shifted = tiny.run_generate(files["map"], tmp_path / "shifted", shift=1.5)
    assert (shifted["mode"], shifted["shift"]) == ("euler", 1.5)


def test_a_flow_map_is_a_flow_model_too(files, tmp_path):
    _, images, manifest = tiny.run_generate(files["map"], tmp_path, mode="ode", num_steps=2)
    assert len(images) == 5 and manifest["model"] == MAP["name"]


def latents(ckpt, folder, **flags):
    """What Euler steps of a flow map make of the noise."""
    tiny.run_generate_only(ckpt, folder, mode="euler", num_steps=2, decode=False, **flags)
    (npz,) = folder.glob("*.npz")
    return np.load(npz)["latents"]


@pytest.mark.parametrize("has_head", [True, False])
def test_a_published_flow_map_with_the_published_flags(tmp_path, has_head):
    ours = tiny.checkpoint(tmp_path / "ours.pt", tiny.SPEC.vae, "DMFT-Ti/2")
    state = {name: tensor for name, tensor in tiny.load(ours)["ema"].items() if has_head or "logvar" not in name}
    published = tmp_path / "published.pt"
    torch.save(state, published)
    flags = {"model": "DMFT-Ti/2", "dmf_depth": 3, "path_type": "linear", "shift": 1.0}
    assert np.array_equal(latents(published, tmp_path / "published", **flags), latents(ours, tmp_path / "ours"))
    assert not np.array_equal(latents(published, tmp_path / "other", dmf_depth=1), latents(ours, tmp_path / "ours"))
    with pytest.raises(InputError, match=r"--dmf-depth 4: .*one of \[1, 2, 3\]"):
        latents(published, tmp_path / "none", dmf_depth=4)


@pytest.mark.slow
def test_a_compiled_flow_map_gives_the_same_latents(files, tmp_path):
    eager, compiled = (
        latents(files["map"], tmp_path / str(flag), compile=flag, cfg_scale=1.5) for flag in (False, True)
    )
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "culprit"),
    [
        ("flow", {"mode": "euler"}, "--mode euler needs a flow map"),
        ("flow", {"mode": "restart"}, "--mode restart needs a flow map"),
        ("flow", {"dmf_depth": 1}, "flow.pt is a flow model"),
        ("flow", {"shift": 1.5}, "--shift moves the times of flow maps"),
        ("map", {"mode": "euler", "dmf_depth": 2}, "--dmf-depth 2 contradicts"),
        ("map", {"mode": "euler", "shift": 0.0}, "--shift 0.0 is out of range; it must be greater than 0"),
        ("map", {"mode": "euler", "shift": -1.5}, "--shift -1.5 is out of range; it must be greater than 0"),
        ("map", {"mode": "euler", "num_steps": 0}, "--num-steps 0 is out of range; it must be at least 1"),
        ("map", {"mode": "ode", "shift": 1.5}, "--shift moves the times of flow maps"),
        ("map", {"mode": "euler", "model": "DeepFlow-Ti/2", "trans_depth": 2}, "--model DeepFlow-Ti/2 contradicts"),
        ("map", {"mode": "euler", "heun": True}, "--heun is a method for the ODE"),
    ],
)
def test_what_makes_no_sense_is_refused(files, tmp_path, kind, changes, culprit):
    with pytest.raises(InputError) as caught:
        tiny.run_generate(files[kind], tmp_path, **changes)
    assert culprit in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_checkpoint_gives_the_flow_map(files):
    checkpoint = load_checkpoint(files["map"])
    assert checkpoint.model.dmf_depth == checkpoint.options["dmf_depth"] == 1
