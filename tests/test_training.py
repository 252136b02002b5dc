"""The training step and its parts: draws, label drop, EMA, clipping, non-finite steps, log, checkpoints, grids."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import shlex

import numpy as np
import programs
import pytest
import tiny
import torch
from accelerate import Accelerator
from PIL import Image

import train
from common.errors import InputError
from common.files import write_atomically
from common.flags import parse_flags
from dataset import Batch, open_dataset
from models import create_model
from training.checkpoint import checkpoint_path, existing_steps, replacing_old
from training.config import TrainConfig
from training.distributed import rows_of_rank, start_accelerator
from training.draws import draw_step
from training.ema import EMA
from training.logs import RunLog

LATENT = (4, tiny.SIZE, tiny.SIZE)


def config_of(**changes):
    return parse_flags(
        TrainConfig, tiny.flags(**{"exp_name": "x", "batch_size": 8, "cfg_prob": 0.3, **changes})
    ).resolve()


def weights(run_dir, step, entry="model"):
    return tiny.load(run_dir / f"checkpoints/{step:07d}.pt")[entry]


@pytest.fixture
def data(tmp_path):
    return tiny.data_folder(tmp_path / "data")


# -------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (8, 3)])
def test_ranks_and_micro_batches_partition_the_batch(world, accumulation):
    rows = [rows_of_rank(24, world, accumulation, rank).view(accumulation, -1) for rank in range(world)]
    micro_batches = torch.stack(rows, dim=1).flatten(1)  # (micro-batch, rows of all ranks)
    assert torch.equal(micro_batches.flatten().sort().values, torch.arange(24))
    for m, taken in enumerate(micro_batches):
        size = 24 // accumulation
        assert torch.equal(taken.sort().values, torch.arange(m * size, (m + 1) * size))


@pytest.mark.parametrize(("world", "accumulation"), [(3, 1), (1, 3), (2, 3), (16, 1)])
def test_uneven_batch_is_refused(world, accumulation):
    with pytest.raises(InputError, match=f"--batch-size 8 .* multiple of {world * accumulation}"):
        rows_of_rank(8, world, accumulation, 0)


# ---------------------------------------------------------------------- one step on one or many processes


ROUNDING = (2**-23, 2**-20)  # of the largest weight (1), of the largest gradient
LAST = 11  # ten steps from the weights at step 1
TEN_STEPS = {"batch_size": 8, "max_train_steps": LAST, "resume": 1, "allow_changes": True}
TEN_STEPS.update(adam_epsilon=1e-3, adam_beta1=0)  # 1e-8 would blow rounding up to whole steps


def trained_from_filled_weights(data, output_dir, **changes):
    """(first weights, last weights, last gradients) of ten steps from weights that are nowhere zero.

    So every parameter has a gradient; with β₁ = 0 the optimizer's first moment is the (clipped) gradient of the step.
    """
    run_dir = tiny.scrambled_run(data, output_dir, batch_size=8)
    start = weights(run_dir, 1)
    tiny.run_train(data, output_dir, **{**TEN_STEPS, **changes})
    return start, *outcome(run_dir)


def outcome(run_dir):
    """Last weights and gradients of such a run."""
    states = weights(run_dir, LAST, "opt")["state"]
    return weights(run_dir, LAST), {name: state["exp_avg"] for name, state in states.items()}


def assert_equal_but_for_rounding(found, expected):
    """Weights and gradients of ten steps: the sums over the batch were taken in another order, so some bits differ."""
    for a, b, allowed in zip(found, expected, ROUNDING, strict=True):
        largest = max(tensor.abs().max().item() for tensor in b.values())
        assert 0 < tiny.largest_difference(a, b) < allowed * largest


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(data folder, (first weights, last weights, last gradients)) of one process without accumulation."""
    folder = tmp_path_factory.mktemp("reference")
    data = tiny.data_folder(folder / "data", count=24)
    return data, trained_from_filled_weights(data, folder)


def test_every_parameter_moves_in_the_reference_run(reference):
    _, (start, end, gradients) = reference
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert still == ["pos_embed"]
    assert tiny.largest_difference(start, end) > 1e-3
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_steps(reference, tmp_path, accumulation):
    data, (_, *expected) = reference
    _, *found = trained_from_filled_weights(data, tmp_path, gradient_accumulation_steps=accumulation)
    assert_equal_but_for_rounding(found, expected)


