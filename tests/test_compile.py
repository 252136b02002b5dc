"""--compile: one graph, no recompilation, the same numbers, the same names."""

import programs
import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from loss import deepflow_loss
from models import create_model
from models.paths import PATHS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, seed=0):
    """Loss on random input, and the gradients of all parameters."""
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    times = torch.rand(model.num_branches, 4, generator=g)
    path = PATHS["linear"]
    out = model(path.interpolate(x0, noise, times[0]), list(times), torch.tensor([0, 1, 2, 3]))
    loss = deepflow_loss(out, x0, noise, times, path, [1.0] * model.num_branches, 1.0).total.mean()
    loss = loss + sum(projection.square().mean() for projection in out.projections)
    return loss.detach(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"df_idxs": (), "ssl_align": True, "encoder_depth": 2},
        {"df_idxs": (1,)},
        {"df_idxs": (1, 2), "legacy_scaling": True, "ssl_align": True, "z_dims": (6, 8)},
        {"qk_norm": True},
    ],
    ids=["sit-aligned", "two", "three-legacy-aligned", "qk-norm"],
)
def test_the_forward_pass_is_one_graph_that_is_compiled_once(options, checkpointing):
    model = tiny.fill_(create_model("DeepFlow-Ti/2", input_size=8, num_classes=3, **options))
    model.gradient_checkpointing = checkpointing
    names = list(model.state_dict())
    wanted = [loss_and_gradients(model, seed) for seed in range(3)]
    model.compile(fullgraph=True, backend="aot_eager")
    for seed, (loss, gradients) in enumerate(wanted):
        compiled_loss, compiled = loss_and_gradients(model, seed)
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
        for a, b in zip(compiled, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_run_trains_like_an_eager_one(tmp_path, precision):
    data = tiny.data_folder(tmp_path / "data")
    runs = [
        tiny.run_train(data, tmp_path, exp_name=name, compile=name == "compiled", mixed_precision=precision)
        for name in ("eager", "compiled")
    ]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager, compiled = ([line["loss"] for line in tiny.log_lines(run)] for run in runs)
    assert compiled == pytest.approx(eager, rel=1e-5 if precision == "no" else 1e-3)
    a, b = (tiny.load(run / "checkpoints/0000004.pt") for run in runs)
    assert a["model"].keys() == b["model"].keys()
    if precision == "no":
        assert tiny.largest_difference(a["model"], b["model"]) < 1e-4  # Adam's first steps magnify rounding


@pytest.mark.slow
def test_two_processes_compile_and_resume(tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    losses = []
    for name, compiled in (("eager", False), ("compiled", True)):
        for last in (2, 4):
            line = tiny.train_flags(
                data, tmp_path, exp_name=name, compile=compiled, max_train_steps=last, resume="auto"
            )
            result = programs.run_ranks(2, "train.py", *line)
            assert result.returncode == 0, result.stderr
        losses.append([entry["loss"] for entry in tiny.log_lines(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
