"""Reading model files: ours, published ones, wrapped ones, and every kind that is refused."""

import argparse
import math
import os
import pathlib
import random
import zipfile

import pytest
import torch

from common.errors import InputError
from models import PRESETS, create_model, load_checkpoint, load_model
from models.deepflow import DeepFlow
from models.export import export
from models.flow_map import FlowMap
from models.published import config_from_state

TINY = {"input_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 1, "num_classes": 3, "projector_dim": 16}


def tiny(seed=0, **options):
    """A small model whose every weight is random, so that all of them show in the output."""
    model = DeepFlow(**{**TINY, "df_idxs": (2,), **options})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=g)
    return model.eval()


def save(path, content, **options):
    torch.save(content, path, **options)
    return str(path)


def same_weights(model, expected):
    own, other = model.state_dict(), expected.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def velocity(model):
    g = torch.Generator().manual_seed(9)
    x, t = torch.randn(2, 4, 4, 4, generator=g), torch.rand(2, generator=g)
    with torch.no_grad():
        return model.velocity(x, t, torch.tensor([1, 3]))


def refusal(path, **options):
    """The message of the InputError that loading ends with; one line that names the file."""
    with pytest.raises(InputError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and str(path) in message
    return message


# ---- What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy_format", [False, True])
def test_plain_state_dict(tmp_path, legacy_format):
    expected = tiny()
    path = save(tmp_path / "a.pt", expected.state_dict(), _use_new_zipfile_serialization=not legacy_format)
    model, options = load_model(path)
    assert same_weights(model, expected) and not model.training
    assert torch.equal(velocity(model), velocity(expected))
    assert {key: options[key] for key in TINY} == TINY and options["df_idxs"] == (2,)


def test_a_file_that_was_compressed_later(tmp_path):
    expected = tiny()
    path = save(tmp_path / "a.pt", expected.state_dict())
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    assert same_weights(load_model(tmp_path / "b.pt")[0], expected)


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("raw", 2)])
def test_published_training_file_with_its_arguments(tmp_path, weights, seed):
    content = {
        "model": tiny(2).state_dict(),
        "ema": tiny(1).state_dict(),
        "opt": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="DeepFlow-B/2", df_idxs="[2]", cfg_prob=0.1),
        "steps": 400_000,
    }
    checkpoint = load_checkpoint(save(tmp_path / "a.pt", content), weights)
    assert same_weights(checkpoint.model, tiny(seed))
    assert checkpoint.steps == 400_000 and checkpoint.run == checkpoint.data == {}


def test_ema_is_the_default(tmp_path):
    path = save(tmp_path / "a.pt", {"model": tiny(2).state_dict(), "ema": tiny(1).state_dict()})
    assert same_weights(load_model(path)[0], tiny(1))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [False, True])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix, nested):
    state = {prefix + name: tensor for name, tensor in tiny().state_dict().items()}
    path = save(tmp_path / "a.pt", {"ema": state} if nested else state)
    assert same_weights(load_model(path)[0], tiny())


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"ssl_align": True, "z_dims": (10,)}, {"df_idxs": ()}], ids=str)
def test_options_that_the_weights_tell(tmp_path, options):
    expected = tiny(**options)
    path = save(
        tmp_path / "a.pt",
        {"config": {"model_options": {**TINY, "df_idxs": [2], **options}}, "ema": expected.state_dict()},
    )
    assert same_weights(load_model(path)[0], expected)
    if options.get("df_idxs") == ():
        return  # a bare file of one branch leaves the direction of time open, see below
    model, found = load_model(save(tmp_path / "b.pt", expected.state_dict()))
    assert same_weights(model, expected)
    assert {key: found[key] for key in options} == options


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("raw", 2)])
def test_a_file_of_ours_is_rebuilt_from_its_configuration(tmp_path, weights, seed):
    """Key layers 1, 3 of 4 blocks, two heads and the clamp: nothing of it follows from the shapes."""
    options = {**TINY, "num_heads": 2, "df_idxs": [1, 3], "legacy_scaling": True}
    content = {
        "config": {"model": "DeepFlow-Ti/2", "path_type": "cosine", "model_options": options},
        "model": tiny(2, **options).state_dict(),
        "ema": tiny(1, **options).state_dict(),
        "steps": 7,
        "data": {"num_classes": 3},
    }
    checkpoint = load_checkpoint(save(tmp_path / "a.pt", content), weights)
    assert torch.equal(velocity(checkpoint.model), velocity(tiny(seed, **options)))
    assert checkpoint.options == {**options, "df_idxs": (1, 3)}
    assert all(vera.acc_norm.legacy_scaling for vera in checkpoint.model.df_blocks)
    assert (checkpoint.run["path_type"], checkpoint.data, checkpoint.steps) == ("cosine", {"num_classes": 3}, 7)


