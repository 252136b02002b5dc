"""--init-from: what is taken from a file and what is new, refusals, resuming, and the first loss."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import captioned
import numpy as np
import pytest
import tiny
import torch

import train
import train_t2i
from common.errors import InputError
from common.flags import parse_flags
from common.records import check_record
from dataset import Batch, CaptionInfo, open_dataset
from models import create_model, load_checkpoint
from models.export import export
from models.specs import LatentSpec, TextSpec
from training.config import TrainConfig
from training.draws import draw_step
from training.loader import SeekableSampler

DEEPFLOW = ["df_blocks", "dt_embedder", "final_acc_layer", "final_layer"]
SIT = {"model": "SiT-Ti/2", "df_idxs": "[]"}
ALIGN = {"ssl_align": True, "enc_type": "dinov2-vit-s"}
ALIGNED = {"ssl_align": True, "z_dims": (384,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A flow model that fits the data and flags."""
    return tiny.flow_file(tmp_path_factory.mktemp("flow") / "0000003.pt")


def sit_file(path, **options):
    return tiny.checkpoint(path, tiny.SPEC.vae, "SiT-Ti/2", depth=2, **options)


def published(path, ours, **args):
    """A file as others publish it, with the weights of one of our checkpoints."""
    state = {f"module.{name}": tensor for name, tensor in tiny.load(ours)["ema"].items()}
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4, **args)}, path)
    return path


def start(data, source, config=TrainConfig, open_data=open_dataset, **changes):
    """The model of a run before the first step; source None: a run without a file."""
    start_from = {"init_from": source} if source else {}
    words = tiny.train_flags(data, "exps", **{**start_from, **changes})
    config = parse_flags(config, words).resolve()
    options, model = train.start(config, open_data(data).info, None)
    torch.manual_seed(config.seed)
    return (model or create_model(config.model, **options)).eval()


def parts(names):
    """Parts of the network, in the order in which they are printed."""
    return sorted({name.partition(".")[0] for name in names})


def check_started(capsys, data, source, new=(), dropped=(), **changes):
    """Assert that all but these parts are the file's to the bit, these as without a file, and that a line says so."""
    model = start(data, source, **changes)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"--init-from {source}: ")]
    names = ("init_from", "weights", "convention", "new_classes")
    fresh = start(data, None, **{name: value for name, value in changes.items() if name not in names}).state_dict()
    weights, convention = changes.get("weights", "ema"), changes.get("convention")
    held = load_checkpoint(source, weights, convention=convention).model.state_dict()
    state = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, (fresh if name.split(".")[0] in new else held)[name]), name
    lines = [" ".join(line.partition(": ")[2].split(" (")[0].replace(",", "").split()) for line in said]
    taken = [name for name in parts(state) if name not in new]
    expected = [["taken", *taken], *([["new", *new]] if new else []), *([["dropped", *dropped]] if dropped else [])]
    assert lines == [" ".join(words) for words in expected]
    return model


# ------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("kind", ["checkpoint", "run", "exported"])
def test_everything_is_taken_from_files_of_ours(data, tmp_path, capsys, kind, weights):
    path = tiny.flow_file(tmp_path / "exps/checkpoints/0000003.pt")
    source = {"checkpoint": path, "run": tmp_path / "exps", "exported": tmp_path / "exported"}[kind]
    if kind == "exported":
        export(path, source, weights)
    check_started(capsys, data, source, weights=weights)


def test_pretrained_is_another_name_of_the_flag(data, source):
    words = tiny.train_flags(data, "exps", pretrained=source)
    assert parse_flags(TrainConfig, words).init_from == str(source)


@pytest.mark.parametrize("classes", [tiny.CLASSES, 5])
def test_new_classes_get_a_new_label_table(data, tmp_path, capsys, classes):
    source = tiny.flow_file(tmp_path / "a.pt", num_classes=classes)
    check_started(capsys, data, source, ["y_embedder"], ["y_embedder"], new_classes=True)


def test_another_resolution_gets_its_own_position_embedding(data, tmp_path, capsys):
    source = tiny.flow_file(tmp_path / "a.pt", input_size=4)
    check_started(capsys, data, source, ["pos_embed"], ["pos_embed"])
    start(data, source)
    assert f"--init-from {source}: new pos_embed (4x4 tokens instead of 2x2)" in capsys.readouterr().out


