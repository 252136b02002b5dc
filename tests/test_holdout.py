"""The error on held-out images: known answers, who is held out, what stays as it was, bad input."""

import dataclasses
import json
import re
import shutil

import captioned
import numpy as np
import programs
import pytest
import tiny
import torch
from torch import nn

import train
import train_t2i
from common.errors import InputError
from common.flags import parse_flags
from dataset import open_captions, open_dataset
from latents.manifest import MANIFEST, NAMES
from latents.names import pack_names
from models.deepflow import DeepFlowOutput
from models.encoders import Encoder
from models.flow_map import FlowMap
from preprocessing.options import PackFlags
from preprocessing.pack import pack
from training.checkpoint import checkpoint_path
from training.config import TrainConfig
from training.ema import EMA
from training.holdout import TIMES, is_held_out
from training.trainer import Trainer

LATENT = (4, tiny.SIZE, tiny.SIZE)
FRACTION = 0.3


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data", 20)


@pytest.fixture
def held(tmp_path):
    """A folder of other images; their labels are 0, 1, 2, 0, … in the order of their names."""
    return tiny.data_folder(tmp_path / "held", 10, mean=numbers(10) / 10)


def numbers(count):
    """Means of latents (count, 4, 8, 8): image i is i everywhere."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, *LATENT))


def without_noise(data, count, mean=0.5):
    """Give all images the same latents, whatever noise samples their posterior."""
    for i in range(count):
        moments = np.zeros((8, tiny.SIZE, tiny.SIZE), np.float32)
        moments[:4] = mean
        np.save(tiny.moments_file(data, i), moments)
    return data


def probe(monkeypatch, look, run=tiny.run_train, *arguments, **changes):
    """What `look` returns of the Trainer of a run that is set up and not trained."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda trainer: seen.append(look(trainer)) or True)
        run(*arguments, **changes)
    return seen[0]


def measured(monkeypatch, network, *arguments, **changes):
    """Errors of a network that stands in for the run's."""

    def look(trainer):
        return trainer.held_out.measure(network, EMA(network, 0.9))

    return probe(monkeypatch, look, *arguments, **changes)


def held_lines(run_dir):
    """Lines of held-out errors, without those of training."""
    lines = (line for line in tiny.log_lines(run_dir) if "loss" not in line)
    return [{name: value for name, value in line.items() if name != "epoch"} for line in lines]


class Velocity(nn.Module):
    """A network of one formula, velocity(x, t), for two branches."""

    def __init__(self, velocity):
        super().__init__()
        self.formula = velocity

    def forward(self, x, times, y):
        velocities = [self.formula(x, t.view(-1, 1, 1, 1)) for t in times]
        return DeepFlowOutput(velocities, [], [])


def expected_errors(moments, seed, rows, scale=tiny.SPEC.scale):
    """mean (ε − x_0)² of images at the eight times, from the documented streams."""
    errors = []
    for row, moment in zip(rows, moments, strict=True):
        normals = np.random.default_rng([seed, row, 5]).standard_normal((9, *LATENT), np.float32)
        x0 = (moment[:4] + moment[4:] * normals[0]) * scale
        errors.append([np.mean((noise - x0) ** 2) for noise in normals[1:]])
    return np.mean(errors, axis=0)


# ------------------------------------------------------------------------------------------------- known answers


def test_a_network_without_output_has_the_mean_square_of_the_velocity(data, held, tmp_path, monkeypatch):
    found = measured(monkeypatch, Velocity(lambda x, t: 0 * x), tiny.run_train, data, tmp_path, holdout=held, seed=3)
    expected = expected_errors([np.load(tiny.moments_file(held, i)) for i in range(10)], 3, range(10))
    for name in ("v1", "v2"):
        assert [found[f"holdout_{name}_t{t}"] for t in TIMES] == pytest.approx(expected, rel=1e-5)
        assert found[f"holdout_{name}"] == found[f"holdout_raw_{name}"] == pytest.approx(expected.mean(), rel=1e-5)
    assert [1 / 16, 3 / 16, 15 / 16] == [TIMES[0], TIMES[1], TIMES[-1]] and len(TIMES) == 8


