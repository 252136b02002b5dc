"""benchmarks/memory.py: its formula against what autograd holds, and the cards."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import fits_on, fixed_bytes, largest_batch, saved_bytes, step_bytes
from models import create_model, model_config


def held_bytes(name, images):
    """What the forward pass in bf16 autocast keeps for the backward pass, weights and casts of weights included."""
    with FakeTensorMode():
        model, options, kept = create_model(name), model_config(name), {}
        times = [torch.empty(images) for _ in range(model.num_branches)]

        def keep(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        y, r = torch.empty(images, dtype=torch.long), ()
        if options.get("context_dim"):
            y = torch.empty(images, 77, options["context_dim"])
        if options.get("dmf_depth"):
            times, r = times[0], (torch.empty(images),)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(torch.empty(images, 4, 32, 32), times, y, *r)
        assert out is not None
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["DeepFlow-Ti/2", "DMFT-Ti/2", "MMDiT-Ti/2"])
def test_eager_steps_hold_what_the_formula_says(name):
    options = model_config(name)
    rows = 2 if options.get("dmf_depth") else 1  # of an image
    held = rows * (held_bytes(name, 4) - held_bytes(name, 2)) / 2
    assert saved_bytes(options, "eager") == pytest.approx(held, rel=0.03)
    assert saved_bytes(options, "compiled") < held


def test_the_largest_batch_that_fits():
    options = model_config("DeepFlow-Ti/2")
    memory = step_bytes(options, 64, "eager")
    assert largest_batch(options, memory, "eager") == 64
    assert largest_batch(options, memory - 1, "eager") == 32
    assert largest_batch(options, fixed_bytes(options), "eager") == 1  # running it shows that it does not fit


def test_the_smallest_card():
    assert [fits_on(gb * 1e9) for gb in (24, 24.1, 141, 142)] == ["24 GB", "40 GB", "141 GB", "none"]
