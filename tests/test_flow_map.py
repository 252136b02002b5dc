"""Flow maps: derivatives, conversion of flow models, presets, the loss's known answers, attention kernels."""

import functools
import weakref

import parity
import pytest
import torch
import torch.nn.functional as F
from tiny import fill_
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import InputError
from loss import GuidedTarget, adaptive_loss, flow_map_loss, flow_map_targets, flow_map_times, guided_samples
from models import PRESETS, create_model, load_checkpoint, model_config
from models.attention import differentiating, flash, fused, set_attention, written_out
from models.compiling import compile_blocks
from models.flow_map import FlowMap, to_flow_map
from models.layers import Block
from models.paths import PATHS
from models.presets import build
from models.published import config_from_state, convert
from samplers import time_grid
from training.draws import FlowMapDraws

SIZES = {"input_size": 4, "hidden_size": 32, "num_heads": 2, "num_classes": 5, "projector_dim": 12}
BACKBONES = {
    "sit": {"depth": 3, "df_idxs": (), "dmf_depth": 2},
    "deepflow": {"depth": 4, "df_idxs": (1, 2), "dmf_depth": 2},
    "deepflow, t in one branch": {"depth": 4, "df_idxs": (1, 2), "dmf_depth": 1},
}


def tiny_map(backbone="sit", std=0.15, **options):
    """A small flow map that is nowhere zero."""
    return fill_(FlowMap(**{**SIZES, **BACKBONES[backbone], **options}), std=std).eval()


def inputs(n=3, dtype=torch.float32):
    """x, t, r, y, tangent of a batch with t ≥ r."""
    g = torch.Generator().manual_seed(3)
    x, tangent = torch.randn(2, n, 4, 4, 4, generator=g, dtype=dtype)
    times = torch.rand(2, n, generator=g, dtype=dtype) * 0.9 + 0.05
    y = torch.arange(n) % (SIZES["num_classes"] + 1)
    t, r = times.sort(dim=0, descending=True).values  # views of one tensor, as in training
    return x, t, r, y, tangent


def test_the_log_variance_starts_at_zero():
    converted, _ = to_flow_map(model_config("SiT-Ti/2"), create_model("SiT-Ti/2").state_dict(), 2)
    for model in (create_model("DMFT-Ti/2"), converted):
        assert not model.log_variance(torch.tensor([0.3, 0.9]), torch.tensor([0.1, 0.9])).any()