def test_an_accelerate_configuration_changes_no_step(reference, tmp_path, monkeypatch):
    data, expected = reference
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no such backend")  # which would fail
    assert not tiny.differences(trained_from_filled_weights(data, tmp_path), expected)


@pytest.mark.parametrize("wrapper", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_accelerate_configuration_that_splits_the_model_is_refused(tmp_path, monkeypatch, wrapper):
    monkeypatch.setenv(f"ACCELERATE_USE_{wrapper}", "true")
    with pytest.raises(InputError, match=f"accelerate .*{wrapper}.*--multi_gpu"):
        start_accelerator(config_of())


def test_gradient_checkpointing_does_not_change_the_steps(reference, tmp_path):
    data, expected = reference
    assert not tiny.differences(trained_from_filled_weights(data, tmp_path, gradient_checkpointing=True), expected)


def launched(launcher, data, output_dir, **changes):
    """The same ten steps under a launcher; returns the last weights and gradients."""
    run_dir = tiny.scrambled_run(data, output_dir, batch_size=8)
    done = launcher(tiny.ROOT / "train.py", *tiny.train_flags(data, output_dir, **{**TEN_STEPS, **changes}))
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    steps = [line["step"] for line in tiny.log_lines(run_dir)]
    assert steps == list(range(1, LAST + 1))
    return outcome(run_dir)


@pytest.mark.slow
def test_two_torchrun_processes_make_the_same_steps(reference, tmp_path):
    data, (_, *expected) = reference
    # A grid in the middle: only the main process draws it, and no process may wait for it alone.
    grids = {"sampling_steps": 6, "vae": tiny.vae_folder(tmp_path / "tiny-vae")}
    found = launched(functools.partial(programs.run, *programs.launcher(2)), data, tmp_path, **grids)
    assert (tmp_path / "run/samples/0000006.png").exists()
    assert_equal_but_for_rounding(found, expected)


@pytest.mark.slow
def test_two_accelerate_processes_with_accumulation_make_the_same_steps(reference, tmp_path):
    data, (_, *expected) = reference
    line = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2)
    launcher = functools.partial(programs.run, *line)
    found = launched(launcher, data, tmp_path, gradient_accumulation_steps=2)
    assert_equal_but_for_rounding(found, expected)


# --------------------------------------------------------------------------------------------- label drop


@pytest.mark.parametrize(("cfg_prob", "low", "high"), [(0, 0, 0), (0.1, 0.085, 0.115), (1, 1, 1)])
def test_rate_of_dropped_labels(cfg_prob, low, high):
    config = config_of(cfg_prob=cfg_prob, batch_size=4000)
    assert low <= draw_step(0, config, 2, (1, 1, 1)).drop.double().mean() <= high


def test_network_gets_the_null_label_exactly_where_drop_says(data):
    dataset = open_dataset(data)
    config = config_of(cfg_prob=0.5, batch_size=12)
    draws = draw_step(0, config, 2, LATENT)
    model = create_model("DeepFlow-Ti/2", depth=2, df_idxs=(1,), num_classes=tiny.CLASSES, input_size=tiny.SIZE)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    moments, labels, _ = dataset.gather(range(12))
    train.objective(model, Batch(0, moments, labels, None), draws, config=config, dataset=dataset, weights=[0.2, 1.0])
    ((x, times, y),) = seen
    assert 0 < draws.drop.sum() < 12
    assert y.tolist() == [tiny.CLASSES if drop else i % tiny.CLASSES for i, drop in enumerate(draws.drop)]
    assert torch.equal(torch.stack(times), draws.times)
    mean, t = moments[:, :4], draws.times[0].view(-1, 1, 1, 1)
    expected = (1 - t) * (mean + 0.1 * draws.posterior) * tiny.SPEC.scale + t * draws.noise
    assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("cfg_prob", [0, 1])
