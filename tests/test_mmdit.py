"""Text-to-image networks: sizes, what text does, gradients, initialisation."""

import pytest
import tiny
import torch

from common.errors import InputError
from models import PRESETS, create_model, load_model
from models.deepflow import VeRA
from models.flops import count_flops
from models.layers import VelocityLayer
from models.presets import TEXT_MODELS
from training.ema import EMA

SIZES = {"depth": 3, "df_idxs": (1, 2), "hidden_size": 48, "num_heads": 3, "projector_dim": 32}
SIZES.update(input_size=8, context_dim=16)


def make(name="DeepFlow-MMDiT-Ti/2", **changes):
    """A small model whose weights are nowhere zero."""
    return tiny.fill_(create_model(name, **{**SIZES, **changes}), std=0.2)


def inputs(n=2, tokens=5):
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, tokens, 16, generator=g)
    return x, [torch.rand(n, generator=g) for _ in range(3)], context


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_parameter_counts_of_the_presets(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters


@pytest.mark.parametrize(("name", "count"), [("MMDiT-L/2", 505_070_608), ("DeepFlow-MMDiT-L/2", 571_330_608)])
def test_the_papers_size(name, count):
    with torch.device("meta"):
        model = create_model(name)
        aligned = create_model("MMDiT-L/2", ssl_align=True)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in aligned.projectors.parameters()) == 7_344_896
    assert (len(model.blocks), model.x_embedder.proj.out_channels) == (24, 768)
    assert all(block.x_block.attn.num_heads == 24 for block in model.blocks)
    for vera in model.df_blocks if model.num_branches > 1 else ():
        assert isinstance(vera, VeRA)
        assert sum(p.numel() for p in vera.parameters()) == 30_558_720


def test_branches_velocities_and_projections_are_of_image_tokens_alone():
    model = make(ssl_align=True, z_dims=(24,))
    x, times, context = inputs()
    out = model(x, times, context)
    assert [v.shape for v in out.velocities] == [x.shape] * 3
    assert [a.shape for a in out.accelerations] == [x.shape] * 2
    assert [p.shape for p in out.projections] == [(2, 16, 24)] * 2
    assert torch.equal(model.velocity(x, times[0], context), model(x, times[0], context).velocities[-1])


def test_text_changes_every_branch_and_samples_do_not_mix():
    model = make().eval()
    x, times, context = inputs()
    before = model(x, times, context)
    after = model(x, times, torch.stack([context[0], -context[1]]))
    for a, b in zip(before.velocities + before.accelerations, after.velocities + after.accelerations, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-6)
        assert (a[1] - b[1]).abs().max() > 1e-3


@pytest.mark.parametrize("output", range(5))
def test_gradients_reach_the_context_embedder_through_every_branch(output):
    model = make()
    out = model(*inputs())
    (*out.velocities, *out.accelerations)[output].square().mean().backward()
    assert model.context_embedder.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient():
    model = make()
    out = model(*inputs())
    (sum(v.sum() for v in out.velocities) + sum(a.sum() for a in out.accelerations)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make()
        model.gradient_checkpointing = checkpointing
        model(*inputs()).velocities[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert tiny.largest_difference(*gradients) < 1e-6


def test_initialisations():
    dit = create_model("DeepFlow-MMDiT-Ti/2", **SIZES)
    assert all(v.abs().max() == 0 for v in dit(*inputs()).velocities)
    repa = create_model("DeepFlow-MMDiT-Ti/2", **SIZES, init="repa")
    assert all(v.abs().max() > 0 for v in repa(*inputs()).velocities)
    assert not any(m.linear.weight.eq(0).all() for m in repa.modules() if isinstance(m, VelocityLayer))
    assert all(vera.acc_norm.adaLN_modulation[1].weight.eq(0).all() for vera in repa.df_blocks)
    with pytest.raises(InputError, match="--init"):
        create_model("MMDiT-Ti/2", init="zero")


def test_normalisation_epsilons():
    norms = [m for m in make().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms if not norm.elementwise_affine} == {1e-6}
    assert {norm.eps for norm in norms if norm.elementwise_affine} == {1e-5}


def test_flops_need_no_weights_and_grow_with_the_text():
    with torch.device("meta"):
        text, classes = count_flops(create_model("MMDiT-S/2")), count_flops(create_model("SiT-S/2"))
    assert text.total_macs > classes.total_macs


def test_a_checkpoint_gives_both_kinds_of_weights_back(tmp_path):
    model = make()
    ema = EMA(model, 0.9)
    options = {**SIZES, "init": "dit", "patch_size": 2}
    config = {"model": "DeepFlow-MMDiT-Ti/2", "model_options": options}
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "steps": 1, "config": config}
    torch.save(content, tmp_path / "x.pt")
    for weights in ("ema", "raw"):
        loaded, _ = load_model(tmp_path / "x.pt", weights)
        assert tiny.differences(loaded.state_dict(), model.state_dict()) == []


def test_a_published_file_is_recognised_by_its_keys(tmp_path, capsys):
    model = create_model("MMDiT-Ti/2", **{**SIZES, "num_heads": 3, "df_idxs": ()}, ssl_align=True, encoder_depth=2)
    state = {**model.state_dict()}
    torch.save({"ema": state}, tmp_path / "x.pt")
    loaded, options = load_model(tmp_path / "x.pt", num_heads=3)
    assert "text model" in capsys.readouterr().err
    assert options["context_dim"] == 16
    assert options["ssl_align"]
    assert tiny.differences(loaded.state_dict(), state) == []