@pytest.mark.parametrize("qk_norm", [False, True, "rms"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_derivative_equals_central_differences(backbone, qk_norm):
    model = tiny_map(backbone, qk_norm=qk_norm).double()
    x, t, r, y, tangent = inputs(dtype=torch.float64)
    u, du_dt = model.derivative(x, t, r, y, tangent)
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (model.average_velocity(x + s * h * tangent, t + s * h, r, y) for s in (1, -1))
        torch.testing.assert_close(u, model.average_velocity(x, t, r, y))
    assert parity.relative_error((ahead - behind) / (2 * h), du_dt) < 1e-6  # the embedded sinusoids are float32


class LiveMatrices(TorchDispatchMode):
    """Counts tensors of (…, T, T) that are alive at once; `most` is the largest number."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.alive, self.most = tokens, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 2 and out.shape[-2:] == (self.tokens, self.tokens):
            self.alive.setdefault(out.untyped_storage()._cdata, weakref.ref(out))
            self.alive = {key: ref for key, ref in self.alive.items() if ref() is not None}
            self.most = max(self.most, len(self.alive))
        return out


def test_the_derivative_holds_the_attention_matrices_of_one_block():
    """At 512² one such matrix of an XL model takes 34 MB per image in bf16."""
    most = []
    for depth in (2, 5):
        model, (x, t, r, y, tangent) = tiny_map(depth=depth, dmf_depth=1, num_heads=4), inputs()
        x, tangent = (F.interpolate(part, scale_factor=2) for part in (x, tangent))
        model.pos_embed = nn.Parameter(torch.zeros(1, 16, SIZES["hidden_size"]))
        with LiveMatrices(16) as matrices:
            model.derivative(x, t, r, y, tangent)
        most.append(matrices.most)
    assert most[0] == most[1] <= 6


def mixed_map():
    """A map of two blocks with VeRA between them; its blocks have different QK norms."""
    model = tiny_map(qk_norm="rms", depth=2, df_idxs=(1,), dmf_depth=1)
    model.blocks[1] = fill_(Block(SIZES["hidden_size"], SIZES["num_heads"], qk_norm=True), std=0.15)
    return model


@pytest.mark.slow  # the trace takes half a minute; test_train_dmf.py covers Inductor
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 0.1)], ids=["fp32", "bf16"])
def test_compiled_derivative_is_one_graph_and_equals_eager(half, tolerance, monkeypatch):
    """Also if the blocks themselves are compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()  # or the cases of this test would count as recompilations of one function
    counters.clear()
    model, passed = mixed_map(), inputs()
    exact = model.derivative(*passed)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        eager = model.derivative(*passed)
        compile_blocks(model)
        model.compile_derivative()
        for found, like, wanted in zip(model.derivative(*passed), eager, exact, strict=True):
            assert parity.relative_error(found, like) < tolerance
            assert parity.relative_error(found, wanted) < tolerance
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_written_out_attention_is_for_the_derivative_alone(monkeypatch):
    model = tiny_map()
    x, t, r, y, tangent = inputs()
    seen = []
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append(differentiating()))
    model.average_velocity(x, t, r, y)
    model.derivative(x, t, r, y, tangent)
    model(x, t, y, r).velocities[-1].sum().backward()
    assert seen == [False, True, False]


def test_written_out_attention_keeps_the_networks_dtype():
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(written_out(q, k, v), expected)
    dtypes = []
    softmax = torch.Tensor.softmax
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.Tensor, "softmax", lambda s, dim: dtypes.append(s.dtype) or softmax(s, dim))
        assert written_out(q, k, v).dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16]


def test_attention_kernels_agree_and_missing_packages_are_named():
    model = tiny_map("deepflow")
    x, t, r, y, _ = inputs()
    try:
        with torch.no_grad():
            set_attention("base")
            base = model.average_velocity(x, t, r, y)
            set_attention("torch_sdpa")
            torch.testing.assert_close(model.average_velocity(x, t, r, y), base)
        for name, module in (("fa2", "flash_attn"), ("fa3", "flash_attn_interface")):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=f"{name} needs .*{module}"):
                patch.setitem(__import__("sys").modules, module, None)
                set_attention(name)
    finally:
        set_attention("auto")


@pytest.mark.parametrize("with_statistics", [False, True])  # the packages differ in what they return
def test_flash_kernels_get_their_layout_in_half_precision_and_nothing_else(with_statistics):
    def kernel(q, k, v):
        seen.append((tuple(q.shape), q.dtype))
        return (v, None) if with_statistics else v

    seen = []
    with FakeTensorMode():  # shapes, dtypes and devices without a GPU
        q, k, v = torch.empty(3, 2, 4, 6, 8, device="cuda").unbind()  # (N, heads, T, D/heads)
        for dtype in (torch.float16, torch.bfloat16):
            out = flash(kernel, *(part.to(dtype) for part in (q, k, v)))
            assert (tuple(out.shape), out.dtype, seen.pop()) == ((2, 4, 6, 8), dtype, ((2, 6, 4, 8), dtype))
        assert flash(kernel, q, k, v).dtype == torch.float32
    q, k, v = torch.randn(3, 2, 4, 6, 8).half().unbind()
    assert torch.equal(flash(kernel, q, k, v), fused(q, k, v))
    assert seen == []  # float32 and the CPU are torch's kernel's


