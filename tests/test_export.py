"""Exported folders: what models/export.py writes is what the hub's mixin, load_model and generate.py read."""

import json
import os

import captioned
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from common.errors import InputError
from models import load_checkpoint, load_model
from models.deepflow import DeepFlow
from models.export import export, main
from models.flow_map import FlowMap


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny.vae_folder(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module")
def ckpt(vae, tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "0000003.pt", vae, legacy_scaling=True, qk_norm=True)


@pytest.fixture
def folder(ckpt, tmp_path):
    export(ckpt, tmp_path / "exported")
    return tmp_path / "exported"


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_folder_has_the_files_of_the_hub(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["df_idxs"], config["legacy_scaling"]) == (128, [2], True)
    assert config["run"] == {"model": "DeepFlow-Ti/2", "exp_name": "tiny", "path_type": "linear"}
    assert (config["steps"], config["weights"], config["data"]["family"]) == (3, "ema", "tiny-vae")


def test_paths_of_the_training_machine_are_left_out(ckpt, tmp_path):
    content = tiny.load(ckpt)
    content["config"] |= {"init_from": "/a/b.pt", "teacher": "/a/c.pt", "holdout": "/a/held", "data_dir": "/a/data"}
    content["config"]["changes"] = [{"step": 1, "changes": {"teacher": ["/a/old.pt", "/a/c.pt"], "seed": [0, 1]}}]
    torch.save(content, tmp_path / "named.pt")
    export(tmp_path / "named.pt", tmp_path / "out")
    run = json.loads((tmp_path / "out/config.json").read_text())["run"]
    assert (run["init_from"], run["teacher"], run["holdout"]) == ("b.pt", "c.pt", "held")
    assert run["changes"] == [{"step": 1, "changes": {"seed": [0, 1]}}]
    content["config"]["init_from"] = "someone/tiny@" + "0" * 40
    torch.save(content, tmp_path / "hub.pt")
    export(tmp_path / "hub.pt", tmp_path / "of-hub")
    assert json.loads((tmp_path / "of-hub/config.json").read_text())["run"]["init_from"].startswith("someone/tiny@")
    assert "/a/" not in (tmp_path / "out/config.json").read_text() + (tmp_path / "out/README.md").read_text()


def test_the_card_says_what_it_is_and_how_to_sample(ckpt, tmp_path):
    content = tiny.load(ckpt)
    content["config"] |= {"batch_size": 96, "weighting": "lognormal"}
    content["data"]["class_names"] = ["owl", "robin", "wren"]
    torch.save(content, tmp_path / "named.pt")
    export(tmp_path / "named.pt", tmp_path / "birds", "raw")
    card = ModelCard.load(tmp_path / "birds/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-nc-4.0", "unconditional-image-generation")
    named = ("DeepFlow-Ti/2", "step 3", "3: owl, robin, wren", "16 × 16", "12 images", "| batch_size | 96 |", "BY-NC")
    for words in (*named, "generate.py --ckpt USER/birds --weights raw --classes 0"):
        assert words in card.text
    assert "diffusers" not in card.content


def test_the_card_of_a_published_file_leaves_its_licence_open(ckpt, tmp_path):
    torch.save(load_checkpoint(ckpt).model.state_dict(), tmp_path / "published.pt")
    export(tmp_path / "published.pt", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "other" and "records none" in card.text and "BY-NC" not in card.text
    assert "None" not in card.text  # no step is known


def test_the_card_of_a_text_model_has_a_prompt(tmp_path):
    export(captioned.checkpoint(tmp_path / "t2i.pt", tmp_path), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag == "text-to-image" and "generate_t2i.py" in card.text and "--prompts" in card.text


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_from_pretrained_and_load_model_give_the_model(ckpt, tmp_path, weights):
    export(ckpt, tmp_path / "exported", weights)
    expected = load_checkpoint(ckpt, weights)
    mixin = DeepFlow.from_pretrained(tmp_path / "exported")
    checkpoint = load_checkpoint(tmp_path / "exported", weights)
    for model in (mixin, checkpoint.model, load_model(tmp_path / "exported", weights)[0]):
        assert same_weights(model, expected.model) and not model.training
        assert model.df_blocks[0].acc_norm.legacy_scaling
    assert json.dumps(checkpoint.options) == json.dumps(expected.options)
    assert (checkpoint.data, checkpoint.steps) == (expected.data, expected.steps)


def test_generate_needs_no_more_than_the_folder(ckpt, folder, tmp_path):
    _, expected, _ = tiny.run_generate(ckpt, tmp_path / "a")
    _, array, manifest = tiny.run_generate(folder, tmp_path / "b")
    assert np.array_equal(array, expected)
    assert (manifest["model"], manifest["step"], manifest["path_type"]) == ("DeepFlow-Ti/2", 3, "linear")


def test_an_exported_flow_map_is_the_same_map(vae, tmp_path):
    options = {"depth": 2, "df_idxs": (1,), "dmf_depth": 1, "qk_norm": "rms"}
    ckpt = tiny.checkpoint(tmp_path / "map.pt", vae, "DeepFlow-DMF-Ti/2", **options)
    export(ckpt, tmp_path / "exported")
    expected, found = load_checkpoint(ckpt), load_checkpoint(tmp_path / "exported")
    x, t, y = torch.randn(2, 4, tiny.SIZE, tiny.SIZE), torch.tensor([0.9, 0.6]), torch.tensor([0, tiny.CLASSES])
    with torch.no_grad():
        u = expected.model.average_velocity(x, t, t / 3, y)
        assert not torch.equal(u, expected.model.velocity(x, t, y))
        for model in (found.model, FlowMap.from_pretrained(tmp_path / "exported")):
            assert isinstance(model, FlowMap) and model.dmf_depth == 1
            assert torch.equal(model.average_velocity(x, t, t / 3, y), u)
    assert json.dumps(found.options) == json.dumps(expected.options)
    images = [
        tiny.run_generate(path, tmp_path / f"images{n}", mode="euler", num_steps=2)[1]
        for n, path in enumerate((ckpt, tmp_path / "exported"))
    ]
    assert np.array_equal(*images)


def test_a_folder_that_the_mixin_saved_is_read(tmp_path):
    model = tiny.fill_(DeepFlow(input_size=4, hidden_size=64, depth=3, num_heads=1, df_idxs=(1,), projector_dim=16))
    model._save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model._hub_mixin_config))
    loaded, options = load_model(tmp_path)
    assert same_weights(loaded, model) and options["df_idxs"] == (1,)


@pytest.mark.parametrize("change", ["Missing", "Unexpected"])
def test_from_pretrained_is_strict(folder, change):
    state = load_file(folder / "model.safetensors")
    if change == "Missing":
        del state["blocks.1.attn.proj.bias"]
    else:
        state["another.weight"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn\.proj\.bias|another\.weight"):
        DeepFlow.from_pretrained(folder)
    with pytest.raises(InputError, match=f"{folder} is of another model: {change}"):
        load_model(folder)


def test_the_other_weights_are_not_in_the_folder(folder):
    with pytest.raises(InputError, match=f"{folder} lacks tensors 'model'"):
        load_model(folder, "raw")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "model.safetensors does not exist"),
        ("config.json", None, "config.json cannot be read"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "unreadable or truncated"),
        ("config.json", b"{", "config.json.*; name a .pt file"),
        ("config.json", b"[]", "config.json.*; name a .pt file"),
    ],
)
def test_damaged_folders_are_named(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{folder}.*{message}") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_an_existing_folder_is_not_overwritten(ckpt, folder):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"{folder} exists already"):
        export(ckpt, folder, "raw")
    assert (folder / "config.json").read_bytes() == before


def test_a_failing_export_leaves_nothing(ckpt, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.export.save_file", fail)
    (tmp_path / ".exported.99999999.tmp").mkdir()  # left by a killed process
    with pytest.raises(OSError) as caught:
        export(ckpt, tmp_path / "exported")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "exported"))
    assert not list(tmp_path.iterdir())