def test_label_rows_learn_as_the_drop_probability_says(data, tmp_path, cfg_prob):
    run_dir = tiny.run_train(data, tmp_path, cfg_prob=cfg_prob, ema_decay=1.0)  # so `ema` keeps the first weights
    name = "y_embedder.embedding_table.weight"
    moved = (weights(run_dir, 4)[name] != weights(run_dir, 4, "ema")[name]).any(dim=1)
    assert moved.tolist() == [cfg_prob == 0] * tiny.CLASSES + [cfg_prob == 1]


# ---------------------------------------------------------------------------------------------------- EMA


def test_ema_against_hand_computed_values():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = EMA(model, decay=0.75)
    for value in (5.0, -3.0):  # 0.75·1 + 0.25·5 = 2, then 0.75·2 − 0.25·3 = 0.75
        model.weight.data.fill_(value)
        ema.update(model)
    assert ema.shadow["weight"].item() == 0.75
    assert model.weight.item() == -3.0


def test_ema_of_a_run_follows_its_weights(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, ema_decay=0.9, checkpointing_steps=1)
    for step in (2, 3, 4):
        before, now, new = weights(run_dir, step - 1, "ema"), weights(run_dir, step, "ema"), weights(run_dir, step)
        expected = {name: (0.9 * before[name].double() + 0.1 * new[name].double()).float() for name in now}
        assert tiny.largest_difference(now, expected) < 2e-7
    assert tiny.largest_difference(now, new) > 1e-4


def test_the_average_starts_from_the_weights_of_the_first_process(data, tmp_path, monkeypatch):
    """DistributedDataParallel hands them to the others, whose own may be of another file of --init-from's folder."""

    def synchronised(self, model, *rest, prepare=Accelerator.prepare):
        return prepare(self, tiny.fill_(model, seed=5), *rest)

    monkeypatch.setattr(Accelerator, "prepare", synchronised)
    run = tiny.run_train(data, tmp_path, max_train_steps=1, ema_decay=1.0)
    content = tiny.load(run / "checkpoints/0000001.pt")
    config = content["config"]
    expected = tiny.fill_(create_model(config["model"], **config["model_options"]), seed=5).state_dict()
    assert not tiny.differences(content["ema"], expected)


def test_swapped_ema_is_put_back_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    averaged = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    tiny.fill_(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), ema.swapped_into(model):
        assert not tiny.differences(dict(model.state_dict()), averaged)
        raise KeyError
    assert not tiny.differences(dict(model.state_dict()), own)
    assert not tiny.differences(ema.shadow, averaged)