def test_the_exact_velocity_has_no_error(data, held, tmp_path, monkeypatch):
    without_noise(held, 10)
    exact = Velocity(lambda x, t: (x - 0.5 * tiny.SPEC.scale) / t)
    found = measured(monkeypatch, exact, tiny.run_train, data, tmp_path, holdout=held)
    assert max(found.values()) < 1e-9 and len(found) == 2 * 2 + 2 * len(TIMES)


def test_the_exact_flow_map_has_no_error_and_one_without_output_that_of_the_velocity(data, held, tmp_path, monkeypatch):
    """Of a single point, x_r lies on the line from x_t: u = (x_t − c)/t for every r."""
    without_noise(held, 10)
    normals = [np.random.default_rng([0, row, 5]).standard_normal((17, *LATENT), np.float32) for row in range(10)]
    squares = np.mean([np.square(noise[1:] - 0.25).sum(axis=(1, 2, 3)).reshape(2, 8).mean(1) for noise in normals], 0)
    for output, expected in ((1, [0, 0]), (0, squares)):

        def average_velocity(self, x, t, r, y, output=output):
            return output * (x - 0.5 * tiny.SPEC.scale) / t.view(-1, 1, 1, 1)

        def forward(self, x, t, y, r=None):
            u = self.average_velocity(x, t, r, y)
            return DeepFlowOutput([u], [], [], torch.zeros(len(x)))

        monkeypatch.setattr(FlowMap, "average_velocity", average_velocity)
        monkeypatch.setattr(FlowMap, "forward", forward)
        found = probe(
            *(monkeypatch, lambda trainer: trainer.held_out.measure(trainer.model, trainer.ema)),
            *(tiny.run_train_dmf, data, tmp_path, None),
            **{"holdout": held, "g_type": "default", "dmf_depth": 1},
        )
        errors = [found["holdout_error_flow"], found["holdout_error_map"]]
        assert errors == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_both_weights_are_measured(data, held, tmp_path):
    """The averages stay at the start, where nothing is predicted."""
    run_dir = tiny.run_train(data, tmp_path, holdout=held, holdout_every=4, ema_decay=1, learning_rate=1e-2)
    (line,) = held_lines(run_dir)
    expected = expected_errors([np.load(tiny.moments_file(held, i)) for i in range(10)], 0, range(10))
    assert line["holdout_v2"] == pytest.approx(expected.mean(), rel=1e-5)
    assert abs(line["holdout_raw_v2"] - line["holdout_v2"]) > 1e-3


def test_a_part_of_the_images_is_spread_over_all(data, held, tmp_path, monkeypatch):
    changes = {"holdout": held, "holdout_count": 4}
    found = measured(monkeypatch, Velocity(lambda x, t: 0 * x), tiny.run_train, data, tmp_path, **changes)
    rows = [0, 2, 5, 7]
    expected = expected_errors([np.load(tiny.moments_file(held, i)) for i in rows], 0, rows)
    assert found["holdout_v1"] == pytest.approx(expected.mean(), rel=1e-5)