def test_a_model_of_one_branch_of_ours_keeps_its_direction_of_time(tmp_path):
    expected = tiny(df_idxs=())
    options = {**TINY, "df_idxs": []}
    path = save(tmp_path / "a.pt", {"config": {"model_options": options}, "ema": expected.state_dict()})
    assert torch.equal(velocity(load_model(path)[0]), velocity(expected))


def test_sits_file_of_one_branch_is_turned_round_in_time(tmp_path):
    theirs = tiny(df_idxs=())
    model, _ = load_model(save(tmp_path / "a.pt", theirs.state_dict()), convention="sit")
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(x, t, y), -theirs.velocity(x, 1 - t, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("z_dims", [(10,), (10, 6)])
def test_repas_one_branch_file_keeps_its_direction_of_time_and_its_projectors(tmp_path, z_dims):
    theirs = tiny(df_idxs=(), ssl_align=True, z_dims=z_dims, encoder_depth=4)
    path = save(tmp_path / "a.pt", {"ema": theirs.state_dict()})
    model, options = load_model(path)
    assert same_weights(model, theirs) and torch.equal(velocity(model), velocity(theirs))
    assert (options["ssl_align"], options["z_dims"], options["encoder_depth"]) == (True, z_dims, 4)
    assert load_model(path, encoder_depth=2)[1]["encoder_depth"] == 2


def test_a_file_aligned_with_two_encoders_tells_their_widths(tmp_path):
    expected = tiny(df_idxs=(1, 2), depth=3, ssl_align=True, z_dims=(10, 6))
    model, options = load_model(save(tmp_path / "a.pt", expected.state_dict()), df_idxs="1 2")
    assert same_weights(model, expected) and options["z_dims"] == (10, 6)


def test_published_aligned_files_have_the_legacy_clamp(tmp_path, capsys):
    path = save(tmp_path / "a.pt", tiny(df_idxs=(1,), depth=3, ssl_align=True, z_dims=(10,)).state_dict())
    assert load_model(path, df_idxs="1")[1]["legacy_scaling"]
    assert "legacy_scaling True" in capsys.readouterr().err
    assert not load_model(path, df_idxs="1", legacy_scaling=False)[1]["legacy_scaling"]
    path = save(tmp_path / "b.pt", tiny(df_idxs=(1,)).state_dict())
    assert not load_model(path, df_idxs="1")[1].get("legacy_scaling")


def test_half_precision_weights_are_read_as_float32(tmp_path):
    path = save(tmp_path / "a.pt", {name: tensor.half() for name, tensor in tiny().state_dict().items()})
    assert all(parameter.dtype == torch.float32 for parameter in load_model(path)[0].parameters())


def test_overrides_fill_in_what_weights_cannot_tell(tmp_path):
    expected = tiny(num_heads=8, df_idxs=(3,), legacy_scaling=True)
    path = save(tmp_path / "a.pt", expected.state_dict())
    model, options = load_model(path, num_heads=8, df_idxs="[3]", legacy_scaling=True, depth=None)
    assert torch.equal(velocity(model), velocity(expected))
    assert (options["num_heads"], options["df_idxs"], options["legacy_scaling"]) == (8, (3,), True)
    assert not torch.equal(velocity(load_model(path)[0]), velocity(expected))


def test_uneven_branches_of_a_published_file_need_their_key_layers(tmp_path):
    expected = tiny(depth=5, df_idxs=(2,))
    path = save(tmp_path / "a.pt", expected.state_dict())
    with pytest.raises(InputError, match=r"--trans-depth 5 does not divide .* pass --df-idxs"):
        load_model(path)
    assert torch.equal(velocity(load_model(path, df_idxs="2")[0]), velocity(expected))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_from_their_weights(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    options, preset = config_from_state(state), PRESETS[name]
    for key in ("depth", "hidden_size", "num_heads", "patch_size", "df_idxs", "input_size", "in_channels"):
        assert options[key] == getattr(preset, key), key
    condition = (options.get("num_classes"), options.get("context_dim"))
    assert condition == ((None, 768) if preset.context_dim else (1000, None))


@pytest.mark.parametrize(
    ("name", "depth", "df_idxs"),
    [
        ("DeepFlow-B/2", 10, (5,)),
        ("DeepFlow-L/2", 18, (9,)),  # the preset's depth with another number of branches
        ("DeepFlow-L/2", 24, (12,)),  # SiT's depth
        ("DeepFlow-XL/2", 24, (12,)),
        ("DeepFlow-XL/2", 28, (7, 14, 21)),
    ],
)
def test_even_key_layers_are_recognised_from_their_weights(name, depth, df_idxs):
    with torch.device("meta"):
        state = create_model(name, depth=depth, df_idxs=df_idxs).state_dict()
    options = config_from_state(state)
    assert (options["depth"], options["df_idxs"], options["num_heads"]) == (depth, df_idxs, PRESETS[name].num_heads)


# ---- What the arguments in published files say ----------------------------------------------------------------------


def published(path, model, /, **args):
    return save(path, {"ema": model.state_dict(), "args": argparse.Namespace(**args)})


@pytest.mark.parametrize("form", [[1, 4], "[1, 4]", "1,4", (1, 4)], ids=str)
def test_key_layers_and_clamp_come_from_the_arguments(tmp_path, capsys, form):
    expected = tiny(depth=6, df_idxs=(1, 4), legacy_scaling=True)
    args = {"df_idxs": form, "legacy_scaling": True, "path_type": "cosine", "trans_depth": 6, "qk_norm": False}
    path = published(tmp_path / "a.pt", expected, **args, num_workers=4, enc_type=None, prediction="v")
    checkpoint = load_checkpoint(path)
    assert torch.equal(velocity(checkpoint.model), velocity(expected))
    assert all(vera.acc_norm.legacy_scaling for vera in checkpoint.model.df_blocks)
    assert checkpoint.run == {"path_type": "cosine"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(text in said for text in ("df_idxs (1, 4)", "legacy_scaling True", "path_type cosine"))
    other = load_checkpoint(path, df_idxs="[2, 4]", legacy_scaling=False, path_type="linear")
    assert (other.options["df_idxs"], other.options["legacy_scaling"], other.run) == (
        (2, 4),
        False,
        {"path_type": "linear"},
    )
    assert "flags override df_idxs, legacy_scaling, path_type" in capsys.readouterr().err


def test_an_uneven_file_with_arguments_needs_no_flag(tmp_path):
    expected = tiny(depth=5, df_idxs=(2,))
    assert torch.equal(
        velocity(load_model(published(tmp_path / "a.pt", expected, df_idxs="[2]"))[0]), velocity(expected)
    )


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"df_idxs": "[1, 2]"}, "df_idxs"),
        ({"df_idxs": "[4]"}, "df_idxs"),
        ({"df_idxs": "[x]"}, "df_idxs"),
        ({"df_idxs": {"a": 1}}, "df_idxs"),
        ({"qk_norm": True}, "qk_norm"),
        ({"trans_depth": 12}, "trans_depth"),
        ({"dmf_depth": 3}, "dmf_depth"),  # no key layer
        ({"path_type": "VP"}, "path_type"),
        ({"prediction": "noise"}, "prediction"),
        ({"legacy_scaling": "perhaps"}, "legacy_scaling"),
        ({"path_type": "Linear"}, "--convention"),  # SiT's words for a DeepFlow
        ({"df_idxs": ["a"]}, "df_idxs"),
        ({"df_idxs": [10**30]}, "df_idxs"),
        ({"df_idxs": "9" * 5000}, "df_idxs"),
        ({"model": argparse.Namespace(a=1)}, "model"),
        ({"model": torch.ones(9, 9)}, "model"),
        ({"trans_depth": math.nan}, "trans_depth"),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_weights(tmp_path, args, named):
    assert named in refusal(published(tmp_path / "a.pt", tiny(), **args))


def test_arguments_that_hold_themselves_are_refused(tmp_path):
    for name in ("model", "df_idxs"):
        args = argparse.Namespace()
        setattr(args, name, args)
        assert "args" in refusal(save(tmp_path / "a.pt", {"ema": tiny().state_dict(), "args": args}))


@pytest.mark.parametrize("args", [5, "seed", [1], torch.ones(2)], ids=str)
def test_arguments_of_another_type(tmp_path, args):
    assert "args" in refusal(save(tmp_path / "a.pt", {"ema": tiny().state_dict(), "args": args}))


def test_the_number_of_blocks_that_see_t_comes_from_the_arguments(tmp_path):
    state = {"ema": FlowMap(**TINY, df_idxs=(), dmf_depth=1, use_logvar=False).state_dict()}
    for args in ({"dmf_depth": 3}, {"dmf_depth": 3, "model": "DMFT-XL/2"}):
        checkpoint = load_checkpoint(save(tmp_path / "a.pt", {**state, "args": argparse.Namespace(**args)}))
        assert checkpoint.model.kind == "flow map" and checkpoint.model.dmf_depth == 3
    assert load_checkpoint(tmp_path / "a.pt", dmf_depth=2).model.dmf_depth == 2


def sit(**options):
    return tiny(df_idxs=(), **options)


def test_a_file_that_does_not_tell_its_direction_of_time_is_refused(tmp_path):
    """A Decoupled MeanFlow's flow model without projectors, a flow map without head, a SiT without learned sigma."""
    expected = sit()
    path = save(tmp_path / "a.pt", expected.state_dict())
    assert "--convention" in refusal(path)
    assert torch.equal(velocity(load_model(path, convention="repa")[0]), velocity(expected))
    assert not torch.equal(velocity(load_model(path, convention="sit")[0]), velocity(expected))
    assert load_checkpoint(path, dmf_depth=2).model.kind == "flow map"  # SiT has no dmf_depth


@pytest.mark.parametrize(
    ("args", "is_sit", "path_type"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, True, "linear"),
        ({"path_type": "GVP"}, True, "cosine"),
        ({"path_type": "linear"}, False, "linear"),
        ({"path_type": "cosine", "prediction": "v"}, False, "cosine"),
    ],
    ids=str,
)
def test_the_words_of_the_arguments_tell_the_direction_of_time(tmp_path, args, is_sit, path_type):
    theirs = sit()
    path = published(tmp_path / "a.pt", theirs, **args)
    model = load_model(path)[0]
    assert torch.equal(velocity(model), velocity(theirs)) == (not is_sit)
    assert load_checkpoint(path).run == {"path_type": path_type}
    other = load_model(path, convention="repa" if is_sit else "sit")[0]
    assert torch.equal(velocity(other), velocity(theirs)) == is_sit