@pytest.mark.parametrize("backbone", BACKBONES)
def test_which_blocks_see_which_time(backbone):
    model = tiny_map(backbone)
    x, t, r, y, _ = inputs()
    conditions, gaps = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: conditions.append(args[2]))
    if model.df_idxs:
        model.dt_embedder.register_forward_pre_hook(lambda _, args: gaps.append(args[0]))
    with torch.no_grad():
        model.average_velocity(x, t, r, y)
        label = model.y_embedder(y)
        for i, c in enumerate(conditions):
            time = t if i < model.dmf_depth else r
            torch.testing.assert_close(c, model.t_embedder(time) + label)
    for end, gap in zip(model.df_idxs, gaps, strict=True):
        torch.testing.assert_close(gap, r - t if end == model.dmf_depth else torch.zeros_like(t))


@pytest.mark.parametrize(
    ("family", "case"), [(f, c) for f in ("sit", "repa", "deepflow", "dmf") for c in parity.cases(f)]
)
def test_at_r_equal_t_a_converted_flow_model_is_unchanged(family, case):
    """For every kind of published checkpoint: DeepFlow, SiT (time reversed), REPA, Decoupled MeanFlow."""
    known = {"deepflow": case["config"].get("df_idxs"), "dmf": None}
    state = parity.parameters(family, case)
    config = config_from_state(state, known.get(family))
    config["num_heads"] = case["config"]["num_heads"]
    state = convert(state, config, "sit" if family == "sit" else "repa")
    flow = build(config)
    flow.load_state_dict(state)
    values = parity.arrays(family, case["id"])
    x, y, t = values["x"], values["y"], values["t"].reshape(-1, len(values["x"]))[0]
    model, options = to_flow_map(config, flow.state_dict(), config["df_idxs"][0] if config["df_idxs"] else 1)
    with torch.no_grad():
        assert torch.equal(model.average_velocity(x, t, t, y), flow.velocity(x, t, y))
        assert parity.relative_error(model.average_velocity(x, t, t / 2, y), flow.velocity(x, t, y)) > 1e-3
    assert options["dmf_depth"] == model.dmf_depth


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].dmf_depth])
def test_flow_map_presets(name):
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, FlowMap)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters
    assert 0.5 <= model.dmf_depth / len(model.blocks) <= 0.75


@pytest.mark.parametrize(("backbone", "dmf_depth"), [("sit", 0), ("sit", 3), ("deepflow", 3)])
def test_wrong_dmf_depth(backbone, dmf_depth):
    with pytest.raises(InputError, match=f"--dmf-depth {dmf_depth}: .*one of"):
        tiny_map(backbone, dmf_depth=dmf_depth)