# ------------------------------------------------------------------------------------- processes, batches, steps


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(run's folder, flags) of a run with three held-out images."""
    root = tmp_path_factory.mktemp("one")
    flags = {"holdout": tiny.data_folder(root / "held", 3), "holdout_every": 1, "learning_rate": 1e-2}
    flags["max_train_steps"] = 2
    return tiny.run_train(tiny.data_folder(root / "data"), root, **flags), flags


def assert_same_errors(run_dir, expected):
    found, expected = held_lines(run_dir), held_lines(expected)
    assert len(found) == 2
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_give_the_same_errors(one_process, tmp_path, accumulation):
    run_dir, flags = one_process
    parts = tiny.run_train(run_dir.parent / "data", tmp_path, gradient_accumulation_steps=accumulation, **flags)
    assert_same_errors(parts, run_dir)


def test_processes_give_the_same_errors(one_process, tmp_path):
    """One of the four has no image to measure."""
    run_dir, flags = one_process
    done = programs.run_ranks(4, "train.py", *tiny.train_flags(run_dir.parent / "data", tmp_path, **flags))
    assert done.returncode == 0, done.stderr
    assert_same_errors(tmp_path / "run", run_dir)


def test_measuring_changes_no_step(data, held, tmp_path):
    plain = tiny.run_train(data, tmp_path / "a", log_every=2)
    watched = tiny.run_train(data, tmp_path / "b", log_every=2, holdout=held, holdout_every=1, holdout_count=3)
    one, other = (tiny.load(checkpoint_path(run_dir, 4)) for run_dir in (plain, watched))
    for entry in ("model", "ema", "opt", "train_state", "data"):
        assert not tiny.differences(one[entry], other[entry]), entry
    assert [line["step"] for line in held_lines(watched)] == [1, 2, 3, 4]


def test_the_default_interval_costs_two_percent(data, held, tmp_path, monkeypatch):
    for run, flow, passes in ((tiny.run_train, (), (1, 3)), (tiny.run_train_dmf, (None,), (7, 11))):
        changes = {"holdout": held, "log_every": 10, "batch_size": 2}
        every = probe(monkeypatch, lambda trainer: trainer.held_out.every, run, data, tmp_path, *flow, **changes)
        measuring, training = 10 * 8 * 2 * passes[0], 2 * passes[1]
        assert every % 10 == 0 and (every - 10) * training * 0.02 < measuring <= every * training * 0.02


def test_errors_that_are_not_finite_are_left_out(data, held, tmp_path, monkeypatch, capsys):
    class Broken:
        every = 1

        def measure(self, *_):
            return {"holdout_v1": 1.0, "holdout_v2": float("nan")}

    class OfBroken(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.held_out = Broken()

    monkeypatch.setattr("training.run.Trainer", OfBroken)
    lines = held_lines(tiny.run_train(data, tmp_path, max_train_steps=1))
    assert lines == [{"step": 1, "holdout_v1": 1.0}]
    assert "not finite are left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- who is held out


def collected(monkeypatch, data, folder, **changes):
    """(images that were trained on, images that were measured) of a run; image i of the data is i everywhere."""
    rows, objective = (set(), set()), train.objective

    def noting(network, batch, draws, **options):
        means = batch.moments[:, :4].float().mean(dim=(1, 2, 3)).round().int().tolist()
        rows[not torch.is_grad_enabled()].update(means)
        return objective(network, batch, draws, **options)

    monkeypatch.setattr(train, "objective", noting)
    tiny.run_train(data, folder, holdout=FRACTION, holdout_every=100, **{"max_train_steps": 12, **changes})
    monkeypatch.setattr(train, "objective", objective)
    return rows


def test_a_fraction_is_never_trained_on_in_any_run_of_the_data(tmp_path, monkeypatch):
    data = tiny.data_folder(tmp_path / "data", 20, mean=numbers(20))
    shutil.copytree(data / "vae-sd", data / "vae-sd-mirror")
    pack(PackFlags(data / "vae-sd", tmp_path / "packed/vae-sd", stored_dtype="fp32"))
    trained, held = collected(monkeypatch, data, tmp_path / "a")
    assert 2 < len(held) < 12 and trained | held == set(range(20)) and not trained & held
    runs = [(data, {"seed": 1, "batch_size": 2, "mirror": True, "max_train_steps": 20}), (tmp_path / "packed", {})]
    for number, (folder, changes) in enumerate(runs):
        assert collected(monkeypatch, folder, tmp_path / str(number), **changes) == (trained, held)


def test_names_decide_alone_and_larger_fractions_hold_out_more():
    names = [f"{i % 7}/img{i:08d}.png" for i in range(10_000)]
    chosen = {fraction: {name for name in names if is_held_out(name, fraction)} for fraction in (0.1, 0.2)}
    assert chosen[0.1] < chosen[0.2]
    for fraction, found in chosen.items():
        assert abs(len(found) - 10_000 * fraction) < 5 * (10_000 * fraction * (1 - fraction)) ** 0.5
    assert is_held_out(b"\xff.png".decode("utf-8", "surrogateescape"), 0.5) in (True, False)


def test_all_formats_of_the_published_layout_hold_out_the_same_images(tmp_path):
    """A folder without a manifest names latents only, as does a pack of it; others name images."""
    plain = tiny.data_folder(tmp_path / "plain", 12)
    names = [f"img{i:08d}.png" for i in range(12)]
    (plain / "vae-sd" / NAMES).write_bytes(pack_names(names))
    pack(PackFlags(plain / "vae-sd", tmp_path / "packed/vae-sd"))
    bare = tiny.data_folder(tmp_path / "bare", 12, manifest=False)
    pack(PackFlags(bare / "vae-sd", tmp_path / "packed-bare/vae-sd"))
    chosen = []
    for folder in (plain, tmp_path / "packed", bare, tmp_path / "packed-bare"):
        chosen.append([is_held_out(name, 0.5) for name in open_dataset(folder).names])
    assert sum(chosen[0]) in range(1, 12) and chosen.count(chosen[0]) == 4


def test_the_count_of_the_data_is_that_of_training(data, tmp_path, capsys):
    run_dir = tiny.run_train(data, tmp_path, holdout=FRACTION)
    (count,) = re.findall(r"held out: (\d+) images \(0\.3\)", capsys.readouterr().out)
    assert tiny.load(checkpoint_path(run_dir, 4))["data"]["count"] == 20 - int(count)


# ------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_has_the_errors_of_the_uninterrupted_one(data, tmp_path):
    flags = {"holdout": FRACTION, "holdout_every": 1, "holdout_count": 2}
    whole = tiny.run_train(data, tmp_path / "a", **flags)
    tiny.run_train(data, tmp_path / "b", max_train_steps=3, checkpointing_steps=2, **flags)
    parts = tiny.run_train(data, tmp_path / "b", resume=2, **flags)
    assert held_lines(parts) == held_lines(whole)
    assert [line["step"] for line in held_lines(parts)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("before", "after"), [(FRACTION, 0.5), (None, FRACTION), (FRACTION, None), (FRACTION, "DIR")])
def test_another_fraction_is_another_setting(data, held, tmp_path, before, after):
    before, after = ({} if value is None else {"holdout": value} for value in (before, after))
    after = {"holdout": held} if after.get("holdout") == "DIR" else after
    tiny.run_train(data, tmp_path, max_train_steps=2, **before)
    with pytest.raises(InputError, match=r"--holdout was (0\.3|None), is (0\.[35]|None); .*--allow-changes"):
        tiny.run_train(data, tmp_path, resume="auto", **after)
    run_dir = tiny.run_train(data, tmp_path, resume="auto", allow_changes=True, **after)
    assert "holdout" in tiny.log_lines(run_dir, "starts.jsonl")[-1]["changes"]


def test_a_folder_and_how_it_is_measured_may_change(data, held, tmp_path):
    tiny.run_train(data, tmp_path, max_train_steps=1)
    tiny.run_train(data, tmp_path, resume="auto", max_train_steps=2, holdout=held)
    changes = {"holdout": tiny.data_folder(tmp_path / "third", 3), "holdout_every": 1, "holdout_count": 2}
    run_dir = tiny.run_train(data, tmp_path, resume="auto", **changes)
    assert [line["step"] for line in held_lines(run_dir)] == [2, 3, 4]
    assert tiny.log_lines(run_dir, "starts.jsonl")[-1]["changes"] == {}


def test_a_fraction_enters_the_name_of_a_run_and_a_folder_does_not():
    names = []
    for flags in ([], ["--holdout", "0.1"], ["--holdout", "elsewhere"]):
        config = parse_flags(TrainConfig, ["--weighting", "lognormal", *flags]).resolve()
        names.append(config.named(256).exp_name)
    assert names == ["deepflow-xl-3t", "deepflow-xl-3t-holdout-0.1", "deepflow-xl-3t"]


# -------------------------------------------------------------------------------- flow maps, text, alignment


@pytest.mark.parametrize("guidance", [{}, {"g_type": "distill"}], ids=["mg", "distill"])
def test_a_flow_map_has_its_errors_and_the_same_steps(data, held, tmp_path, guidance):
    flow, flags = tiny.flow_file(tmp_path / "flow.pt"), {"max_train_steps": 2, **guidance}
    bare = tiny.run_train_dmf(data, tmp_path / "bare", flow, **flags)
    measuring = {"holdout": held, "holdout_every": 2, "holdout_count": 2}
    run_dir = tiny.run_train_dmf(data, tmp_path, flow, **measuring, **flags)
    one, other = (tiny.load(checkpoint_path(folder, 2))["model"] for folder in (run_dir, bare))
    assert not tiny.differences(one, other)
    (line,) = held_lines(run_dir)
    assert {"holdout_error_flow", "holdout_v1", "holdout_raw_error_map", "holdout_error_map_t0.0625"} <= line.keys()
    pixels = np.prod(LATENT).item()  # the final branch's mean square is the flow error, a sum
    assert line["holdout_error_flow"] == pytest.approx(line["holdout_v2"] * pixels, rel=1e-5)


def test_the_mean_flow_part_leads_to_half_the_time_and_is_guided_as_in_training(data, held, tmp_path, monkeypatch):
    def look(trainer):
        return [trainer.held_out.draws(index, torch.zeros(17, 2, *LATENT)) for index in range(len(TIMES))]

    changes = {"holdout": held, "g_min": 0.1, "g_max": 0.5}
    draws = probe(monkeypatch, look, tiny.run_train_dmf, data, tmp_path, None, **changes)
    assert [d.times[:, 0].tolist() for d in draws] == [[t, t, t / 2] for t in TIMES]
    assert [d.guided.all().item() for d in draws] == [d.guided.any().item() for d in draws]
    assert [d.guided.all().item() for d in draws] == [0.1 <= t <= 0.5 for t in TIMES]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return captioned.data_folder(tmp_path_factory.mktemp("t2i"))


def run_text(data, folder, **changes):
    values = {"model": "DeepFlow-MMDiT-Ti/2", "batch_size": 2, "max_train_steps": 2, **changes}
    with tiny.fresh_accelerate(), tiny.one_thread():
        train.train(parse_flags(train_t2i.TextTrainConfig, tiny.train_flags(data, folder, **values)))
    return folder / "run"


def test_text_to_image_is_measured_with_first_captions(captions, tmp_path, monkeypatch):
    whole, seen, objective = open_captions(captions), [], train.objective

    def noting(network, batch, draws, **options):
        seen.append((torch.is_grad_enabled(), batch.condition))
        return objective(network, batch, draws, **options)

    monkeypatch.setattr(train, "objective", noting)
    (line,) = held_lines(run_text(captions, tmp_path, holdout=0.5))
    assert {"holdout_v1", "holdout_v2", "holdout_raw_v2", "holdout_v2_t0.5625"} <= line.keys()
    held = [is_held_out(name, 0.5) for name in whole.names]
    rows = [range(whole.text.starts[i], whole.text.starts[i + 1]) for i in range(len(whole))]
    first = whole.context([group[0] for group, out in zip(rows, held, strict=True) if out])
    of_training = whole.context([row for group, out in zip(rows, held, strict=True) if not out for row in group])
    measured_with = [condition for graded, condition in seen if not graded]
    assert 0 < sum(held) < len(held) and all(any(torch.equal(c, f) for f in first) for b in measured_with for c in b)
    trained_with = [condition for graded, batch in seen if graded for condition in batch]
    assert trained_with and all(any(torch.equal(c, f) for f in of_training) for c in trained_with)


def test_a_part_of_captions_counts_and_shows_its_own(captions):
    whole = open_captions(captions)
    part = whole.only(np.array([1, 4]))
    names = list(captioned.PHOTOS)
    sizes = [whole.text.starts[i + 1] - whole.text.starts[i] for i in (1, 4)]
    assert (len(part), part.info.count, part.info.captions) == (2, 2, sum(sizes)) and len(names) == len(whole)
    assert part.conditions(2)[2] == [whole.text.captions[whole.text.starts[i]] for i in (1, 4)]


def test_captions_of_another_encoder_are_refused(captions, tmp_path):
    other = shutil.copytree(captions, tmp_path / "other")
    path = other / "text" / MANIFEST
    content = json.loads(path.read_text())
    content["text"].update(encoder_sha256="0" * 64)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"--holdout .*/other"):
        run_text(captions, tmp_path, holdout=other)


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """Weights of a small alignment encoder."""
    tiny.shrink_encoder(monkeypatch, "dinov2-vit-b", width=16, depth=1)
    return tiny.encoder_file("dinov2-vit-b", tmp_path)


def test_the_alignment_loss_is_measured_and_features_computed_once(tmp_path, encoder, monkeypatch):
    data, held, calls = (tiny.aligned_folder(tmp_path / name, count) for name, count in (("a", 8), ("b", 6))), [], []
    data, held = data
    monkeypatch.setattr(Encoder, "__call__", counting(calls, Encoder.__call__))
    changes = {"ssl_align": True, "enc_ckpt": encoder, "holdout": held, "max_train_steps": 1}
    (line,) = held_lines(tiny.run_train(data, tmp_path, **changes))
    assert -1 <= line["holdout_proj"] <= 1 and line["holdout_proj"] == pytest.approx(line["holdout_proj1"])
    assert calls == [4, 4, 2]  # rows: of a training step, and of all six held-out images


def counting(calls, call):
    def counted(self, images):
        calls.append(len(images))
        return call(self, images)

    return counted


def test_stored_features_are_needed_where_training_has_them(tmp_path, encoder):
    from preprocessing import dataset_tools

    data, held = (tiny.aligned_folder(tmp_path / name, 8) for name in ("a", "b"))
    for folder, weights in ((data, encoder), (held, encoder)):
        if folder is held:
            with pytest.raises(InputError, match=r"--holdout .*/b lacks features-dinov2-vit-b"):
                tiny.run_train(data, tmp_path, ssl_align=True, holdout=held)
        places = ["--source", str(folder / "images"), "--dest", str(folder / "features-dinov2-vit-b")]
        dataset_tools.main(["features", *places, "--enc-type", "dinov2-vit-b", "--enc-ckpt", str(weights)])
    (line,) = held_lines(tiny.run_train(data, tmp_path, ssl_align=True, holdout=held, max_train_steps=1))
    assert "holdout_proj1" in line
    shutil.rmtree(held / "features-dinov2-vit-b")
    places = ["--source", str(held / "images"), "--dest", str(held / "features-dinov2-vit-b")]
    other = tiny.encoder_file("dinov2-vit-b", tmp_path, seed=5)
    dataset_tools.main(["features", *places, "--enc-type", "dinov2-vit-b", "--enc-ckpt", str(other)])
    with pytest.raises(InputError, match=r"--holdout .*/b lacks features-dinov2-vit-b by the weights"):
        tiny.run_train(data, tmp_path / "again", ssl_align=True, holdout=held)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.1", "nan", "inf"])
def test_a_fraction_out_of_range(data, tmp_path, text):
    with pytest.raises(InputError, match=rf"--holdout {re.escape(text)} is out of range.*\./{re.escape(text)}$"):
        tiny.run_train(data, tmp_path / "exps", holdout=text)
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"holdout": "1e-9"}, "--holdout 1e-9 of 20 images holds out no image; raise it"),
        ({"holdout": "0.999999999"}, "--holdout 0.999999999 of 20 images leaves no image to train on; lower it"),
        ({"holdout": 0.3, "batch_size": 20}, "--batch-size 20"),
        ({"holdout": "HELD", "holdout_count": 11}, "--holdout-count 11: only 10 images are held out"),
        ({"holdout_count": 3}, "--holdout-count need --holdout"),
        ({"holdout_every": 3}, "--holdout-every .*need --holdout"),
        ({"holdout": "DATA"}, "--holdout .*/data is --data-dir itself"),
        ({"holdout": "DATA/vae-sd"}, "--holdout .*/data/vae-sd is --data-dir itself"),
        ({"holdout": "nowhere"}, "--holdout nowhere does not exist"),
        ({"holdout": ""}, "--holdout is empty"),
    ],
)
def test_flags_that_make_no_sense(data, held, tmp_path, changes, culprit):
    places = {"HELD": str(held), "DATA": str(data), "DATA/vae-sd": str(data / "vae-sd")}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    with pytest.raises(InputError, match=culprit) as caught:
        tiny.run_train(data, tmp_path / "exps", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "exps").exists()