def test_flags_say_what_the_weights_of_a_published_file_leave_open(data, tmp_path):
    path = tmp_path / "theirs.pt"
    torch.save(tiny.load(tiny.flow_file(tmp_path / "a.pt", depth=4, df_idxs=(1,)))["ema"], path)
    with pytest.raises(InputError, match=r"has df_idxs \(2,\), this run has \(3,\)"):
        start(data, tiny.flow_file(tmp_path / "b.pt", depth=4, df_idxs=(2,)), trans_depth=4, df_idxs="3")
    model = start(data, path, trans_depth=4, df_idxs="1", legacy_scaling=True)
    assert (model.df_idxs, model.df_blocks[0].acc_norm.legacy_scaling) == ((1,), True)


def test_a_sit_becomes_a_deepflow(data, tmp_path, capsys):
    source = sit_file(tmp_path / "a.pt")
    check_started(capsys, data, source, DEEPFLOW, ["final_layer"])
    assert start(data, source, vera="gap").final_acc_layer is None  # the kind of VeRA is free: the file has none


def test_alignment_begins_with_new_projectors(data, tmp_path, capsys):
    data = tiny.aligned_folder(tmp_path / "data")
    spec = dataclasses.asdict(open_dataset(data).info.spec)
    for name, changes in (("DeepFlow-Ti/2", {}), ("SiT-Ti/2", SIT)):
        options = {"depth": 2, "input_size": 4, "df_idxs": () if changes else (1,)}
        plain = tiny.checkpoint(tmp_path / "plain.pt", "tiny-vae", name, **options)
        aligned = tiny.checkpoint(tmp_path / "aligned.pt", "tiny-vae", name, **options, **ALIGNED)
        for path in (plain, aligned):
            content = tiny.load(path)
            torch.save({**content, "data": {**content["data"], **spec}}, path)
        with_depth = {"encoder_depth": 2} if changes else {}
        check_started(capsys, data, plain, ["projectors"], **changes, **ALIGN, **with_depth)
        check_started(capsys, data, aligned, **changes, **ALIGN, **with_depth)
        check_started(capsys, data, aligned, [], ["projectors"], **changes)
        other = {**ALIGN, **with_depth, "enc_type": "dinov2-vit-b"}
        check_started(capsys, data, aligned, ["projectors"], ["projectors"], **changes, **other)
        content["config"]["enc_type"] = "dinov1-vit-s"  # of the same width
        torch.save(content, aligned)
        check_started(capsys, data, aligned, ["projectors"], ["projectors"], **changes, **ALIGN, **with_depth)
    moved = {**SIT, **ALIGN, "encoder_depth": 1}
    content["config"].pop("enc_type")
    torch.save(content, aligned)
    check_started(capsys, data, aligned, ["projectors"], ["projectors"], **moved)


@pytest.mark.parametrize("name", ["DMFT-Ti/2", "DeepFlow-DMF-Ti/2"])
def test_a_flow_model_starts_from_a_flow_map(data, tmp_path, capsys, name):
    branches = {"df_idxs": (1,)} if "Deep" in name else {}
    source = tiny.checkpoint(tmp_path / "map.pt", tiny.SPEC.vae, name, depth=2, dmf_depth=1, **branches)
    model = check_started(capsys, data, source, [], ["logvar_linear"], **({} if branches else SIT))
    assert model.kind == "flow"


@pytest.mark.parametrize(
    ("name", "options", "changes", "dropped"),
    [
        ("DeepFlow-Ti/2", {"df_idxs": (1,)}, {}, []),
        ("DeepFlow-Ti/2", {"df_idxs": (1,), **ALIGNED}, {"legacy_scaling": True}, ["projectors"]),
        ("SiT-Ti/2", {}, {**SIT, "convention": "sit"}, []),
        ("SiT-Ti/2", {}, {**SIT, "convention": "repa"}, []),
        ("SiT-Ti/2", ALIGNED, SIT, ["projectors"]),
        ("DMFT-Ti/2", {"dmf_depth": 1}, SIT, ["logvar_linear"]),
    ],
    ids=["deepflow", "aligned", "sit", "flow", "repa", "dmf"],
)
def test_runs_start_from_published_files(data, tmp_path, capsys, name, options, changes, dropped):
    ours = tiny.checkpoint(tmp_path / "ours.pt", tiny.SPEC.vae, name, depth=2, **options)
    source = published(tmp_path / "published.pt", ours)
    model = check_started(capsys, data, source, [], dropped, **changes)
    held = load_checkpoint(source, convention=changes.get("convention")).model
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, tiny.CLASSES])
    assert torch.equal(model.velocity(x, t, y), held.velocity(x, t, y))


