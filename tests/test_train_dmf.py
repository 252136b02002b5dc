"""Training of flow maps: the same step on many processes, resume, logs, grids, bad input."""

import argparse
import json
import math
from types import SimpleNamespace

import programs
import pytest
import tiny
import torch
from flow_map_gradients import gradients
from PIL import Image
from torch._dynamo.utils import counters

import train_dmf
import training.flow_map
from common.errors import InputError
from common.flags import parse_flags
from models import load_checkpoint
from models.codec import LatentCodec
from models.deepflow import DeepFlowOutput
from models.flow_map import FlowMap
from models.paths import PATHS
from samplers import GuidedVelocity, integrate, map_step, sample_noise, time_grid


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"), count=24)


def relative_differences(found, expected):
    """Largest |a − b| / max|b| over the gradients."""
    return max(((found[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    expected = gradients(0, 1, through_wrapper=True)
    script = tiny.ROOT / "tests/flow_map_gradients.py"
    for mode in ("wrapper", "bare"):
        done = programs.run_ranks(2, script, tmp_path / mode, mode)
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert relative_differences(tiny.load(tmp_path / f"wrapper.{rank}"), expected) < 1e-5
        assert (
            relative_differences(tiny.load(tmp_path / f"bare.{rank}"), expected) > 0.1
        )  # what lost synchronisation does


@pytest.mark.slow
def test_two_processes_train_like_one(data, flow, tmp_path):
    steps = {"batch_size": 8, "adam_epsilon": 1e-3, "max_train_steps": 2, "g_max": 0.9}
    one = tiny.run_train_dmf(data, tmp_path / "one", flow, **steps)
    done = programs.run_ranks(2, "train_dmf.py", *tiny.map_flags(data, tmp_path / "two", flow, **steps))
    assert done.returncode == 0, done.stderr
    expected, found = (tiny.load(tmp_path / name / "run/checkpoints/0000002.pt") for name in ("one", "two"))
    assert tiny.largest_difference(found["model"], expected["model"]) < 1e-6
    norms = [[line["grad_norm"] for line in tiny.log_lines(tmp_path / name / "run")] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert one.name == "run"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "g_type": "distill", "omega": 1.5},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "deep_supervision": False, "g_type": "default"},
    ],
    ids=["mg", "distill", "bf16"],
)
def test_two_steps_and_two_more_equal_four(data, flow, tmp_path, changes):
    whole = tiny.run_train_dmf(data, tmp_path / "whole", flow, **changes)
    parts = tiny.run_train_dmf(data, tmp_path / "parts", flow, max_train_steps=2, **changes)
    before = tiny.load(parts / "checkpoints/0000002.pt")
    tiny.run_train_dmf(data, tmp_path / "parts", flow, resume="latest", **changes)
    a, b = (tiny.load(run / "checkpoints/0000004.pt") for run in (whole, parts))
    for entry in ("model", "ema", "opt"):
        assert not tiny.differences(a[entry], b[entry])
        assert tiny.differences(before[entry], b[entry])


def test_a_resumed_run_needs_its_own_checkpoint_only(data, tmp_path):
    flow = tiny.flow_file(tmp_path / "flow.pt")
    whole = tiny.run_train_dmf(data, tmp_path / "whole", flow)
    tiny.run_train_dmf(data, tmp_path / "parts", flow, max_train_steps=2)
    flow.unlink()
    others = {"from_scratch": False, "resume": "auto"}
    parts = tiny.run_train_dmf(data, tmp_path / "parts", None, max_train_steps=3, **others)
    tiny.run_train_dmf(data, tmp_path / "parts", flow, resume="latest")  # the file that is gone is not read
    a, b = (tiny.load(run / "checkpoints/0000004.pt") for run in (whole, parts))
    assert not any(tiny.differences(a[entry], b[entry]) for entry in ("model", "ema", "opt"))
    assert a["config"]["model_options"] == b["config"]["model_options"]
    for changes, culprit in (
        ({"dmf_depth": 2}, "--dmf-depth 2 contradicts --resume"),
        ({"g_type": "distill"}, "pass --teacher, or --init-from"),
        ({"trans_depth": 3}, "has depth 2, .*--trans-depth"),
    ):
        with pytest.raises(InputError, match=culprit):
            tiny.run_train_dmf(data, tmp_path / "parts", None, **{**others, **changes})


def test_a_flow_model_is_nothing_to_resume_from(data, flow, tmp_path):
    message = refused(data, tmp_path, None, from_scratch=False, resume=flow)
    assert message == f"--resume {flow} is a flow model; start a run from it with --init-from"


def test_accumulation_does_not_change_the_step(data, flow, tmp_path):
    runs = [
        tiny.run_train_dmf(
            data, tmp_path / str(n), flow, max_train_steps=1, gradient_accumulation_steps=n, adam_epsilon=1e-3
        )
        for n in (1, 4)
    ]
    a, b = (tiny.load(run / "checkpoints/0000001.pt")["model"] for run in runs)
    assert tiny.largest_difference(a, b) < 1e-6


def test_a_run_says_how_its_start_compares_and_logs_what_to_watch(data, flow, tmp_path, capsys):
    run = tiny.run_train_dmf(data, tmp_path, flow, g_max=1.0, cfg_prob=0.0)
    assert "is the flow model's velocity up to a relative difference of" in capsys.readouterr().err
    for line in tiny.log_lines(run):
        assert line["error_flow"] > 0 and line["error_map"] > 0 and line["du_dt_norm"] > 0
        assert line["guided_fraction"] == 1.0
        assert math.isfinite(line["log_variance"])
        assert {"loss_v1", "loss_a1"} <= line.keys()
    model = load_checkpoint(run / "checkpoints/0000004.pt").model
    assert isinstance(model, FlowMap)
    assert model.dmf_depth == 1


@pytest.mark.parametrize(
    ("name", "options", "taken_as"),
    [
        ("SiT-Ti/2", {}, "flow model with num_heads 4, convention sit"),
        ("SiT-Ti/2", {"ssl_align": True, "z_dims": (24,)}, "encoder_depth 2, convention repa"),
        ("DeepFlow-Ti/2", {"df_idxs": (1,)}, "df_idxs (1,), convention repa"),
        ("DMFT-Ti/2", {"dmf_depth": 1, "qk_norm": "rms"}, "flow map model with num_heads 4, dmf_depth 1, qk_norm rms"),
    ],
    ids=["sit", "repa", "deepflow", "dmf"],
)
def test_published_files_are_starting_points(data, tmp_path, capsys, name, options, taken_as):
    ours = tiny.checkpoint(tmp_path / "ours.pt", tiny.SPEC.vae, name, depth=2, **options)
    state = {f"module.{key}": tensor for key, tensor in tiny.load(ours)["ema"].items()}
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "published.pt")
    model = "DeepFlow-DMF-Ti/2" if "df_idxs" in options else "DMFT-Ti/2"
    flags = {"model": model, "df_idxs": str(list(options.get("df_idxs", ()))), "max_train_steps": 1}
    if not options:
        with pytest.raises(InputError, match=r"published.pt.*--convention"):
            tiny.run_train_dmf(data, tmp_path, tmp_path / "published.pt", **flags)
        flags["convention"] = "sit"
    run = tiny.run_train_dmf(data, tmp_path, tmp_path / "published.pt", **flags)
    assert taken_as in capsys.readouterr().err
    assert load_checkpoint(run / "checkpoints/0000001.pt").model.dmf_depth == 1


