"""Sizes, key layers, initialisation, gradients and forward passes of the networks."""

import collections
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from loss import alignment_loss
from models import PRESETS, create_model, model_config
from models.deepflow import CrossSpaceAttention, DeepFlow, TimeGapAdaLN, VeRA
from models.layers import Attention, Block, DrawsNothing, TimestepEmbedder, VelocityLayer, sinusoid
from models.presets import build, kind_of

TINY = {
    "input_size": 4,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
    "projector_dim": 12,
    "z_dims": (10,),
    "encoder_depth": 2,
}
KEY_LAYERS = {1: (), 2: (2,), 3: (1, 2)}
NULL = TINY["num_classes"]


def tiny(branches=2, **options):
    """A small model with k branches, initialised from a fixed seed."""
    torch.manual_seed(0)
    return DeepFlow(**{**TINY, "df_idxs": KEY_LAYERS[branches], **options})


def filled(model):
    """The model with its zero-initialised parameters filled with N(0, 0.02)."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == 0).all():
                parameter.normal_(std=0.02, generator=g)
    return model


def test_a_meta_network_has_its_shapes_and_draws_nothing():
    before = torch.get_rng_state()
    with DrawsNothing():
        nn.Embedding(3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"), DrawsNothing():
        empty = DeepFlow(**TINY, df_idxs=KEY_LAYERS[3], ssl_align=True)
    assert all(p.is_meta for p in empty.parameters())
    known = {name: value.shape for name, value in tiny(3, ssl_align=True).state_dict().items()}
    assert {name: value.shape for name, value in empty.state_dict().items()} == known


def inputs(branches=1, n=4):
    """x (N, C, H, W), k different times (N,), labels (N,) with the null class among them."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, 4, 4, generator=g)
    return x, [torch.rand(n, generator=g) for _ in range(branches)], torch.tensor([0, 2, 2, NULL][:n])