def test_files_have_the_permissions_of_the_umask(ckpt, folder):
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_a_plain_safetensors_file_is_read_as_a_published_one(ckpt, tmp_path):
    expected = load_checkpoint(ckpt).model
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path / "model.safetensors", legacy_scaling=True)
    assert same_weights(model, expected)


def test_half_precision_is_half_the_file_and_read_as_float32(ckpt, folder, tmp_path):
    main([str(ckpt), str(tmp_path / "half"), "--half"])
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    expected = {name: tensor.half().float() for name, tensor in load_checkpoint(ckpt).model.state_dict().items()}
    for model in (load_model(tmp_path / "half")[0], DeepFlow.from_pretrained(tmp_path / "half")):
        assert tiny.differences(model.state_dict(), expected) == []
        assert model.pos_embed.dtype == torch.float32
    whole, half = ((path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half"))
    assert half < 0.51 * whole


def test_command_line_with_the_key_layers_of_a_published_file(ckpt, tmp_path, capsys):
    torch.save(load_checkpoint(ckpt).model.state_dict(), tmp_path / "published.pt")
    main([str(tmp_path / "published.pt"), str(tmp_path / "out"), "--df-idxs", "[3]", "--legacy-scaling"])
    assert f"-> {tmp_path / 'out'}\nnext: python generate.py" in capsys.readouterr().out
    model, options = load_model(tmp_path / "out")
    assert options["df_idxs"] == (3,) and model.df_idxs == (3,) and options["legacy_scaling"] is True


def test_command_line_with_the_depth_of_a_published_flow_map(tmp_path):
    ckpt = tiny.checkpoint(tmp_path / "map.pt", tmp_path / "tiny-vae", "DMFT-Ti/2", dmf_depth=3)
    torch.save(load_checkpoint(ckpt).model.state_dict(), tmp_path / "published.pt")
    main([str(tmp_path / "published.pt"), str(tmp_path / "out"), "--dmf-depth", "3"])
    assert load_model(tmp_path / "out")[0].dmf_depth == 3


@pytest.mark.parametrize("name", ["DMFT-Ti/2", "DeepFlow-DMF-Ti/2"])
def test_flow_maps_are_exported_and_read(tmp_path, name):
    ckpt = tiny.checkpoint(tmp_path / "map.pt", tmp_path / "tiny-vae", name)
    export(ckpt, tmp_path / "out")
    expected = load_checkpoint(ckpt).model
    for model in (FlowMap.from_pretrained(tmp_path / "out"), load_model(tmp_path / "out")[0]):
        assert same_weights(model, expected) and model.dmf_depth == expected.dmf_depth