def test_a_learned_sigma_is_sits(tmp_path):
    theirs = sit()
    state, parts = theirs.state_dict(), ("final_layer.linear.weight", "final_layer.linear.bias")
    for name in parts:  # rows are ordered (patch row, column, 2C channels)
        rows = state[name].unflatten(0, (4, 4))
        state[name] = torch.cat([rows, torch.ones_like(rows)], dim=1).flatten(0, 1)
    path = save(tmp_path / "a.pt", state)
    plain = load_model(save(tmp_path / "b.pt", theirs.state_dict()), convention="sit")[0]
    assert same_weights(load_model(path)[0], plain)
    assert same_weights(load_model(path, convention="repa")[0], theirs)
    path = save(tmp_path / "c.pt", {"ema": state, "args": argparse.Namespace(prediction="v")})
    assert "two directions of time" in refusal(path)


def test_sits_convention_is_for_one_branch(tmp_path):
    assert "--convention sit" in refusal(save(tmp_path / "a.pt", tiny().state_dict()), convention="sit")


def test_repas_first_files_are_read_under_todays_names(tmp_path):
    expected = sit(ssl_align=True, z_dims=(10,), encoder_depth=3)
    old = {name.replace("blocks.3.", "decoder_blocks.0."): tensor for name, tensor in expected.state_dict().items()}
    assert any("decoder_blocks" in name for name in old)
    model, options = load_model(save(tmp_path / "a.pt", old))
    assert same_weights(model, expected) and torch.equal(velocity(model), velocity(expected))
    assert options["encoder_depth"] == 3
    path = save(tmp_path / "b.pt", {"ema": old, "args": argparse.Namespace(encoder_depth=2)})
    assert "encoder_depth" in refusal(path)


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")