def test_a_qk_norm_is_added_on_request(data, flow, tmp_path, capsys):
    """As in the published 512² run: all scales 1, another function, and said so."""
    run = tiny.run_train_dmf(data, tmp_path, flow, qk_norm=True, max_train_steps=1, learning_rate=1e-9)
    said = capsys.readouterr().err
    assert "is the flow model's velocity up to a relative difference of" in said
    assert "--qk-norm adds a norm that --init-from lacks" in said
    model = load_checkpoint(run / "checkpoints/0000001.pt").model
    torch.testing.assert_close(model.blocks[0].attn.q_norm.scale, torch.ones(32), rtol=0, atol=1e-6)
    tiny.run_train_dmf(data, tmp_path, flow, qk_norm=True, max_train_steps=2, learning_rate=1e-9, resume="auto")
    with pytest.raises(InputError, match="--no-qk-norm contradicts --init-from"):
        tiny.run_train_dmf(data, tmp_path / "b", run / "checkpoints/0000001.pt", qk_norm=False)


def test_a_conversion_that_changes_the_flow_stops_the_run(data, flow, tmp_path, monkeypatch):
    def wrong(*args):
        model, options = convert(*args)
        return tiny.fill_(model, seed=9), options

    convert = training.flow_map.to_flow_map
    monkeypatch.setattr(training.flow_map, "to_flow_map", wrong)
    with pytest.raises(InputError, match="--init-from is converted wrongly"):
        tiny.run_train_dmf(data, tmp_path, flow)
    assert not (tmp_path / "run").exists()


