"""The steps of Table 7a (--vera), the shallow ACC_MLP of Table 7c: sizes, what leads to the next branch, training."""

import itertools

import pytest
import tiny
import torch

from common.errors import InputError
from common.flags import parse_flags
from models import create_model, load_checkpoint, model_config
from models.deepflow import VERA_STEPS
from models.presets import build
from training.config import TrainConfig

SIZES = {"none": 131_693_600, "gap": 134_843_936, "acceleration": 163_837_488, "full": 166_201_392}
TINY = {"input_size": 8, "depth": 4, "df_idxs": (1, 3), "hidden_size": 32, "num_heads": 2, "projector_dim": 16}


def tiny_model(**options):
    return tiny.fill_(create_model("DeepFlow-Ti/2", **{**TINY, **options}), std=0.1)


def inputs():
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 8), [torch.rand(3) for _ in range(3)], torch.tensor([0, 1, 2])


@pytest.mark.parametrize("step", VERA_STEPS)
def test_parameters_of_deepflow_b(step):
    with torch.device("meta"):
        model = create_model("DeepFlow-B/2", vera=step)
    assert sum(p.numel() for p in model.parameters()) == SIZES[step]


def test_parameters_of_the_shallow_acceleration_mlp():
    """{2048, 768} instead of {2048, 4096, 2048, 768}: two Linears of 2048 × 4096 fewer."""
    with torch.device("meta"):
        model = create_model("DeepFlow-B/2", acc_mlp=(2048,))
    shallower = SIZES["full"] - 2 * 2048 * 4096 - 4096 - 2048
    assert sum(p.numel() for p in model.parameters()) == shallower


def test_each_step_adds_names_to_those_before():
    names = [set(tiny_model(vera=step).state_dict()) for step in VERA_STEPS]
    for fewer, more in itertools.pairwise(names):
        assert fewer < more
    added = {name.split(".")[0] for name in names[-1] - names[0]}
    assert added == {"df_blocks", "dt_embedder", "final_acc_layer"}


def test_without_vera_the_branches_are_one_plain_transformer():
    """The final velocity at one t is that of the SiT with the same weights."""
    model = tiny_model(vera="none")
    sit = create_model("SiT-Ti/2", **{**TINY, "df_idxs": ()})
    state = model.state_dict()
    final = {name.replace("final_layer.1.", "final_layer."): tensor for name, tensor in state.items()}
    sit.load_state_dict({name: tensor for name, tensor in final.items() if not name.startswith("final_layer.0.")})
    x, (t, *_), y = inputs()
    assert torch.equal(model.velocity(x, t, y), sit.velocity(x, t, y))
    out = model(x, t, y)
    assert (len(out.velocities), out.accelerations) == (3, [])


@pytest.mark.parametrize("step", ["gap", "acceleration"])
def test_the_refined_tokens_of_the_steps_between(step):
    """Equation 8 alone, on v* or on concat(v*, a*); the patches play no part."""
    model = tiny_model(vera=step)
    vera, v_star, gap = model.df_blocks[0], torch.randn(3, 16, 32), model.embed_gap(torch.rand(3))
    a_star, refined = vera(None, v_star, gap)
    assert (a_star is None) == (step == "gap")
    h = v_star if step == "gap" else torch.cat([v_star, vera.acc_mlp(v_star)], dim=-1)
    assert torch.equal(refined, vera.acc_norm(h, gap))
    x, times, y = inputs()
    assert not torch.equal(model(x, times, y).velocities[-1], model(x, times[:1] * 3, y).velocities[-1])


@pytest.mark.parametrize("step", VERA_STEPS)
def test_every_step_trains_resumes_and_is_rebuilt_from_its_checkpoint(step, tmp_path):
    data = tiny.data_folder(tmp_path / "data")
    run = tiny.run_train(data, tmp_path, vera=step, max_train_steps=2, ssl_align=False)
    content = tiny.load(run / "checkpoints/0000002.pt")
    assert content["config"]["model_options"]["vera"] == step
    assert content["config"]["tg_upper_bound"] == (0 if step == "none" else 0.01)
    assert ("loss_a1" in tiny.log_lines(run)[-1]) == (step in ("acceleration", "full"))
    tiny.run_train(data, tmp_path, vera=step, max_train_steps=3, resume="auto")
    path = run / "checkpoints/0000003.pt"
    loaded = load_checkpoint(path, weights="raw").model.state_dict()
    assert not tiny.differences(dict(loaded), tiny.load(path)["model"])


@pytest.mark.parametrize("init", ["dit", "repa"])
def test_text_models_have_the_steps_too(init):
    options = {"input_size": 8, "depth": 2, "df_idxs": (1,), "hidden_size": 32, "num_heads": 2, "context_dim": 8}
    x, (t, *_), _ = inputs()
    for step in VERA_STEPS:
        model = create_model("DeepFlow-MMDiT-Ti/2", **options, projector_dim=16, vera=step, init=init)
        assert len(model(x, t, torch.randn(3, 5, 8)).velocities) == 2


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ({"vera": "most"}, "--vera most is unknown"),
        ({"vera": "gap", "acc_mlp": (2048,)}, "--acc-mlp"),
        ({"acc_mlp": (0,)}, r"--acc-mlp \[0\]"),
        ({"df_idxs": "", "vera": "none"}, "--vera and --acc-mlp need a model with key layers"),
    ],
)
def test_bad_steps(flags, culprit):
    with pytest.raises(InputError, match=culprit):
        create_model("DeepFlow-B/2", **flags)


def test_an_unknown_step_ends_a_run_before_it_begins(tmp_path):
    with pytest.raises(InputError, match="--vera most is unknown; choose one of none, gap"):
        tiny.run_train(tiny.data_folder(tmp_path / "data"), tmp_path / "exps", vera="most")
    assert not (tmp_path / "exps").exists()


def test_without_vera_the_branches_share_one_time():
    line = ["--exp-name", "a", "--vera", "none"]
    assert parse_flags(TrainConfig, line).resolve().tg_upper_bound == 0
    with pytest.raises(InputError, match="--vera none has one time"):
        parse_flags(TrainConfig, [*line, "--tg-upper-bound", "0.1"]).resolve().check()


def test_old_configurations_are_of_the_full_model():
    options = {name: v for name, v in model_config("DeepFlow-Ti/2").items() if name not in ("vera", "acc_mlp")}
    assert build(options).state_dict().keys() == create_model("DeepFlow-Ti/2").state_dict().keys()