def test_a_folder(tmp_path):
    assert "or an exported folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_is_no_regular_file(tmp_path, name):
    path = tmp_path / name
    path.symlink_to(path)
    assert "cannot be read" in refusal(path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)


def test_a_folder_whose_weights_are_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to(tmp_path)
    assert "a folder" in refusal(tmp_path)


@pytest.mark.parametrize("place", range(6))
def test_a_changed_bit_is_noticed(tmp_path, place):
    path = tmp_path / "a.pt"
    save(path, {"ema": tiny().state_dict()})
    weights = tiny().state_dict()[("blocks.0.attn.qkv.weight", "pos_embed")[place % 2]].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weights) + place * len(weights) // 6] ^= 1 << place
    path.write_bytes(content)
    assert "unreadable or truncated" in refusal(path)


@pytest.mark.parametrize("legacy_format", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path, kept, legacy_format):
    path = tmp_path / "a.pt"
    save(path, {"ema": tiny().state_dict()}, _use_new_zipfile_serialization=not legacy_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "is unreadable or truncated" in refusal(path)


def damaged_files():
    """Things that people pass by mistake, and the beginnings of files with bytes changed."""
    yield b"hello world"
    yield b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"
    yield b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    yield b"\x89PNG\r\n\x1a\n" + bytes(100)
    rng = random.Random(0)
    for _ in range(60):
        yield bytes(rng.randrange(256) for _ in range(100))
        yield b"\x80\x02" + bytes(rng.choice(b"KMX}q(su.)\x85tRcb\x8a]eNU") for _ in range(60))


@pytest.mark.filterwarnings("ignore")  # torch warns of odd pickle protocols
def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    for content in damaged_files():
        path.write_bytes(content)
        refusal(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "lacks tensors 'ema' (it holds nothing)"),
        ({"epoch": 3, "net": {}}, "lacks tensors 'ema' (it holds epoch, net)"),
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({"ema": None}, "lacks tensors 'ema'"),
        ({"ema": {"x_embedder.proj.weight": 3}}, "lacks tensors 'ema'"),
        ({"ema": {"conv1.weight": torch.ones(2)}}, "no model of a known family"),
    ],
    ids=["empty", "other entries", "list", "tensor", "none", "numbers", "another network"],
)
def test_contents_that_are_no_model(tmp_path, content, named):
    assert named in refusal(save(tmp_path / "a.pt", content))