def test_intermediate_layers_rest_without_deep_supervision(data, flow, tmp_path):
    run = tiny.run_train_dmf(data, tmp_path, flow, deep_supervision=False, ema_decay=0.5)
    start, end = tiny.load(flow)["ema"], tiny.load(run / "checkpoints/0000004.pt")["ema"]
    still = {name for name in start if torch.equal(start[name], end[name])}
    resting = ("final_layer.0", "final_acc_layer", "pos_embed")
    assert still == {name for name in start if name.startswith(resting)}
    assert "loss_v1" not in tiny.log_lines(run)[0]


def test_grids_show_one_two_and_four_steps(data, flow, tmp_path, monkeypatch):
    decode, decoded = LatentCodec.decode, []
    monkeypatch.setattr(LatentCodec, "decode", lambda self, z, *more: decoded.append(z) or decode(self, z, *more))
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    run = tiny.run_train_dmf(data, tmp_path, flow, max_train_steps=1, sampling_steps=1, vae=vae)
    with Image.open(run / "samples/0000001.png") as picture:
        assert picture.size == (13 + 12 * 66 - 2, 16 + 4 * 66 - 2)  # 16 noises, three images of each
    labels = torch.tensor(json.loads((run / "samples/0000001.json").read_text())["labels"])
    u = GuidedVelocity(load_checkpoint(run / "checkpoints/0000001.pt").model.average_velocity, labels, labels)
    noise = sample_noise(0, range(16), 0, (4, 8, 8))
    expected = [integrate(map_step, u, noise, time_grid(steps)).float() for steps in (1, 2, 4)]
    torch.testing.assert_close(decoded[0], torch.stack(expected, dim=1).flatten(0, 1), rtol=0, atol=1e-5)


def test_branches_learn_the_guided_flow():
    """Deep supervision and acceleration of the flow part's rows, by hand: Σ β mean (v − v*)², mean (x_1 − x_0)²."""
    v, a, u, x0, noise, target = torch.randn(6, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.9])
    out = DeepFlowOutput([v, u], [a], [])
    draws, targets = SimpleNamespace(noise=noise[:2]), SimpleNamespace(t=torch.cat([t, t]), target=target)
    loss = train_dmf.branch_losses(out, x0[:2], draws, targets, PATHS["linear"], [0.3, 1.0], 0.5)
    s = t.view(2, 1, 1, 1)
    x = (1 - s) * x0[:2] + s * noise[:2]
    second_order = x - v[:2] * s + 0.5 * a[:2] * s**2
    expected = 0.3 * (v - target)[:2].square().mean((1, 2, 3)) + 0.5 * (second_order - x0[:2]).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.total, expected)