# ----------------------------------------------------------------------------------- clipping and precision


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_clipped_to_the_norm(data, tmp_path, accumulation):
    """With betas 0 and a large ε Adam's step is lr/ε · gradient, so its length shows the gradient's."""
    flags = {"adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 100, "learning_rate": 100, "ema_decay": 1.0}
    flags.update(max_train_steps=1, gradient_accumulation_steps=accumulation)

    def length(max_grad_norm):
        run_dir = tiny.run_train(data, tmp_path / str(max_grad_norm), max_grad_norm=max_grad_norm, **flags)
        start, end = weights(run_dir, 1, "ema"), weights(run_dir, 1)
        squares = sum((end[name].double() - start[name].double()).square().sum() for name in start)
        return math.sqrt(squares), tiny.log_lines(run_dir)[0]["grad_norm"]

    unclipped, norm = length(1000)
    assert unclipped == pytest.approx(norm, rel=0.01)
    clipped, same_norm = length(0.01)
    assert norm > 0.1
    assert clipped == pytest.approx(0.01, rel=0.01)
    assert same_norm == norm  # the log shows the norm before clipping


def test_losses_are_float32_under_bf16_autocast(data):
    dataset = open_dataset(data)
    config = config_of(mixed_precision="bf16", batch_size=12)
    with tiny.fresh_accelerate():
        accelerator = start_accelerator(config)
        model = create_model("DeepFlow-Ti/2", depth=2, df_idxs=(1,), num_classes=tiny.CLASSES, input_size=tiny.SIZE)
        inside = []
        model.blocks[0].attn.qkv.register_forward_hook(lambda *args: inside.append(args[-1].dtype))
        network = accelerator.prepare(tiny.fill_(model))
        moments, labels, _ = dataset.gather(range(12))
        draws = draw_step(0, config, 2, LATENT)
        batch = Batch(0, moments, labels, None)
        loss, parts = train.objective(network, batch, draws, config=config, dataset=dataset, weights=[0.2, 1.0])
    assert inside == [torch.bfloat16]
    assert {value.dtype for value in (loss, *parts.values())} == {torch.float32}


def test_bf16_runs_keep_their_state_in_float32(data, tmp_path):
    content = tiny.load(tiny.run_train(data, tmp_path, mixed_precision="bf16") / "checkpoints/0000004.pt")
    moments = [tensor for state in content["opt"]["state"].values() for tensor in state.values()]
    tensors = [*content["model"].values(), *content["ema"].values(), *moments]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert content["config"]["mixed_precision"] == "bf16"


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoint_holds_plain_data_under_the_agreed_names(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path)
    content = torch.load(run_dir / "checkpoints/0000004.pt", weights_only=True)
    assert content.keys() == {"model", "ema", "opt", "scaler", "steps", "train_state", "data", "config"}
    assert (content["steps"], content["scaler"]) == (4, None)
    expected = {"num_classes": 3, "vae": "tiny-vae", "scale": 0.5, "shift": 0.0, "moments_shape": [8, 8, 8]}
    assert expected.items() <= content["data"].items()
    assert content["config"]["model_options"]["df_idxs"] == (1,)
    saved = json.loads((run_dir / "config.json").read_text())
    assert saved == json.loads(json.dumps(content["config"]))
    assert {field.name for field in dataclasses.fields(TrainConfig)} < saved.keys()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file.pt", b"old")]


def test_of_rolling_checkpoints_two_are_kept(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=9, checkpointing_steps=4, rolling_steps=1)
    assert existing_steps(run_dir) == [4, 6, 7, 8, 9]


def test_number_of_rolling_checkpoints(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=7, checkpointing_steps=3, rolling_steps=1, keep_last=1)
    assert existing_steps(run_dir) == [3, 5, 6, 7]


def test_checkpoints_that_were_to_stay_survive_other_intervals(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=3, checkpointing_steps=2, rolling_steps=0)
    assert existing_steps(run_dir) == [2, 3]
    tiny.run_train(data, tmp_path, max_train_steps=8, checkpointing_steps=100, rolling_steps=1, resume="auto")
    assert existing_steps(run_dir) == [2, 3, 6, 7, 8]


# ----------------------------------------------------------------------------------- what a run shows and learns


def test_training_learns_a_toy_data_set(tmp_path):
    class_means = np.array([-2.0, 0.0, 2.0]).reshape(-1, 1, 1, 1)
    data = tiny.data_folder(tmp_path / "data", count=48, mean=np.tile(class_means, (16, 1, 1, 1)))
    run_dir = tiny.run_train(data, tmp_path, batch_size=16, max_train_steps=60, learning_rate=2e-3)
    losses = [line["loss_v2"] for line in tiny.log_lines(run_dir)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_sample_grids_are_written_with_their_manifest(tmp_path):
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    spec = dataclasses.replace(tiny.SPEC, vae=str(vae))
    data = tiny.data_folder(tmp_path / "data", spec=spec)
    run_dir = tiny.run_train(data, tmp_path, sampling_steps=2, max_train_steps=3)
    names = sorted(path.name for path in (run_dir / "samples").iterdir())
    assert names == ["0000002.json", "0000002.png", "0000003.json", "0000003.png"]
    assert Image.open(run_dir / "samples/0000002.png").size == (13 + 4 * 66 - 2, 4 * 66 - 2)  # a letter beside it
    manifest = json.loads((run_dir / "samples/0000002.json").read_text())
    assert (manifest["step"], manifest["weights"], manifest["calls"], manifest["vae"]) == (2, "ema", 50, str(vae))
    assert sorted(set(manifest["labels"])) == [0, 1, 2]
    without = tiny.run_train(data, tmp_path / "without", max_train_steps=3)
    assert not tiny.differences(weights(run_dir, 3), weights(without, 3))  # sampling disturbs nothing


def test_dry_run_prints_the_run_and_writes_nothing(data, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    tiny.run_train(data, tmp_path, dry_run=True, sampling_steps=2, scale_weight=[0.3, 1.0])
    text = capsys.readouterr().out
    assert "1,510,064 parameters" in text
    for part in ('"scale_weight": [', '"learning_rate": 0.001', "GFLOP", "3 steps per epoch", "12 latents (8, 8, 8)"):
        assert part in text, part
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("patch", "shape", "vae"), [(1, (64, 16, 16), "of factor 16"), (2, (8, 32, 32), "sd-vae-ft-ema")]
)
def test_a_dry_run_without_data_assumes_latents_that_suit_the_patches(patch, shape, vae, tmp_path, capsys):
    tiny.run_train("nowhere", tmp_path, dry_run=True, model=f"DeepFlow-S/{patch}")
    text = capsys.readouterr().out
    assert f"latents {shape}, 1000 classes" in text and vae in text


def test_a_start_says_what_differs_and_four_lines(data, tmp_path, capsys):
    run_dir = tiny.run_train(data, tmp_path, max_train_steps=1, df_idxs="1", ema_decay=0.05, mirror=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("flags: ")  # and not with "rank 0 of 1"
    (given,) = (shlex.split(line) for line in lines if line.startswith("flags: "))
    assert {"--df-idxs", "--max-train-steps", "--ema-decay"} < set(given) and "--mirror" not in given
    assert given[given.index("--data-dir") + 1] == str(data) and "--seed" not in given
    config = parse_flags(TrainConfig, given[1:])
    assert (config.max_train_steps, config.ema_decay) == (1, 0.05)  # it can be typed again
    start = next(number for number, line in enumerate(lines) if line.startswith("flags: "))
    assert [line.split(": ")[0] for line in lines[start + 1 : start + 5]] == ["model", "data", "training", "results"]
    assert lines[start + 4].endswith(str(run_dir)) and '"seed"' not in "".join(lines)


@pytest.mark.parametrize(("decay", "steps", "share"), [(0.9999, 20_000, "14%"), (0.9999, 24_000, None), (0.5, 4, None)])
def test_an_average_that_still_holds_the_initial_weights_is_announced(data, tmp_path, capsys, decay, steps, share):
    tiny.run_train(data, tmp_path, dry_run=True, ema_decay=decay, max_train_steps=steps, epochs=10**6)
    said = [line for line in capsys.readouterr().out.splitlines() if "--ema-decay" in line and "warning" in line]
    assert len(said) == (share is not None) and all(share in line for line in said)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, capsys, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stderr)
    with tiny.fresh_accelerate():
        log = RunLog(start_accelerator(config_of()), tmp_path, config_of(), 0, 3)
        for step in (1, 2, 3):
            log.add(dict.fromkeys(("loss", "loss_v1", "grad_norm"), torch.tensor(2.0)), torch.tensor(False))
            log.write(step, epoch=0.1)
        log.bar.close()
    bar, lines = stderr.getvalue(), capsys.readouterr().out.splitlines()
    shown = bar.split("\r")[-1] if terminal else lines[-1]
    assert all(part in shown for part in ("loss 2.0000", "images/s", "00:00 left")), shown
    assert (bar != "", len(lines)) == (terminal, 0 if terminal else 3)
    assert not any("\r" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({}, None),
        ({"enc_type": "mae-vit-l"}, "warning: no alignment without --ssl-align; unused: --enc-type mae-vit-l"),
        ({"enc_type": "None"}, None),
    ],
)
def test_an_encoder_without_alignment_is_said_to_be_unused(data, tmp_path, capsys, flags, line):
    tiny.run_train(data, tmp_path, dry_run=True, **flags)
    found = [text for text in capsys.readouterr().err.splitlines() if "unused" in text]
    assert found == ([line] if line else [])


def test_log_has_every_part_of_the_loss(data, tmp_path):
    flags = {"model": "DeepFlow-Ti/2", "trans_depth": 3, "df_idxs": "[1,2]", "max_train_steps": 2}
    first, second = tiny.log_lines(tiny.run_train(data, tmp_path, acc_coeff=0.5, scale_weight=[0.1, 0.2, 1], **flags))
    parts = {"loss_v1": 0.1, "loss_v2": 0.2, "loss_v3": 1, "loss_a1": 0.5, "loss_a2": 0.5}
    assert first["loss"] == pytest.approx(sum(weight * first[name] for name, weight in parts.items()), rel=1e-5)
    assert first["loss_v1"] == pytest.approx(first["loss_v3"])  # all velocities are 0 at first
    assert first["epoch"] == pytest.approx(1 / 3, abs=1e-4)
    assert (first["learning_rate"], first["bad_steps"]) == (1e-3, 0)
    assert second["images_per_s"] == pytest.approx(4 * second["steps_per_s"], rel=1e-3)
    assert 0.1 < second["memory_gib"] < 50  # of this process, torch included
    assert "mfu" not in second  # nobody knows the peak of this CPU


def test_mfu_is_flops_done_by_flops_promised(tmp_path, monkeypatch):
    monkeypatch.setattr("training.logs.peak_flops", lambda device, precision: 1e12)
    with tiny.fresh_accelerate():
        log = RunLog(start_accelerator(config_of()), tmp_path, config_of(), 0, 1, flops_per_image=1e9)
        log.add(dict.fromkeys(("loss", "loss_v1", "grad_norm"), torch.tensor(1.0)), torch.tensor(False))
        log.write(1, epoch=0.1)
        log.bar.close()
    (line,) = (json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["mfu"] == pytest.approx(line["images_per_s"] * 1e9 / 1e12, abs=1e-4)


def test_tensorboard_gets_every_number_of_the_log(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = {"report_to": "tensorboard", "logging_dir": "tracked", "holdout": 0.3}
    run_dir = tiny.run_train(data, tmp_path, **flags)
    (file,) = run_dir.glob("tracked/deepflow/events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    *lines, held_out = tiny.log_lines(run_dir)
    assert set(events.Tags()["scalars"]) == (lines[0].keys() | held_out.keys()) - {"step"}
    assert events.Scalars("holdout_v2")[0].value == pytest.approx(held_out["holdout_v2"], rel=1e-6)
    for name in ("loss", "loss_v1", "loss_a1", "grad_norm", "learning_rate", "images_per_s", "bad_steps"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


@pytest.mark.parametrize("watched", ["loss_v1", "error_map"])  # the whole loss is often negative
def test_a_jump_of_the_loss_is_announced(tmp_path, capsys, watched):
    others = {"grad_norm": 1.0, "loss": -2.0}
    with tiny.fresh_accelerate():
        log = RunLog(start_accelerator(config_of()), tmp_path, config_of(), 0, 20)
        for step in range(1, 13):
            values = {watched: 7.0 if step == 12 else 2.0, **others}
            log.add({name: torch.tensor(value) for name, value in values.items()}, torch.tensor(False))
            log.write(step, epoch=0.1)
        log.bar.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: at step 12, {watched} is 7.0000; its running median is 2.0000"]


def test_epochs_end_a_run_before_the_last_step(data, tmp_path):
    run_dir = tiny.run_train(data, tmp_path, epochs=2, max_train_steps=100)
    assert existing_steps(run_dir) == [6]


@pytest.mark.parametrize(
    ("steps", "epochs", "first"), [(100, 2, "epochs"), (4, 2, "max-train-steps"), (4, 1400, None), (6, 2, None)]
)
def test_what_ends_a_run_before_the_end_that_was_asked_for_is_said(data, tmp_path, capsys, steps, epochs, first):
    tiny.run_train(data, tmp_path, dry_run=True, max_train_steps=steps, epochs=epochs)
    said = [line for line in capsys.readouterr().out.splitlines() if "ends the run" in line]
    assert [line.split()[1] for line in said] == ([f"--{first}"] if first else [])


def test_a_kill_around_a_checkpoint_leaves_none_that_nothing_deletes(tmp_path):
    def save(step, killed=None, stays=False):
        with contextlib.suppress(KeyboardInterrupt), replacing_old(tmp_path, step, stays, keep=2):
            if killed != "before the write":
                checkpoint_path(tmp_path, step).write_text("")
            if killed:
                raise KeyboardInterrupt

    checkpoint_path(tmp_path, 0).parent.mkdir()
    save(2), save(4, stays=True), save(6), save(8, killed="after the write")
    assert existing_steps(tmp_path) == [2, 4, 6, 8]
    save(9, killed="before the write"), save(10)
    assert existing_steps(tmp_path) == [4, 8, 10]