def test_weights_that_the_file_lacks(tmp_path):
    path = save(tmp_path / "a.pt", {"ema": tiny().state_dict(), "steps": 3})
    assert "lacks tensors 'model' (it holds ema, steps); name other --weights" in refusal(path, weights="raw")


LOST = [
    "pos_embed",
    "x_embedder.proj.weight",
    "t_embedder.mlp.0.weight",
    "y_embedder.embedding_table.weight",
    "blocks.3.attn.qkv.bias",
    "df_blocks.0.acc_mlp.0.weight",
    "dt_embedder.mlp.2.bias",
    "final_layer.0.linear.weight",
]


@pytest.mark.parametrize("nested", [False, True])
def test_a_lost_parameter_is_named(tmp_path, nested):
    for lost in LOST:
        state = {name: tensor for name, tensor in tiny().state_dict().items() if name != lost}
        if not nested and lost == "x_embedder.proj.weight":
            continue  # by this name a plain state dict is recognised
        assert lost.split(".")[0] in refusal(save(tmp_path / "a.pt", {"ema": state} if nested else state))


@pytest.mark.parametrize("lost", ["final_layer.linear.weight", "t_embedder.mlp.0.weight", "blocks.0.mlp.fc1.bias"])
def test_a_lost_parameter_of_one_branch_is_named(tmp_path, lost):
    state = {name: tensor for name, tensor in tiny(df_idxs=()).state_dict().items() if name != lost}
    assert lost in refusal(save(tmp_path / "a.pt", state), convention="sit")


