"""--compile: each kind of part is compiled once, numbers and names stay the same, and kernels are cached."""

import contextlib
import copy
import functools
import os

import programs
import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from common.errors import exit_on_input_error
from loss import deepflow_loss
from models import create_model
from models.compiling import compile_blocks, keep_compiled
from models.paths import PATHS


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """No cached graphs, and a backend that needs no kernel compiler."""
    torch._dynamo.reset()
    counters.clear()
    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    yield
    torch._dynamo.reset()


def make(options, name="DeepFlow-Ti/2"):
    return tiny.fill_(create_model(name, input_size=8, **options))


def loss_and_gradients(network, seed=0):
    """Loss on random input, and the gradients of all parameters; network: a model, or DDP around one."""
    model = getattr(network, "module", network)
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    times = torch.rand(model.num_branches, 4, generator=g)
    y = torch.randn(4, 6, model.context_dim, generator=g) if model.kind == "text" else torch.tensor([0, 1, 2, 3])
    path = PATHS["linear"]
    model.zero_grad()
    out = network(path.interpolate(x0, noise, times[0]), list(times), y)
    loss = deepflow_loss(out, x0, noise, times, path, [1.0] * model.num_branches, 1.0).total.mean()
    loss = loss + sum(projection.square().mean() for projection in out.projections)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_close(found, wanted, rtol=1e-4):
    for a, b in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "kinds"),
    [
        ("DeepFlow-Ti/2", {"df_idxs": (), "ssl_align": True, "encoder_depth": 2}, 2),
        ("DeepFlow-Ti/2", {"depth": 4, "df_idxs": (1, 3), "legacy_scaling": True, "qk_norm": True}, 3),
        ("DeepFlow-MMDiT-Ti/2", {"depth": 4, "df_idxs": (1, 3)}, 4),  # its last block is a kind of its own
    ],
    ids=["sit-aligned", "three-legacy-qk-norm", "text"],
)
def test_parts_that_are_alike_are_compiled_once(name, options, kinds):
    model = make({**options, **({} if "MMDiT" in name else {"num_classes": 3})}, name)
    names, wanted = list(model.state_dict()), [loss_and_gradients(model, seed) for seed in range(2)]
    compile_blocks(model)
    for model.gradient_checkpointing in (False, True):
        for seed in range(2):
            assert_close(loss_and_gradients(model, seed), wanted[seed])
    assert counters["stats"]["unique_graphs"] == kinds and not counters["graph_break"]
    assert list(model.state_dict()) == names


def test_data_parallel_bf16_and_checkpointing_change_nothing(tmp_path):
    eager = make({"num_classes": 3, "depth": 4, "df_idxs": (1, 3)})
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    compiled.gradient_checkpointing = True
    with one_process_group(tmp_path), torch.autocast("cpu", torch.bfloat16):
        network = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.01)  # a block has many buckets
        for seed in range(3):
            assert_close(loss_and_gradients(network, seed), loss_and_gradients(eager, seed), rtol=0.05)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]  # a* comes in bf16, v* in float32


@contextlib.contextmanager
def one_process_group(folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_failing_compiler_ends_in_one_line_that_names_the_way_out(capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    with pytest.raises(SystemExit) as end, exit_on_input_error():
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(1))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "no C++ compiler" in line and "--no-compile" in line


def test_the_folder_of_compiled_kernels_is_the_users_or_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".compile_cache")


@pytest.mark.slow  # kernels are compiled
def test_a_compiled_run_on_two_processes_is_an_eager_one_and_compiles_once(tmp_path, monkeypatch):
    """In bf16 with gradient checkpointing and micro-batches; the resumed part finds all kernels beside the run."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    data = tiny.data_folder(tmp_path / "data")
    changes = {"mixed_precision": "bf16", "gradient_checkpointing": True, "gradient_accumulation_steps": 2}

    def train(name, last):
        line = tiny.train_flags(
            data, tmp_path, exp_name=name, compile=name == "compiled", max_train_steps=last, resume="auto", **changes
        )
        result = programs.run_ranks(2, "train.py", *line)
        assert result.returncode == 0, result.stderr

    def kernels():
        return {path for path in (tmp_path / "compiled/.compile_cache").rglob("*") if path.suffix in (".cpp", ".so")}

    train("eager", 4)
    train("compiled", 2)
    compiled_first = kernels()
    train("compiled", 4)
    assert compiled_first and kernels() == compiled_first
    losses = [[entry["loss"] for entry in tiny.log_lines(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    a, b = (tiny.load(tmp_path / name / "checkpoints/0000004.pt") for name in ("eager", "compiled"))
    assert a["model"].keys() == b["model"].keys()
