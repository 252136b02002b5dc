"""Reading the reference values: cases are discovered from FAMILY.json, arrays come from FAMILY.npz."""

import functools
import importlib.util
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

OWN_FIXTURES = Path(__file__).parent / "fixtures"
FIXTURES = Path(os.environ.get("PARITY_FIXTURES", OWN_FIXTURES))


@functools.cache
def family(name):
    """(description, arrays) of a network family. A family may be missing from a folder of the user's only."""
    path = FIXTURES / f"{name}.json"
    if not path.exists() and FIXTURES != OWN_FIXTURES:
        return {"cases": [], "manifests": {}, "recipe": {}}, {}
    return json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))


def cases(name):
    return family(name)[0]["cases"]


def arrays(name, prefix):
    """Arrays under `prefix/`, as tensors."""
    return {
        key.removeprefix(prefix + "/"): torch.from_numpy(value)
        for key, value in family(name)[1].items()
        if key.startswith(prefix + "/")
    }


def parameters(name, case, std=None):
    """State dict of a case: every value follows from the parameter's published name and shape, and the family's std."""
    std = std or family(name)[0]["recipe"]["std"]
    state = {"pos_embed": arrays(name, case["id"])["pos_embed"]}
    for key, shape in case["parameters"].items():
        if key == "pos_embed":
            continue
        value = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape) * std
        if key.endswith(("layer_norm.weight", "norm.weight", "norm.scale")):
            value = value + 1
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def relative_error(a, b):
    """max|a − b| / max|b|."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).abs().max() / b.abs().max()).item()


@functools.cache
def evaluation_inputs():
    """The module of the folder in use that makes images and features."""
    spec = importlib.util.spec_from_file_location("parity_inputs", FIXTURES / "evaluation_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