def test_an_unknown_parameter_is_named(tmp_path):
    state = {**tiny().state_dict(), "blocks.0.extra.weight": torch.ones(1)}
    assert 'Unexpected key(s) in state_dict: "blocks.0.extra.weight"' in refusal(save(tmp_path / "a.pt", state))


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.qkv.weight", "final_layer.1.linear.bias", "df_blocks.0.acc_mlp.6.weight"]
)
def test_a_shape_mismatch_is_named_with_both_shapes(tmp_path, name):
    state = tiny().state_dict()
    expected = state[name].shape
    state[name] = torch.zeros(3, *expected[1:])
    message = refusal(save(tmp_path / "a.pt", state))
    assert all(part in message for part in (name, str(state[name].shape), str(expected)))


def test_a_configuration_that_does_not_fit_its_weights(tmp_path):
    content = {"config": {"model_options": {**TINY, "hidden_size": 32, "df_idxs": [2]}}, "ema": tiny().state_dict()}
    assert "is of another model" in refusal(save(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"depth": 8}, "--trans-depth 8 contradicts"),
        ({"num_classes": 10}, "--num-classes 10 contradicts"),
        ({"qk_norm": True}, "--qk-norm True contradicts"),
        ({"hidden_size": 32}, "--hidden-size 32 contradicts"),
    ],
    ids=str,
)
@pytest.mark.parametrize("ours", [False, True])
def test_an_override_that_contradicts_the_file(tmp_path, overrides, named, ours):
    content = {"ema": tiny().state_dict()}
    if ours:
        content["config"] = {"model_options": {**TINY, "df_idxs": [2], "qk_norm": False}}
    assert named in refusal(save(tmp_path / "a.pt", content), **overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"df_idxs": "1 3"}, "--df-idxs (1, 3) contradicts"),
        ({"num_heads": 8}, "--num-heads 8 contradicts"),
        ({"legacy_scaling": True}, "--legacy-scaling True contradicts"),
    ],
    ids=str,
)
def test_a_file_of_ours_answers_everything(tmp_path, overrides, named):
    options = {**TINY, "df_idxs": [2], "legacy_scaling": False}
    path = save(tmp_path / "a.pt", {"config": {"model_options": options}, "ema": tiny().state_dict()})
    assert named in refusal(path, **overrides)
    assert load_model(path, **{**options, "df_idxs": "[2]"})[1]["df_idxs"] == (2,)


def test_key_layers_of_another_number_of_branches(tmp_path):
    path = save(tmp_path / "a.pt", tiny().state_dict())
    assert 'Missing key(s) in state_dict: "df_blocks.1.' in refusal(path, df_idxs="1 2")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy_format", [False, True])
