"""Figure 2(d): distances between branches and the final features, on a tiny checkpoint, against sums by hand."""

import json

import pytest
import tiny
import torch
from PIL import Image

from common.errors import InputError
from evaluations import feature_distance
from evaluations.metrics.results import is_better
from models import load_model
from samplers import sample_labels, sample_noise


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    vae = folder / "tiny-vae"
    names = ("DeepFlow", "SiT", "DMFT", "DeepFlow-DMF")
    return {name: tiny.checkpoint(folder / f"{name}.pt", vae, f"{name}-Ti/2") for name in names}


def run(folder, ckpt, *more):
    """Content of the JSON that one run writes."""
    out = folder / "distance.json"
    arguments = ["--ckpt", ckpt, "--num-samples", 3, "--batch-size", 2, "--num-steps", 4, "--out", out, *more]
    feature_distance.main([str(argument) for argument in arguments])
    return json.loads(out.read_text())


def test_first_step_of_both_features_by_hand(checkpoints, tmp_path, capsys):
    result = run(tmp_path, checkpoints["DeepFlow"], "--plot", tmp_path / "plot.png")
    model, _ = load_model(checkpoints["DeepFlow"])
    x, y = sample_noise(0, range(3), 0, (4, tiny.SIZE, tiny.SIZE)), sample_labels(0, range(3), tiny.CLASSES)
    with torch.no_grad():
        first, final = model.run_branches(x, [torch.ones(3)] * 2, y)
    out, means = capsys.readouterr().out.splitlines(), result["metrics"]
    for column, (when, tokens) in enumerate((("before", first.v_star), ("after", first.aligned))):
        difference, name = tokens - final.v_star, f"branch 1, {when} VeRA"
        curve = result["curves"][name]
        assert curve[0] == [1.0, pytest.approx((difference**2).sum(-1).sqrt().mean().item(), rel=1e-5)]
        assert [t for t, _ in curve] == pytest.approx([1, 0.68, 0.36, 0.04])
        assert means[f"distance, {name}"] == pytest.approx(sum(value for _, value in curve) / 4)
        per_token, per_image = (float(out[line].split("|")[2 + column]) for line in (2, 3))
        assert per_token == pytest.approx(means[f"distance, {name}"], abs=6e-4)
        assert per_image == pytest.approx(means[f"distance per image, {name}"], abs=6e-4)
    assert "the paper does not say which" in out[-1]
    assert all(is_better(name, 2.9, than=7.2) for name in means)
    assert (result["settings"]["model"], result["settings"]["step"]) == ("DeepFlow-Ti/2", 3)
    assert Image.open(tmp_path / "plot.png").size[0] > 300


def test_reductions_by_hand():
    """Two tokens of two channels, (3, 4) and (0, 5): lengths 5 and 5; all four numbers; their mean (1.5, 4.5)."""
    difference = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    found = {name: reduce(difference).item() for name, reduce in feature_distance.REDUCTIONS.items()}
    assert found == pytest.approx({"per token": 5.0, "per image": 50**0.5, "of the mean token": 22.5**0.5})


def test_sit_is_looked_at_after_a_named_block(checkpoints, tmp_path):
    last = run(tmp_path, checkpoints["SiT"], "--block", 3, "--mode", "ode")["curves"]["block 3"]
    first = run(tmp_path, checkpoints["SiT"], "--block", 1, "--mode", "ode")["curves"]["block 1"]
    assert len(first) == len(last) == 4
    assert all(0 < near[1] < far[1] for near, far in zip(last, first, strict=True))


def test_deep_supervision_alone_has_the_same_features_on_both_sides(tmp_path):
    ckpt = tiny.checkpoint(tmp_path / "deep.pt", tmp_path / "tiny-vae", vera="none")
    curves = run(tmp_path, ckpt)["curves"]
    assert curves["branch 1, before VeRA"] == curves["branch 1, after VeRA"]


def test_batch_size_does_not_show(checkpoints, tmp_path):
    one, three = (run(tmp_path, checkpoints["DeepFlow"], "--batch-size", size)["metrics"] for size in (1, 3))
    assert one == pytest.approx(three, rel=1e-4)


def test_a_published_flow_map_without_head_needs_its_depth(checkpoints, tmp_path):
    """Without --dmf-depth nothing distinguishes it from a SiT, whose time is reversed."""
    state = tiny.load(checkpoints["DMFT"])["ema"]
    torch.save({name: tensor for name, tensor in state.items() if "logvar" not in name}, tmp_path / "map.pt")
    ours = run(tmp_path, checkpoints["DMFT"], "--block", 3)["curves"]
    assert run(tmp_path, tmp_path / "map.pt", "--block", 3, "--dmf-depth", 2)["curves"] == ours
    assert run(tmp_path, tmp_path / "map.pt", "--block", 3, "--convention", "sit")["curves"] != ours
    with pytest.raises(InputError, match=r"map.pt.*--convention"):
        run(tmp_path, tmp_path / "map.pt", "--block", 3)


@pytest.mark.parametrize("name", ["DeepFlow", "SiT", "DMFT", "DeepFlow-DMF"])
def test_probing_does_not_change_the_velocity(checkpoints, name):
    model, _ = load_model(checkpoints[name])
    x, y = sample_noise(0, range(2), 0, (4, tiny.SIZE, tiny.SIZE)), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model.velocity(x, torch.full((2,), 0.5), y)
        torch.testing.assert_close(feature_distance.Probe(model, 1)(x, torch.full((2,), 0.5), y), expected)


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("SiT", (), "one branch; name a block with --block .1 to 3."),
        ("SiT", ("--block", 4), "--block 4 is out of range"),
        ("DeepFlow", ("--num-steps", 0), "--num-steps 0 is out of range"),
        ("DeepFlow", ("--plot", "."), "--plot . is a folder; name a file"),
    ],
)
def test_mistakes_are_named(checkpoints, tmp_path, name, more, match):
    with pytest.raises(InputError, match=match):
        run(tmp_path, checkpoints[name], *more)