def spec(**changes):
    return {"spec": dataclasses.replace(tiny.SPEC, **changes)}


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (spec(scale=0.3), "VAE mismatch: --data-dir .*--holdout .* has scale 0.3"),
        (spec(family="other"), "VAE mismatch: .*--holdout .* has family other"),
        ({"shape": (8, 4, 4)}, r"--holdout .*/other: moments_shape is \(8, 4, 4\)"),
        ({"num_classes": 4}, "--holdout .*/other: num_classes is 4, that of --data-dir 3; .*--num-classes"),
        ({"class_names": ["a", "b", "c"]}, "--holdout .*/other: class_names"),
        ({"labels": [0, 1, 2, 5]}, "--holdout: .*/other.*label 5 is out of range"),
        ({"count": 5}, "--holdout: .*/other.* holds 4 latents"),
        ({"empty": True}, "--holdout .*/other has no vae-sd"),
    ],
    ids=str,
)
def test_a_folder_of_other_data(data, tmp_path, options, culprit):
    path = data / "vae-sd" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": ["x", "y", "z"]}))
    made = {name: value for name, value in options.items() if name in ("spec", "shape", "labels")}
    other = tiny.data_folder(tmp_path / "other", 4, **made)
    path = other / "vae-sd" / MANIFEST
    changes = {name: options[name] for name in ("num_classes", "class_names", "count") if name in options}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if "empty" in options:
        shutil.rmtree(other / "vae-sd")
    with pytest.raises(InputError, match=culprit) as caught:
        tiny.run_train(data, tmp_path / "exps", holdout=other)
    assert "\n" not in str(caught.value) and not (tmp_path / "exps").exists()


def test_folders_without_a_manifest(tmp_path):
    data, held = (tiny.data_folder(tmp_path / name, manifest=False) for name in ("data", "held"))
    few = tiny.data_folder(tmp_path / "few", 4, manifest=False, labels=[0, 1, 0, 1])
    assert held_lines(tiny.run_train(data, tmp_path / "a", holdout=held, max_train_steps=1))
    with pytest.raises(InputError, match=r"--holdout .*/few: num_classes is 2, that of --data-dir 3; .*--num-classes"):
        tiny.run_train(data, tmp_path / "b", holdout=few)
    assert held_lines(tiny.run_train(data, tmp_path / "c", holdout=few, num_classes=3, max_train_steps=1))


def test_a_dry_run_needs_no_held_out_images(tmp_path, capsys):
    tiny.run_train(tmp_path / "nowhere", tmp_path, dry_run=True, holdout=0.1)
    assert '"holdout": "0.1"' in capsys.readouterr().out