def test_a_published_sit_becomes_a_deepflow(data, tmp_path, capsys):
    source = published(tmp_path / "sit.pt", sit_file(tmp_path / "ours.pt"), prediction="velocity")
    check_started(capsys, data, source, DEEPFLOW, ["final_layer"])


def test_text_to_image_starts_from_text_to_image_only(data, source, tmp_path, capsys):
    for name in ("vae", "clip"):
        (tmp_path / name).mkdir()  # never read
    path = captioned.checkpoint(tmp_path / "text.pt", tmp_path, "MMDiT-Ti/2")
    content = tiny.load(path)
    spec = check_record(LatentSpec, content["data"], "", "")
    info = CaptionInfo(6, 0, spec, (8, 8, 8), 16, captions=13, text=TextSpec(**content["data"]["text"]))
    text = {"config": train_t2i.TextTrainConfig, "open_data": lambda _: SimpleNamespace(info=info)}
    text["model"] = "DeepFlow-MMDiT-Ti/2"
    check_started(capsys, tmp_path, path, DEEPFLOW, ["final_layer"], **text)
    for held, culprit in (({**content["data"]["text"], "width": 9}, "has width 9"), (None, "data is None.*choose")):
        torch.save({**content, "data": {**content["data"], "text": held}}, path)
        with pytest.raises(InputError, match=f"--init-from {path}.*{culprit}"):
            start(tmp_path, path, **text)
    torch.save({**content, "data": {}}, path)
    with pytest.raises(InputError, match=f"--init-from {path} .* kind text, --model DeepFlow-Ti/2"):
        start(data, path)
    torch.save({**tiny.load(source), "data": {}}, path)
    with pytest.raises(InputError, match=f"--init-from {path} .* kind flow, --model DeepFlow-MMDiT-Ti/2"):
        start(tmp_path, path, **text)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "changes", "culprits"),
    [
        ({"num_classes": 5}, {}, ["num_classes 5", "3", "--data-dir", "--new-classes"]),
        ({}, {"model": "DeepFlow-S/2"}, ["hidden_size 128", "384", "--model"]),
        ({}, {"trans_depth": 3}, ["depth 2", "3", "--trans-depth"]),
        ({"num_heads": 2}, {}, ["num_heads 2", "4", "--model"]),
        ({"in_channels": 8}, {}, ["in_channels 8", "4", "--data-dir"]),
        ({"depth": 3}, {"trans_depth": 3, "df_idxs": "2"}, ["(1,)", "(2,)", "--df-idxs"]),
        ({}, SIT, ["(1,)", "()", "--df-idxs"]),
        ({"qk_norm": True}, {}, ["qk_norm True", "--qk-norm"]),
        ({"qk_norm": "rms"}, {"qk_norm": True}, ["qk_norm rms", "--qk-norm"]),
        ({"legacy_scaling": True}, {}, ["legacy_scaling True", "--legacy-scaling"]),
        ({"vera": "gap"}, {}, ["vera gap", "full", "--vera"]),
        ({"acc_mlp": (8,)}, {}, ["acc_mlp (8,)", "--acc-mlp"]),
        ({}, {"path_type": "cosine"}, ["--path-type linear"]),
    ],
)
def test_networks_that_do_not_fit_are_refused(data, tmp_path, options, changes, culprits):
    source = tiny.flow_file(tmp_path / "a.pt", **options)
    with pytest.raises(InputError) as caught:
        start(data, source, **changes)
    assert all(culprit in str(caught.value) for culprit in [f"--init-from {source}", *culprits])


def test_a_learned_position_embedding_is_refused_at_another_resolution(data, tmp_path, capsys):
    for size, fits in ((4, False), (tiny.SIZE, True)):
        path = tiny.flow_file(tmp_path / "a.pt", input_size=size)
        content = tiny.load(path)
        content["ema"]["pos_embed"] += 0.1
        torch.save(content, path)
        if fits:
            check_started(capsys, data, path)
        else:
            with pytest.raises(InputError, match=f"--init-from {path}: its position embedding.* size 4"):
                start(data, path)


def test_latents_of_another_vae_are_refused(data, source, tmp_path):
    content = tiny.load(source)
    content["data"]["scale"] = 0.3
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"VAE mismatch: --init-from {tmp_path}/a.pt has scale 0.3"):
        start(data, tmp_path / "a.pt")


def test_a_published_file_with_unknown_direction_of_time_needs_convention(data, tmp_path):
    source = published(tmp_path / "a.pt", sit_file(tmp_path / "ours.pt"))
    with pytest.raises(InputError, match=f"{source}.*--convention sit"):
        start(data, source, **SIT)


