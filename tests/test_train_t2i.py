"""Training on captions: what the network gets, resuming, alignment, grids, bad input."""

import json
import shutil

import captioned
import programs
import pytest
import tiny
import torch
from PIL import Image

import train
import train_t2i
from common.errors import InputError
from common.flags import parse_flags
from dataset import Batch, open_captions
from latents.manifest import DataManifest
from latents.names import Names
from models import create_model
from preprocessing.jobs import Job
from preprocessing.options import StoredFlags
from preprocessing.packed import ShardWriter
from training.draws import draw_step

SMALL = {"model": "DeepFlow-MMDiT-Ti/2", "trans_depth": 3, "df_idxs": "1,2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned.data_folder(tmp_path_factory.mktemp("t2i"))


def flags(data, output_dir, **changes):
    """Command line of four steps of a small model; the run's name is `run`."""
    values = {"exp_name": "run", "data_dir": data, "output_dir": output_dir, **SMALL}
    values.update(batch_size=3, max_train_steps=4, sampling_steps=0, log_every=1, learning_rate=1e-3)
    return tiny.flags(**{**values, **changes})


def run(data, output_dir, **changes):
    """Train in this process; returns the run's folder."""
    with tiny.fresh_accelerate(), tiny.one_thread():
        config = parse_flags(train_t2i.TextTrainConfig, flags(data, output_dir, **changes))
        train.train(config)
    return output_dir / config.exp_name


def test_defaults_are_the_papers():
    config = parse_flags(train_t2i.TextTrainConfig, []).resolve()
    assert (config.model, config.max_train_steps, config.cfg_prob) == ("DeepFlow-MMDiT-L/2", 150_000, 0.1)
    assert (config.weighting, config.learning_rate, config.batch_size, config.tg_upper_bound) == (
        "uniform",
        1e-4,
        256,
        0.01,
    )
    assert config.branch_weights(3) == [0.2, 0.2, 1.0]


def test_a_run_is_recorded_with_its_text_encoder(data, tmp_path):
    content = tiny.load(run(data, tmp_path) / "checkpoints/0000004.pt")
    assert content["data"]["text"]["family"] == "clip"
    assert content["data"]["captions"] == captioned.CAPTION_COUNT
    assert content["config"]["model_options"]["context_dim"] == captioned.WIDTH
    lines = tiny.log_lines(tmp_path / "run")
    assert len(lines) == 4
    assert {"loss_v1", "loss_v3", "loss_a2"} <= lines[0].keys()


def test_resumed_training_is_the_uninterrupted_one(data, tmp_path):
    whole = tiny.load(run(data, tmp_path / "a") / "checkpoints/0000004.pt")
    run(data, tmp_path / "b", max_train_steps=2)
    resumed = tiny.load(run(data, tmp_path / "b", resume="latest") / "checkpoints/0000004.pt")
    for entry in ("model", "ema", "opt"):
        assert tiny.differences(whole[entry], resumed[entry]) == []


def test_accumulated_micro_batches_see_the_same_captions(data, tmp_path):
    whole = tiny.load(run(data, tmp_path / "a", batch_size=4, max_train_steps=1) / "checkpoints/0000001.pt")
    options = {"batch_size": 4, "max_train_steps": 1, "gradient_accumulation_steps": 2}
    parts = tiny.load(run(data, tmp_path / "b", **options) / "checkpoints/0000001.pt")
    assert tiny.largest_difference(whole["model"], parts["model"]) < 1e-6


def test_network_gets_the_empty_caption_exactly_where_drop_says(data):
    dataset = open_captions(data)
    config = parse_flags(train_t2i.TextTrainConfig, tiny.flags(exp_name="x", cfg_prob=0.5, batch_size=6)).resolve()
    draws = draw_step(1, config, 2, (4, 8, 8))
    options = {"depth": 2, "df_idxs": (1,), "input_size": 8, "context_dim": captioned.WIDTH}
    model, seen = create_model("DeepFlow-MMDiT-Ti/2", **options), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    context = dataset.context(range(6))
    batch = Batch(1, dataset.gather(range(6))[0], context, None)
    train.objective(model, batch, draws, config=config, dataset=dataset, weights=[0.2, 1.0])
    ((_, _, y),) = seen
    assert 0 < draws.drop.sum() < 6
    for row, drop in enumerate(draws.drop):
        assert torch.equal(y[row], dataset.text.empty if drop else context[row].float())


@pytest.mark.slow
def test_two_processes_make_the_same_steps(data, tmp_path):
    changes = {"batch_size": 4, "init": "repa", "adam_epsilon": 1e-3, "cfg_prob": 0.5}
    one = run(data, tmp_path / "one", **changes)
    done = programs.run_ranks(2, "train_t2i.py", *flags(data, tmp_path / "two", **changes))
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    a, b = (tiny.load(folder / "checkpoints/0000004.pt") for folder in (one, tmp_path / "two/run"))
    assert a["config"]["model_options"]["init"] == "repa"
    assert tiny.largest_difference(a["model"], b["model"]) < 1e-6
    losses = [[line["loss"] for line in tiny.log_lines(folder)] for folder in (one, tmp_path / "two/run")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_alignment_reads_the_images(tmp_path, monkeypatch):
    """Other images, other alignment loss; the velocities' losses of the first step stay."""
    tiny.shrink_encoder(monkeypatch, "dinov2-vit-b", width=16, depth=1)
    changes = {"ssl_align": True, "enc_ckpt": tiny.encoder_file("dinov2-vit-b", tmp_path), "max_train_steps": 1}
    folder, lines = captioned.foreign_folder(tmp_path), []
    for name in ("before", "after"):
        lines += tiny.log_lines(run(folder, tmp_path / name, **changes))
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                image.transpose(Image.Transpose.ROTATE_180).save(path)
    before, after = lines
    assert before["loss_v1"] == after["loss_v1"]
    for key in ("loss_proj1", "loss_proj2"):
        assert abs(before[key] - after[key]) > 1e-6


def test_alignment_takes_stored_features(data, tmp_path, monkeypatch):
    tiny.shrink_encoder(monkeypatch, "mocov3-vit-s")
    source = tmp_path / "data"
    shutil.copytree(data, source)
    manifest = DataManifest.read(source / "vae-sd")
    job = Job(source / "features-mocov3-vit-s", {"command": "features"})
    job.begin()
    writer, everything = ShardWriter(job, (16, 24), StoredFlags(stored_dtype="fp32")), range(captioned.COUNT)
    names = Names(source / "vae-sd/names.txt", captioned.COUNT)
    writer.write(everything, torch.randn(captioned.COUNT, 16, 24).numpy(), names)
    facts = {"kind": "features", "flipped": False, "images": manifest.images, "num_classes": 1}
    facts["encoder"] = {"name": "mocov3-vit-s", "weights": "x"}
    writer.finish(captioned.COUNT, everything, names, [0] * captioned.COUNT, facts, {})
    monkeypatch.setattr(train, "check_grid", lambda *_: None)  # these images are smaller than the encoder's patches
    shutil.rmtree(source / "images")
    aligned = run(source, tmp_path, ssl_align=True, enc_type="mocov3-vit-s")
    assert {"loss_proj1", "loss_proj2"} <= tiny.log_lines(aligned)[0].keys()


def test_grids_carry_their_captions(data, tmp_path):
    folder = run(data, tmp_path, max_train_steps=2, sampling_steps=2) / "samples"
    manifest = json.loads((folder / "0000002.json").read_text())
    assert len(manifest["labels"]) == 16
    assert set(manifest["labels"]) <= {text for group in captioned.PHOTOS.values() for text in group}
    with Image.open(folder / "0000002.png") as picture:
        assert picture.height > picture.width  # room for the captions


def test_a_folder_as_others_prepare_it_trains(tmp_path):
    folder = captioned.foreign_folder(tmp_path)
    assert (run(folder, tmp_path, max_train_steps=1) / "checkpoints/0000001.pt").is_file()


def test_dry_run_without_data(tmp_path, capsys):
    with torch.device("meta"):
        run(tmp_path / "no", tmp_path, dry_run=True, batch_size=256, trans_depth=24, df_idxs="8,16")
    text = capsys.readouterr().out
    assert "82,783 latents (8, 32, 32)" in text
    assert "256 samples per step" in text


@pytest.mark.parametrize(
    ("script", "model", "message"),
    [(train_t2i, "SiT-Ti/2", "train.py"), (train_t2i, "MMDiT", "unknown"), (train, "MMDiT-Ti/2", "train_t2i.py")],
)
def test_a_model_of_the_other_kind_is_refused(data, tmp_path, script, model, message):
    changes = {"model": model, "trans_depth": 2, "df_idxs": "1"}
    with pytest.raises(InputError, match=message):
        if script is train:
            tiny.run_train(tiny.data_folder(tmp_path / "d"), tmp_path, **changes)
        else:
            run(data, tmp_path, **changes)


def test_resuming_on_another_text_encoder_is_refused(data, tmp_path):
    run(data, tmp_path, max_train_steps=1)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    manifest = json.loads((other / "text/manifest.json").read_text())
    manifest["text"]["encoder_sha256"] = "0" * 64
    (other / "text/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="text"):
        run(other, tmp_path, max_train_steps=2, resume="latest")