def test_a_malicious_pickle_is_not_executed(tmp_path, legacy_format):
    trap = tmp_path / "executed"
    content = {"ema": tiny().state_dict(), "args": argparse.Namespace(model=Malicious(trap))}
    path = save(tmp_path / "a.pt", content, _use_new_zipfile_serialization=not legacy_format)
    assert "mkdir" in refusal(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_other_python_objects_are_named(tmp_path):
    content = {"ema": tiny().state_dict(), "args": argparse.Namespace(data_dir=pathlib.PurePosixPath("data"))}
    assert "PurePosixPath" in refusal(save(tmp_path / "a.pt", content))


def test_reading_leaves_torchs_list_of_safe_classes_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    load_model(save(tmp_path / "a.pt", {"ema": tiny().state_dict(), "args": argparse.Namespace(seed=0)}))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("config", 5),
        ("config", None),
        ("config", {"model": "DeepFlow-Ti/2"}),
        ("config", [1]),
        ("config", {"model_options": 7}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "depth": 10**9}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "depth": 10**6}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "hidden_size": "wide"}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "hidden_size": 2**70}}),
        ("config", {"model_options": {**TINY, "df_idxs": 2}}),
        ("config", {"model_options": {**TINY, "df_idxs": None}}),
        ("config", {"model_options": TINY}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "unknown": 1}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "z_dims": None, "ssl_align": True}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2]}, "path_type": ["linear"]}),
        ("config", {"model_options": {**TINY, "df_idxs": [2]}, "model": torch.ones(3, 3)}),
        ("config", {"model_options": {**TINY, "df_idxs": [2]}, "learning_rate": torch.ones(3, 3)}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "vera": "x" * 100_000}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "ssl_align": True, "z_dims": [1] * 100_000}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "ssl_align": True, "z_dims": [1] * 999}}),
        ("config", {"model_options": {**TINY, "df_idxs": [2], "hidden_size": 60, "num_heads": 7}}),
        ("data", [1]),
        ("data", {"num_classes": torch.ones(2, 2)}),
        ("steps", "seven"),
        ("steps", -1),
        ("ema", {"x": [1]}),
    ],
    ids=str,
)
def test_entries_of_another_type(tmp_path, entry, value):
    content = {
        "ema": tiny().state_dict(),
        "config": {"model_options": {**TINY, "df_idxs": [2]}},
        "data": {},
        "steps": 3,
    }
    load_model(save(tmp_path / "a.pt", content))
    refusal(save(tmp_path / "a.pt", {**content, entry: value}))


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.int,
        torch.Tensor.to_sparse,
        torch.Tensor.cfloat,
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
        lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[0, :2]]),
        lambda tensor: torch.empty(tensor.shape, device="meta"),
    ],
    ids=["int", "sparse", "complex", "quantised", "nested", "without data"],
)
@pytest.mark.filterwarnings("ignore")  # torch warns of quantised and nested tensors
def test_tensors_of_other_kinds(tmp_path, change):
    state = tiny().state_dict()
    state["blocks.1.attn.qkv.weight"] = change(state["blocks.1.attn.qkv.weight"])
    assert "lacks tensors" in refusal(save(tmp_path / "a.pt", {"ema": state}))


def test_transposed_views_and_shared_memory_are_read_as_they_are(tmp_path):
    expected = tiny()
    state = expected.state_dict()
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].t().contiguous().t()
    state["blocks.1.attn.qkv.bias"] = state["blocks.0.attn.qkv.bias"]
    expected.load_state_dict(state)
    path = save(tmp_path / "a.pt", state)
    assert torch.equal(velocity(load_model(path)[0]), velocity(expected))
    export(path, tmp_path / "exported")
    assert same_weights(load_model(tmp_path / "exported")[0], expected)


@pytest.mark.parametrize(
    "more",
    [
        {f"blocks.{i}.x": torch.zeros(1) for i in range(5000)},
        {f"df_blocks.{i}.x": torch.zeros(1) for i in range(5000)},
        {f"projectors.{i}.4.weight": torch.zeros(1) for i in range(5000)},
        {"decoder_blocks.x.y": torch.zeros(1)},
        {"decoder_blocks." + "9" * 5000 + ".y": torch.zeros(1)},
        {"a\n\x1b[31mb": torch.zeros(1)},
        {"x" * 10**5: torch.zeros(1)},
        {5: torch.zeros(1)},
        {"module.pos_embed": torch.zeros(1)},  # beside pos_embed
    ],
    ids=["blocks", "branches", "projectors", "letters", "digits", "escapes", "long", "number", "twice"],
)
def test_names_of_parameters_that_no_model_has(tmp_path, more):
    message = refusal(save(tmp_path / "a.pt", {"ema": {**tiny().state_dict(), **more}}))
    assert len(message) < 1000