@pytest.mark.parametrize("changes", [{"weights": "raw"}, {"convention": "sit"}, {"new_classes": True}])
def test_flags_about_the_file_need_init_from(data, changes):
    with pytest.raises(InputError, match=f"--{next(iter(changes)).replace('_', '-')} is .*--init-from"):
        start(data, None, **changes)


def test_other_class_names_give_a_warning(source, tmp_path, capsys):
    data = tiny.data_folder(tmp_path / "data")
    path = data / "vae-sd/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": ["cat", "dog", "hen"]}))
    content = tiny.load(source)
    for names, warned in ((["cat", "dog", "hen"], False), (["ant", "bee", "cat"], True)):
        content["data"]["class_names"] = names
        torch.save(content, tmp_path / "a.pt")
        start(data, tmp_path / "a.pt")
        assert ("warning: --init-from" in capsys.readouterr().out) == warned
    start(data, tmp_path / "a.pt", new_classes=True)
    assert "warning" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the run


def test_the_first_loss_equals_that_of_the_source(data, source, tmp_path):
    run = tiny.run_train(data, tmp_path, init_from=source, max_train_steps=1, ema_decay=1.0, seed=4)
    config = parse_flags(TrainConfig, tiny.train_flags(data, tmp_path, seed=4)).resolve()
    dataset, rows = open_dataset(data), np.arange(4)
    sampler = SeekableSampler(dataset.info.count, 4, seed=4)
    batch = Batch(0, *dataset.gather_step(sampler, 0, rows))
    draws = draw_step(0, config, 2, (4, tiny.SIZE, tiny.SIZE))
    model = load_checkpoint(source).model
    loss, _ = train.objective(model, batch, draws, config=config, dataset=dataset, weights=[0.2, 1.0])
    assert tiny.log_lines(run)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not tiny.differences(
        tiny.load(run / "checkpoints/0000001.pt")["ema"], tiny.load(source)["ema"]
    )  # ema_decay 1


def test_a_resumed_run_does_not_read_the_file_again(data, tmp_path):
    source = sit_file(tmp_path / "a.pt", num_classes=5)
    flags = {"init_from": source, "new_classes": True}
    whole = tiny.run_train(data, tmp_path / "whole", **flags)
    tiny.run_train(data, tmp_path / "parts", max_train_steps=2, **flags)
    source.unlink()
    tiny.run_train(data, tmp_path / "parts", max_train_steps=3, resume="auto", **flags)
    parts = tiny.run_train(data, tmp_path / "parts", resume="auto")  # without naming it either
    a, b = (tiny.load(run / "checkpoints/0000004.pt") for run in (whole, parts))
    assert not any(tiny.differences(a[entry], b[entry]) for entry in ("model", "ema", "opt"))
    for run in (whole, parts):
        config = json.loads((run / "config.json").read_text())
        assert (config["init_from"], config["new_classes"]) == (str(source), True)
    with pytest.raises(InputError, match=f"--init-from was {source}, is other.pt; start afresh"):
        tiny.run_train(data, tmp_path / "parts", resume="auto", **{**flags, "init_from": "other.pt"})
    tiny.run_train(data, tmp_path / "new", max_train_steps=1)
    with pytest.raises(InputError, match=f"--init-from was None, is {source}; start afresh"):
        tiny.run_train(data, tmp_path / "new", resume="auto", init_from=source)


def test_older_runs_call_the_flag_pretrained(data, source, tmp_path):
    run = tiny.run_train_dmf(data, tmp_path, source, max_train_steps=1)
    content = tiny.load(run / "checkpoints/0000001.pt")
    content["config"]["pretrained"] = content["config"].pop("init_from")
    torch.save(content, run / "checkpoints/0000001.pt")
    with pytest.raises(InputError, match=f"--init-from was {source}, is other.pt"):
        tiny.run_train_dmf(data, tmp_path, "other.pt", resume="auto")
    tiny.run_train_dmf(data, tmp_path, source, max_train_steps=2, resume="auto")


def test_a_missing_file_leaves_nothing_behind(data, tmp_path):
    with pytest.raises(InputError, match=r"nowhere.pt does not exist"):
        tiny.run_train(data, tmp_path / "exps", init_from=tmp_path / "nowhere.pt")
    assert not (tmp_path / "exps").exists()


def test_samples_and_exports_record_the_file_name(data, source, tmp_path):
    run = tiny.run_train(data, tmp_path, init_from=source, max_train_steps=1)
    export(run, tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["run"]["init_from"] == source.name