def draws(times, guided, dropped=None):
    """Draws of a step with these times and guided samples."""
    noise, map_noise = torch.randn(2, times.shape[1], 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return FlowMapDraws(times, dropped, noise, noise, map_noise, guided)


def test_times_are_ordered_logistic_normals():
    normals = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    t_fm, t, r = flow_map_times(normals, (0.0, 0.4, -1.2), (1.0, 1.0, 0.5))
    assert (t >= r).all()
    torch.testing.assert_close(t_fm, normals[0].sigmoid())
    both = torch.stack([t, r]).logit().sum(0)
    torch.testing.assert_close(both, 0.4 + normals[1] - 1.2 + 0.5 * normals[2], rtol=1e-3, atol=1e-3)


def test_adaptive_loss_is_the_published_one_and_stays_finite():
    error, s = torch.rand(2, 50, dtype=torch.float64)
    torch.testing.assert_close(adaptive_loss(error, s), torch.log(error * torch.exp(-s) + 0.01) + s)
    far = torch.tensor([-100.0], requires_grad=True)  # where training drives it
    error = torch.tensor([0.5], requires_grad=True)
    adaptive_loss(error, far).backward()
    assert error.grad.item() == pytest.approx(2.0)
    assert far.grad.item() == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize(
    ("low", "high", "kind", "passes", "wanted"),
    [
        (0.4, 1.0, "mg", 3, [1, 0, 0, 0, 1, 1, 0, 0]),  # 6 rows
        (0.05, 0.15, "mg", 1, [0, 1, 0, 0, 0, 0, 0, 0]),
        (0.96, 1.0, "mg", 0, [0] * 8),
        (0.5, 0.5, "mg", 0, [0] * 8),  # only the sample whose label was dropped lies inside
        (0.0, 1.0, "mg", 6, [1, 1, 0, 1] * 2),
        (0.96, 1.0, "distill", 4, [0] * 8),
        (0.4, 1.0, "distill", 7, [1, 0, 1, 0, 1, 1, 1, 0]),  # 13 rows
        (0.0, 1.0, "distill", 8, [1] * 8),
        (0.0, 1.0, "default", 0, [0] * 8),
    ],
)
def test_guidance_passes_only_the_rows_it_needs_in_passes_of_one_size(low, high, kind, passes, wanted):
    model, sizes, null = tiny_map(), [], SIZES["num_classes"]
    x0, _, _, y, _ = inputs(4)
    times = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.8, 0.9, 0.95, 0.2], [0.2, 0.1, 0.3, 0.1]])

    def velocity(x, t, y):
        sizes.append(len(x))
        return model.velocity(x, t, y)

    guided = guided_samples(kind, times, torch.tensor([False, False, True, False]), low, high)
    assert guided.flatten().int().tolist() == wanted
    step = draws(times, guided)
    targets = flow_map_targets(model, GuidedTarget(kind, 0.6, velocity, null), x0, y, step, PATHS["linear"])
    assert sizes == [2] * passes
    assert targets.guided.item() == pytest.approx(sum(wanted) / 8)
    expected = step.noise - x0
    x, t, mask = targets.x[:4], targets.t[:4], guided[0][:, None, None, None]
    with torch.no_grad():
        conditional, unconditional = model.velocity(x, t, y), model.velocity(x, t, torch.full_like(y, null))
    if kind == "mg":
        expected = torch.where(mask, expected + 0.6 * (conditional - unconditional), expected)
    elif kind == "distill":
        expected = torch.where(mask, unconditional + 0.6 * (conditional - unconditional), conditional)
    torch.testing.assert_close(targets.target[:4], expected)


def test_targets_carry_no_gradient_and_are_float32_under_autocast():
    model = tiny_map()
    x0, t, r, y, _ = inputs()
    guide = GuidedTarget("mg", 0.6, model.velocity, SIZES["num_classes"])
    step = draws(torch.stack([t, t, r]), torch.ones(2, len(t), dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16):
        targets = flow_map_targets(model, guide, x0, y, step, PATHS["linear"])
        out = model(targets.x, targets.t, targets.y, targets.r)
    assert targets.target.dtype == targets.derivative.dtype == out.log_variance.dtype == torch.float32
    assert not targets.target.requires_grad
    loss = flow_map_loss(out.velocities[-1], out.log_variance, targets.target)
    assert loss.total.dtype == torch.float32
    loss.total.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_shifted_times():
    assert time_grid(4, shift=1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(2, shift=1.5).tolist() == [1.0, pytest.approx(0.6), 0.0]


def test_published_flow_map_files(tmp_path, capsys):
    model = tiny_map("sit", qk_norm="rms")
    state = model.state_dict()
    torch.save(state, tmp_path / "map.pt")
    loaded = load_checkpoint(tmp_path / "map.pt", num_heads=2, dmf_depth=2)
    assert isinstance(loaded.model, FlowMap)
    assert loaded.options["qk_norm"] == "rms"
    assert loaded.options["dmf_depth"] == 2
    assert "flow map model with num_heads 2, dmf_depth 2, qk_norm rms" in capsys.readouterr().err
    torch.save({name: state[name] for name in state if "logvar" not in name}, tmp_path / "headless.pt")
    headless = load_checkpoint(tmp_path / "headless.pt", num_heads=2, dmf_depth=2).model
    x, t, r, y, _ = inputs()
    with torch.no_grad():
        expected = model.average_velocity(x, t, r, y)
        assert torch.equal(headless.average_velocity(x, t, r, y), expected)
        assert torch.equal(loaded.model.average_velocity(x, t, r, y), expected)
    capsys.readouterr()
    flow = load_checkpoint(tmp_path / "headless.pt", num_heads=2).model  # its QK norm says where it comes from
    assert "flow model with num_heads 2, qk_norm rms" in capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(flow.velocity(x, t, y), model.velocity(x, t, y))