def meta_model(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---- Sizes -----------------------------------------------------------------------------------------------------------

# Size, branches, depth, millions of parameters rounded down, and as printed; key layers are evenly spaced.
TABLE_8 = [
    ("B", 2, 10, 144, 144),
    ("B", 2, 12, 166, 166),
    ("L", 2, 20, 431, 431),
    ("L", 2, 22, 469, 469),
    ("L", 2, 24, 506, 507),
    ("XL", 2, 22, 588, 588),
    ("XL", 2, 24, 636, 636),
    ("XL", 2, 26, 683, 683),
    ("XL", 2, 28, 731, 731),
    ("L", 3, 18, 433, 433),
    ("L", 3, 21, 490, 490),
    ("L", 3, 24, 546, 547),
    ("XL", 3, 18, 538, 538),
    ("XL", 3, 21, 609, 609),
    ("XL", 3, 24, 681, 681),
    ("XL", 3, 27, 753, 753),
    ("XL", 4, 28, 822, 822),
]


@pytest.mark.parametrize(("size", "branches", "depth", "millions", "printed"), TABLE_8)
def test_table_8_parameters(size, branches, depth, millions, printed):
    spaced = " ".join(str(depth // branches * i) for i in range(1, branches))
    model = meta_model(f"DeepFlow-{size}/2", depth=depth, df_idxs=spaced)
    assert model.num_branches == branches and len(model.blocks) == depth
    assert count(model) // 10**6 == millions
    assert printed in (millions, round(count(model) / 1e6))


@pytest.mark.parametrize(("size", "branches", "depth"), [row[:3] for row in TABLE_8])
def test_table_8_key_layers_from_the_depth_alone(size, branches, depth):
    preset = PRESETS[f"DeepFlow-{size}/2"]
    if len(preset.df_idxs) + 1 == branches:
        spaced = tuple(depth // branches * i for i in range(1, branches))
        assert model_config(f"DeepFlow-{size}/2", depth=depth)["df_idxs"] == spaced


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_parameter_count(name):
    assert count(meta_model(name)) == PRESETS[name].parameters


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "df_idxs", "millions"),
    [
        ("DeepFlow-S/2", 12, 384, 6, (6,), 55),
        ("DeepFlow-B/2", 12, 768, 12, (6,), 166),
        ("DeepFlow-L/2", 18, 1024, 16, (6, 12), 433),
        ("DeepFlow-XL/2", 24, 1152, 16, (8, 16), 681),
        ("SiT-S/2", 12, 384, 6, (), 32),
        ("SiT-B/2", 12, 768, 12, (), 130),
        ("SiT-L/2", 24, 1024, 16, (), 458),
        ("SiT-XL/2", 28, 1152, 16, (), 675),
    ],
)
def test_presets_are_the_papers_models(name, depth, width, heads, df_idxs, millions):
    preset = PRESETS[name]
    assert (preset.depth, preset.hidden_size, preset.num_heads, preset.df_idxs) == (depth, width, heads, df_idxs)
    assert (preset.patch_size, preset.projector_dim, preset.parameters // 10**6) == (2, 2048, millions)


def test_one_branch_is_plain_sit():
    model = tiny(branches=1)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer"}
    assert not any(isinstance(module, VeRA) for module in model.modules())
    assert sum(isinstance(module, TimestepEmbedder) for module in model.modules()) == 1
    assert sum(isinstance(module, VelocityLayer) for module in model.modules()) == 1


@pytest.mark.parametrize("branches", [2, 3])
def test_one_velocity_layer_and_one_acceleration_layer_serve_all_intermediate_branches(branches):
    model = tiny(branches)
    assert sum(isinstance(module, VelocityLayer) for module in model.modules()) == 3
    assert sum(isinstance(module, VeRA) for module in model.modules()) == branches - 1
    assert sum(isinstance(module, TimestepEmbedder) for module in model.modules()) == 2


# ---- Key layers and other options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["[8,16]", "8,16", "8 16", " [ 8 , 16 ] ", ["8", "16"], ["[8,", "16]"], [8, 16], (8, 16)]
)
def test_forms_of_df_idxs(form):
    assert model_config("DeepFlow-XL/2", df_idxs=form)["df_idxs"] == (8, 16)


@pytest.mark.parametrize("form", ["[]", "", []])
def test_no_key_layers_is_one_branch(form):
    assert model_config("DeepFlow-B/2", df_idxs=form)["df_idxs"] == ()


@pytest.mark.parametrize(
    ("df_idxs", "named"),
    [
        *((text, "from 1 to 11") for text in ("4 13", "0 4", "-2 4", "8 4", "4 4", "4 12", "12")),
        ("four", "'four' is not a list of block numbers"),
        ("4.5", "'4.5' is not a list of block numbers"),
    ],
)
def test_key_layers_that_do_not_fit_are_refused_by_name(df_idxs, named):
    with pytest.raises(InputError, match=named) as caught:
        meta_model("DeepFlow-B/2", df_idxs=df_idxs)
    assert str(caught.value).startswith("--df-idxs") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SiT-B/2", "SiT-XL/4"])
def test_key_layers_of_a_sit_are_refused_with_the_presets_to_take(name):
    with pytest.raises(InputError, match=f"--df-idxs .*--model {name}, .*--model DeepFlow-"):
        model_config(name, df_idxs="4 8")
    assert model_config(name, df_idxs="[]")["df_idxs"] == ()


@pytest.mark.parametrize(
    ("name", "kind"), [("SiT-Ti/2", "flow"), ("DMFT-Ti/2", "flow map"), ("DeepFlow-MMDiT-Ti/2", "text")]
)
def test_kind_of_network(name, kind):
    options = model_config(name)
    assert (PRESETS[name].kind, kind_of(options), create_model(name).kind) == (kind, kind, kind)


@pytest.mark.parametrize(("name", "depth"), [("DeepFlow-B/2", 11), ("DeepFlow-XL/2", 20)])
def test_a_depth_that_the_branches_do_not_divide_is_refused(name, depth):
    with pytest.raises(InputError, match=rf"--trans-depth {depth} does not divide"):
        model_config(name, depth=depth)
    assert model_config(name, depth=depth, df_idxs="5")["df_idxs"] == (5,)


@pytest.mark.parametrize("depth", [0, -2])
@pytest.mark.parametrize("name", ["DeepFlow-B/2", "SiT-B/2"])
def test_a_depth_without_blocks_is_refused(name, depth):
    with pytest.raises(InputError, match=f"--trans-depth {depth}"):
        model_config(name, depth=depth)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input_size": 5}, "size 5 .* patches of 2"),
        ({"num_heads": 3}, "number of heads .3."),
        ({"ssl_align": True, "df_idxs": (), "encoder_depth": 99}, "--encoder-depth 99 is out of range"),
        ({"ssl_align": True, "df_idxs": (), "encoder_depth": 0}, "--encoder-depth 0 is out of range"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        DeepFlow(**{**TINY, "df_idxs": (2,), **options})


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(
        InputError, match=r"^model 'DeepFlow-XXL/2' is unknown; did you mean DeepFlow-XL/2\? choose one of "
    ):
        create_model("DeepFlow-XXL/2")


def test_an_unknown_option_is_a_programmers_error():
    with pytest.raises(TypeError, match="mlp_ratio"):
        create_model("DeepFlow-Ti/2", mlp_ratio=3)


def test_options_that_are_not_given_keep_the_preset():
    assert model_config("DeepFlow-B/2", depth=None, df_idxs=None, qk_norm=None) == model_config("DeepFlow-B/2")


def test_a_wrong_number_of_times_is_refused():
    x, times, y = inputs(branches=2)
    with pytest.raises(ValueError, match="zip"):
        tiny(branches=3)(x, times, y)


# ---- Initialisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ssl_align": True, "qk_norm": True}], ids=["plain", "ssl_qknorm"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_at_initialisation_all_velocities_and_accelerations_are_zero(branches, options):
    if branches == 1:
        options = {key: value for key, value in options.items() if key != "ssl_align"}
    x, times, y = inputs(branches)
    out = tiny(branches, **options)(x, times, y)
    assert len(out.velocities) == branches and len(out.accelerations) == branches - 1
    assert len(out.projections) == (branches - 1 if options.get("ssl_align") else 0)
    assert all(v.shape == x.shape and (v == 0).all() for v in out.velocities + out.accelerations)
    assert all(p.shape == (4, 4, 10) and (p != 0).any() for p in out.projections)


def zero_initialised(name):
    """Whether a parameter starts at zero: biases, adaLN-Zero sources, velocity and acceleration outputs."""
    if "y_embedder" in name or "pos_embed" in name or "norm" in name.rsplit(".", 2)[-2]:
        return name.endswith("norm.bias") or name.endswith("layer_norm.bias")
    return name.endswith("bias") or "adaLN_modulation" in name or ("final_" in name and "linear" in name)


def test_zeros_and_ones_at_initialisation():
    model = tiny(branches=3, ssl_align=True, qk_norm=True)
    for name, parameter in model.named_parameters():
        assert (parameter == 0).all() == zero_initialised(name), name
        if name.endswith(("q_norm.weight", "k_norm.weight", "layer_norm.weight")):
            assert (parameter == 1).all(), name


def is_uniform(weight, bound):
    """Whether values fill [−bound, bound] evenly: extremes near the ends, variance bound²/3, within 5 sigma."""
    values = weight.detach().double().flatten()
    spread = 5 * bound**2 / 3 * math.sqrt(0.8 / len(values))  # a uniform's kurtosis is 1.8
    inside = bool(values.abs().max() <= bound)
    return inside and abs(values.var().item() - bound**2 / 3) < spread and values.abs().max().item() > 0.98 * bound


def xavier_bound(fan_in, fan_out):
    return math.sqrt(6 / (fan_in + fan_out))


def test_linears_are_xavier_uniform():
    """Fused qkv and the cross-attention's in-projection are one 3D × D matrix; the patch convolution is flattened."""
    model = tiny(branches=3, ssl_align=True, hidden_size=64, projector_dim=48)
    d, checked = 64, 0
    for name, module in model.named_modules():
        embeds_time = "t_embedder" in name or "dt_embedder" in name
        if isinstance(module, nn.Linear) and not embeds_time and not zero_initialised(name + ".weight"):
            assert is_uniform(module.weight, xavier_bound(module.in_features, module.out_features)), name
            checked += 1
    assert checked == 3 * 4 + 2 * (4 + 2 + 1) + 2 * 3  # blocks, VeRA (ACC MLP, gap MLP, out_proj), projectors
    for block in model.blocks:
        assert is_uniform(block.attn.qkv.weight, xavier_bound(d, 3 * d))
    for vera in model.df_blocks:
        attention = vera.cross_attention.multihead_attn
        assert is_uniform(attention.in_proj_weight, xavier_bound(d, 3 * d))
        for part in attention.in_proj_weight.chunk(3):
            assert is_uniform(part, xavier_bound(d, 3 * d))
    assert is_uniform(model.x_embedder.proj.weight, xavier_bound(4 * 2 * 2, d))


def test_embedders_are_normal_with_002():
    model = tiny(branches=2, hidden_size=64, num_classes=199)
    weights = {
        "labels": model.y_embedder.embedding_table.weight,
        "time 0": model.t_embedder.mlp[0].weight,
        "time 2": model.t_embedder.mlp[2].weight,
        "gap 0": model.dt_embedder.mlp[0].weight,
        "gap 2": model.dt_embedder.mlp[2].weight,
    }
    for name, weight in weights.items():
        values = weight.detach().double().flatten() / 0.02
        n = len(values)
        assert abs(values.mean().item()) < 5 / math.sqrt(n), name
        assert abs(values.var().item() - 1) < 5 * math.sqrt(2 / n), name
        assert abs((values**4).mean().item() - 3) < 5 * math.sqrt(96 / n), name  # a uniform's would be 1.8


def test_weights_follow_the_seed():
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("input_size", "patch_size", "width"), [(8, 2, 16), (6, 2, 24), (32, 2, 384), (4, 1, 8)])
def test_position_embedding_against_a_loop(input_size, patch_size, width):
    model = tiny(input_size=input_size, patch_size=patch_size, hidden_size=width)
    grid, quarter = input_size // patch_size, width // 4
    expected = torch.empty(grid * grid, width, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for half, position in enumerate((column, row)):
                for j in range(quarter):
                    angle = position * 10000 ** (-j / quarter)
                    expected[row * grid + column, half * 2 * quarter + j] = math.sin(angle)
                    expected[row * grid + column, half * 2 * quarter + quarter + j] = math.cos(angle)
    assert model.pos_embed.dtype == torch.float32 and not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0].double(), expected, rtol=1e-7, atol=1e-8)
    assert "pos_embed" in model.state_dict()


def test_normalisation_epsilons():
    model = tiny(branches=3, qk_norm=True)
    affine_free = [block.norm1 for block in model.blocks] + [block.norm2 for block in model.blocks]
    affine_free += [layer.norm_final for layer in [*model.final_layer, model.final_acc_layer]]
    affine_free += [vera.acc_norm.norm for vera in model.df_blocks]
    affine = [norm for block in model.blocks for norm in (block.attn.q_norm, block.attn.k_norm)]
    affine += [vera.cross_attention.layer_norm for vera in model.df_blocks]
    assert all(norm.eps == 1e-6 and norm.weight is None and norm.bias is None for norm in affine_free)
    assert all(norm.eps == 1e-5 and norm.weight is not None and norm.bias is not None for norm in affine)
    assert all(block.attn.q_norm.normalized_shape == (8,) for block in model.blocks)
    assert all(vera.acc_norm.norm.normalized_shape == (32,) for vera in model.df_blocks)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == len(affine_free) + len(affine)


# ---- Gradients ------------------------------------------------------------------------------------------------------


def backward(model, branches):
    """A loss that takes part in every output, alignment included; returns gradients by name."""
    x, times, y = inputs(branches)
    g = torch.Generator().manual_seed(3)
    out = model(x, times, y)
    targets = [torch.randn(x.shape, generator=g) for _ in out.velocities + out.accelerations]
    loss = sum(F.mse_loss(v, target) for v, target in zip(out.velocities + out.accelerations, targets, strict=True))
    if out.projections:
        loss = loss + alignment_loss(out.projections, [torch.randn(4, 4, 10, generator=g)]).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


CONFIGURATIONS = [(k, ssl, qk) for k in (1, 2, 3) for ssl in (False, True) for qk in (False, True)]


@pytest.mark.parametrize(("branches", "ssl_align", "qk_norm"), CONFIGURATIONS)
def test_every_parameter_gets_a_gradient(branches, ssl_align, qk_norm):
    model = tiny(branches, ssl_align=ssl_align, qk_norm=qk_norm)
    at_initialisation = backward(model, branches)
    assert [name for name, gradient in at_initialisation.items() if gradient is None] == []
    model.zero_grad()
    gradients = backward(filled(model), branches)
    assert [name for name, gradient in gradients.items() if not (gradient != 0).any()] == []
    rows = gradients["y_embedder.embedding_table.weight"].abs().sum(dim=1) > 0
    assert rows.tolist() == [True, False, True, False, False, True]  # labels 0, 2 and the null class are used
    assert model.pos_embed.grad is None


@pytest.mark.parametrize("branches", [1, 3])
def test_gradient_checkpointing_changes_no_gradient(branches):
    plain, thrifty = filled(tiny(branches)), filled(tiny(branches))
    thrifty.gradient_checkpointing = True
    expected, gradients = backward(plain, branches), backward(thrifty, branches)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


# ---- Forward passes -------------------------------------------------------------------------------------------------


def outputs(out):
    return [*out.velocities, *out.accelerations, *out.projections]


@pytest.mark.parametrize("train", [True, False])
def test_forward_draws_nothing_random(train):
    model = filled(tiny(branches=3, ssl_align=True, qk_norm=True)).train(train)
    x, times, y = inputs(branches=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = outputs(model(x, times, y))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = outputs(model(x, times, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_times_that_branches_share_are_embedded_once_with_the_same_bits(branches):
    model = filled(tiny(branches)).eval()
    x, (t,), y = inputs()
    calls = collections.Counter()
    for name in ("t_embedder", "dt_embedder") if branches > 1 else ("t_embedder",):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    shared = model.velocity(x, t, y)
    assert calls == {"t_embedder": 1, "dt_embedder": 1} if branches > 1 else {"t_embedder": 1}
    calls.clear()
    apart = model.velocity(x, [t.clone() for _ in range(branches)], y)
    assert calls["t_embedder"] == branches and calls["dt_embedder"] == branches - 1
    assert torch.equal(shared, apart)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_velocity_is_the_last_velocity_of_forward_and_does_no_dead_work(branches):
    model = filled(tiny(branches, ssl_align=branches > 1)).eval()
    x, (t,), y = inputs()
    calls = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = model(x, t, y).velocities[-1]
    forward_calls, calls[:] = set(calls), []
    velocity = model.velocity(x, t, y)
    assert torch.equal(velocity, expected)
    dead = ("final_layer.0.", "final_acc_layer.", "projectors.") if branches > 1 else ("nothing.",)
    assert forward_calls - set(calls) == {name for name in forward_calls if f"{name}.".startswith(dead)}
    assert all(any(name.startswith(part) for name in forward_calls) for part in dead if branches > 1)


@pytest.mark.parametrize("number", [0.25, torch.tensor(0.25)])
@pytest.mark.parametrize("options", [{}, {"dmf_depth": 2}, {"context_dim": 6}], ids=["flow", "flow map", "text"])
def test_a_number_is_the_time_of_all_samples(options, number):
    config = {**TINY, "df_idxs": (2,), **options}
    if "context_dim" in options:
        del config["num_classes"]
    model = filled(build(config)).eval()
    x, _, y = inputs()
    y = torch.randn(len(x), 3, 6) if "context_dim" in options else y
    time, end = torch.full((len(x),), 0.25), torch.zeros(len(x))
    assert torch.equal(model.velocity(x, number, y), model.velocity(x, time, y))
    if "dmf_depth" in options:
        assert torch.equal(model.average_velocity(x, number, 0, y), model.average_velocity(x, time, end, y))


@pytest.mark.parametrize("time", [0.5, torch.full((2,), 0.5)])
@pytest.mark.parametrize("label", [-1, NULL + 1])
def test_a_label_out_of_range_is_refused_with_the_range(label, time):
    model, x = tiny().eval(), torch.zeros(2, 4, 4, 4)
    model.velocity(x, time, torch.tensor([0, NULL]))
    assert torch.equal(model.velocity(x, time, 1), model.velocity(x, time, torch.tensor([1, 1])))
    with pytest.raises(ValueError, match=f"label {label} "):
        model.velocity(x, time, label)
    with pytest.raises(ValueError, match=rf"label {label} .* 0 to {NULL - 1}, nor {NULL}"):
        model.velocity(x, time, torch.tensor([0, label]))


def test_one_time_tensor_is_all_branches_time():
    model = filled(tiny(branches=3))
    x, (t,), y = inputs()
    shared, separate, stacked = (outputs(model(x, times, y)) for times in (t, [t, t, t], torch.stack([t, t, t])))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(shared, separate, stacked, strict=True))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_every_attention_is_scaled_dot_product_attention(branches, monkeypatch):
    model = filled(tiny(branches, qk_norm=True))
    x, times, y = inputs(branches)
    shapes = []
    attention = F.scaled_dot_product_attention

    def counting(q, k, v, *args, **kwargs):
        shapes.append((q.shape, k.shape, v.shape))
        return attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    model(x, times, y)
    assert len(shapes) == TINY["depth"] + branches - 1
    assert {shape for three in shapes for shape in three} == {(4, 2, 4, 8)}
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def test_samples_of_a_batch_do_not_see_each_other():
    model = filled(tiny(branches=2)).double()
    x, times, y = inputs(branches=2)
    x, times = x.double(), [t.double() for t in times]
    together = outputs(model(x, times, y))
    for i in range(4):
        alone = outputs(model(x[i : i + 1], [t[i : i + 1] for t in times], y[i : i + 1]))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-12, atol=1e-14)


def test_cross_attention_equals_torchs_own_module():
    torch.manual_seed(0)
    ours = CrossSpaceAttention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    nn.init.normal_(ours.multihead_attn.in_proj_bias)
    theirs.load_state_dict(ours.multihead_attn.state_dict())
    patches, feature = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    query, context = ours.layer_norm(patches), ours.layer_norm(feature)
    torch.testing.assert_close(ours(patches, feature), query + theirs(query, context, context, need_weights=False)[0])


def test_time_embedding_is_the_sinusoid_of_t_itself():
    t = torch.tensor([0.0, 0.3, 1.0, -0.01])
    for row, time in zip(sinusoid(t, TimestepEmbedder.NUM_FREQUENCIES), t.tolist(), strict=True):
        angles = [time * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


def test_the_gap_is_signed_and_goes_from_one_branch_to_the_next():
    model = filled(tiny(branches=3))
    gaps = []
    model.dt_embedder.register_forward_pre_hook(lambda _, args: gaps.append(args[0]))
    x, times, y = inputs(branches=3)
    model(x, times, y)
    assert torch.equal(torch.stack(gaps), torch.stack(times).diff(dim=0))


# ---- The legacy clamp -----------------------------------------------------------------------------------------------


def gap_norms(shift, scale):
    """The same time-gap AdaLN without and with the clamp, whose Linear gives constant shift and scale; sizes 2D = 8."""
    torch.manual_seed(0)
    plain, legacy = TimeGapAdaLN(8, 4), TimeGapAdaLN(8, 4, legacy_scaling=True)
    nn.init.zeros_(plain.adaLN_modulation[1].weight)
    with torch.no_grad():
        plain.adaLN_modulation[1].bias.copy_(torch.cat([torch.full((8,), shift), torch.full((8,), scale)]))
    legacy.load_state_dict(plain.state_dict())
    return plain, legacy


@pytest.mark.parametrize("shift", [0.5, 9.0, -9.0])
def test_legacy_scaling_clamps_the_scale_and_not_the_shift(shift):
    g = torch.Generator().manual_seed(0)
    h, gap = torch.randn(2, 3, 8, generator=g), torch.randn(2, 8, generator=g)
    for scale, clamped in ((4.9, 4.9), (-4.9, -4.9), (5.5, 5.0), (80.0, 5.0), (-7.0, -5.0)):
        plain, legacy = gap_norms(shift, scale)
        at_the_bound, _ = gap_norms(shift, clamped)
        assert torch.equal(legacy(h, gap), at_the_bound(h, gap))
        assert torch.equal(legacy(h, gap), plain(h, gap)) == (scale == clamped)


def test_legacy_scaling_reaches_vera_and_nothing_else():
    model = tiny(branches=3, legacy_scaling=True)
    assert all(vera.acc_norm.legacy_scaling for vera in model.df_blocks)
    assert not any(vera.acc_norm.legacy_scaling for vera in tiny(branches=3).df_blocks)
    assert model.state_dict().keys() == tiny(branches=3).state_dict().keys()
    plain, legacy = filled(tiny(branches=3)), filled(model)
    x, times, y = inputs(branches=3)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(plain(x, times, y)), outputs(legacy(x, times, y)), strict=True)
    )
    with torch.no_grad():
        for net in (plain, legacy):
            for module in net.modules():
                if isinstance(module, Block | VelocityLayer | TimeGapAdaLN):
                    module.adaLN_modulation[1].bias.fill_(9.0)
    first, second = plain(x, times, y), legacy(x, times, y)
    assert torch.equal(first.velocities[0], second.velocities[0])  # before the first VeRA block
    assert not torch.equal(first.velocities[1], second.velocities[1])


def test_qk_norm_normalises_each_head_after_the_split():
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm=True)
    seen = []
    attention.q_norm.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    h = torch.randn(3, 5, 16)
    used, *_ = attention.heads(h)
    q, normalised = seen[0]
    assert used is normalised
    torch.testing.assert_close(q, attention.qkv(h)[..., :16].view(3, 5, 2, 8).transpose(1, 2))
    centred = q - q.mean(-1, keepdim=True)
    torch.testing.assert_close(normalised, centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["DeepFlow-Ti/2", "SiT-Ti/2", "DeepFlow-DMF-Ti/2", "DeepFlow-MMDiT-Ti/2"])
def test_tokens_are_contiguous_before_and_after_every_block(name, half):
    """A transposed layout would persist through all residual connections and split fused kernels on a GPU."""
    model, seen = create_model(name, input_size=8), []
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    y = torch.randn(2, 6, model.context_dim) if model.kind == "text" else torch.tensor([0, 1])
    for part in [*model.blocks, *model.df_blocks]:
        part.register_forward_hook(lambda _, given, made: seen.extend(h for h in (*given, *made) if h is not None))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(x, t, y)
    assert len(seen) >= 3 * len(model.blocks) and all(h.is_contiguous() for h in seen)