@pytest.mark.slow
def test_a_compiled_run_trains_like_an_eager_one(data, flow, tmp_path):
    """Seven graphs: the derivative; and one each for training and for guidance of block, VeRA and velocity layer."""
    torch._dynamo.reset()
    counters.clear()
    steps = {"max_train_steps": 2, "batch_size": 8}
    eager, compiled = (
        tiny.log_lines(tiny.run_train_dmf(data, tmp_path / str(c), flow, compile=c, **steps)) for c in (False, True)
    )
    assert counters["stats"]["unique_graphs"] == 7 and not counters["graph_break"]
    assert len({line["guided_fraction"] for line in eager}) == 2
    for name in ("loss", "du_dt_norm", "grad_norm"):
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in eager], rel=1e-4)


def refused(data, output_dir, flow, **changes):
    """The message with which a run is refused; nothing may be left behind."""
    with pytest.raises(InputError) as caught:
        tiny.run_train_dmf(data, output_dir, flow, **changes)
    assert not (output_dir / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"dmf_depth": 0}, "--dmf-depth 0"),
        ({"dmf_depth": 2}, "--dmf-depth 2"),
        ({"model": "DeepFlow-DMF-S/2"}, "has hidden_size 128"),
        ({"trans_depth": 3}, "has depth 2"),
        ({"resolution": 32}, "--resolution 32 contradicts"),
        ({"model": "DMFT-Ti/2"}, "choose a DeepFlow-DMF preset"),
        ({"model": "SiT-Ti/2"}, "--model SiT-Ti/2 is trained with train.py"),
        ({"g_min": 0.8, "g_max": 0.2}, "--g-min 0.8"),
        ({"omega": -1.0}, "--omega -1.0"),
        ({"P_std_r": -1.0}, "--P-std-r -1.0"),
        ({"P_mean_t": "nan"}, "--P-mean-t nan"),
        ({"path_type": "cosine"}, "another --path-type"),
        ({"teacher": "x.pt"}, "--teacher is for --g-type distill"),
        ({"g_type": "distill", "teacher": "x.pt"}, "--teacher x.pt does not exist"),
        ({"from_scratch": True}, "exclude each other"),
    ],
)
def test_flags_that_make_no_sense(data, flow, tmp_path, changes, culprit):
    assert culprit in refused(data, tmp_path, flow, **changes)


def test_a_teacher_may_be_on_the_hub():
    words = ["--data-dir", "data", "--model", "DMFT-Ti/2", "--g-type", "distill", "--init-from", "someone/theirs"]
    config = parse_flags(train_dmf.FlowMapConfig, words).resolve()
    config.check()
    assert config.teacher == "someone/theirs"


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"from_scratch": False}, "--init-from is missing"),
        ({"g_type": "distill"}, "pass --teacher, or --init-from"),
        ({"g_type": "mg", "cfg_prob": 0.0}, "--g-type mg needs a null class"),
    ],
)
def test_starts_that_make_no_sense(data, tmp_path, changes, culprit):
    assert culprit in refused(data, tmp_path, None, **changes)


def test_a_flow_model_of_other_classes_or_latents(data, tmp_path):
    for name, options in (("num_classes", {"num_classes": 5}), ("input_size", {"input_size": 4})):
        path = tiny.flow_file(tmp_path / f"{name}.pt", **options)
        assert f"has {name} {options[name]}" in refused(data, tmp_path, path)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"g_type": "distill", "omega": 1.5}, "has no null class"),
        ({"g_type": "mg", "cfg_prob": 0.0}, "--g-type mg needs a null class"),
        ({"g_type": "mg"}, None),
        ({"g_type": "distill", "omega": 1.0}, None),
    ],
)
def test_a_flow_model_without_null_class(data, flow, tmp_path, changes, culprit):
    content = tiny.load(flow)
    content["config"]["cfg_prob"] = 0.0
    torch.save(content, tmp_path / "flow.pt")
    if culprit:
        assert culprit in refused(data, tmp_path, tmp_path / "flow.pt", **changes)
    else:
        tiny.run_train_dmf(data, tmp_path, tmp_path / "flow.pt", max_train_steps=1, **changes)


def test_flags_of_train_without_meaning_here_are_unknown():
    for name in ("weighting", "tg_upper_bound", "ssl_align"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is unknown"):
            parse_flags(train_dmf.FlowMapConfig, tiny.flags(exp_name="x", **{name: 1}))
