"""Alignment encoders: every family's file format, input and output, on networks of timm made small."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.errors import InputError
from models import encoders
from models.encoders import ENCODERS, Encoder, check_grid, load_network, parse_enc_ckpt, parse_enc_type
from models.layers import sincos_2d

WIDTH, HEADS, DEPTH = 24, 2, 2
RESOLUTION = 32  # 2 × 2 tokens


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """All families with small networks; what else tells them apart stays."""
    for name in ENCODERS:
        tiny.shrink_encoder(monkeypatch, name, WIDTH, DEPTH, HEADS)


def deepen(monkeypatch, name, depth):
    tiny.shrink_encoder(monkeypatch, name, WIDTH, depth, HEADS)


def random_state(name, seed=0):
    """State dict in timm's names of a network whose every weight is random."""
    import timm

    family = ENCODERS[name]
    return tiny.fill_(timm.create_model(family.timm_name, num_classes=0, **family.options), seed, std=0.2).state_dict()


def images(resolution=RESOLUTION, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, resolution, resolution), generator=generator, dtype=torch.uint8)


# ------------------------------------------------------------------------------------- files as the authors write them


def clip_names(state):
    """OpenAI's names of timm's."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("patch_embed.proj.", "conv1."),
            ("norm_pre.", "ln_pre."),
            ("blocks.", "transformer.resblocks."),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj.", "attn.out_proj."),
            ("mlp.fc1.", "mlp.c_fc."),
            ("mlp.fc2.", "mlp.c_proj."),
            (".norm1.", ".ln_1."),
            (".norm2.", ".ln_2."),
        ):
            name = name.replace(ours, theirs)
        name = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        renamed[name] = tensor.flatten(0, -2)[0] if name == "class_embedding" else tensor.squeeze(0)
    return {**renamed, "proj": torch.randn(WIDTH, 8)}


def scripted(state):
    """A TorchScript module with such parameters, in half precision as published."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    root = Holder()
    root.visual = Holder()
    root.register_parameter("logit_scale", nn.Parameter(torch.ones([])))
    for name, tensor in state.items():
        module = root.visual
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return torch.jit.script(root.half())


def write_authors_file(name, state, path):
    """Save timm's `state` in the form in which the family's authors publish it."""
    state, family = dict(state), name.split("-")[0]
    if family == "clip":
        return torch.jit.save(scripted(clip_names(state)), str(path))
    if family == "mocov3":
        wrong = {right: wrong for wrong, right in encoders.MISNAMED.items()}
        for right in wrong:
            state = {k.replace(right, wrong[right]): v for k, v in state.items()}
        state["pos_embed"] = torch.randn(1, 197, WIDTH)  # at 224 pixels, not what is wanted
        state["head.0.weight"] = torch.randn(4, WIDTH)
        content = {f"module.base_encoder.{k}": v for k, v in state.items()}
        content |= {f"module.momentum_encoder.{k}": v + 1 for k, v in state.items()}
        content |= {"module.predictor.0.weight": torch.ones(2, 2)}
        return torch.save({"epoch": 300, "arch": "vit", "state_dict": content, "optimizer": {}}, path)
    if family == "mae":
        return torch.save(
            {"model": {**state, "mask_token": torch.ones(1), "decoder_embed.weight": torch.ones(2)}}, path
        )
    if family == "jepa":
        content = {f"module.{k}": v for k, v in state.items()}
        other = {f"module.{k}": v + 1 for k, v in state.items()}
        return torch.save({"encoder": content, "predictor": other, "target_encoder": other, "epoch": 300}, path)
    if family.startswith("dinov2"):
        state["mask_token"] = torch.zeros(1, WIDTH)
    if family == "dinov2reg":
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.full((1, 1, WIDTH), 0.5), state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - 0.5
    if name.endswith("-g"):
        state = {k.replace("fc1", "w12").replace("fc2", "w3"): v for k, v in state.items()}
    return torch.save(state, path)


def authors_file(name, folder):
    """(path, what timm's network should hold after reading it)."""
    state, path = random_state(name), folder / f"{name}.pth"
    if name.startswith("mocov3"):
        patches = sincos_2d(WIDTH, 16).roll(WIDTH // 2, dims=2)
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), patches], dim=1)
    write_authors_file(name, state, path)
    return path, state


@pytest.mark.parametrize("name", ENCODERS)
def test_files_of_the_authors_are_read_strictly(name, tmp_path, monkeypatch):
    if name.startswith("mocov3"):
        deepen(monkeypatch, name, 15)  # so that the misnamed blocks 13 and 14 are there
    path, expected = authors_file(name, tmp_path)
    found = load_network(name, str(path)).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if name.startswith("clip") else {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(found[key], tensor, **tolerance, msg=key)


@pytest.mark.parametrize("name", ["dinov2-vit-b", "dinov2reg-vit-s", "clip-vit-l", "mae-vit-l", "jepa-vit-h"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_in_the_names_of_timm_are_read_too(name, suffix, tmp_path):
    state, path = random_state(name), tmp_path / f"model{suffix}"
    content = {**state, "head.weight": torch.ones(3, WIDTH), "head.bias": torch.ones(3)}
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    assert not tiny.differences(dict(load_network(name, str(path)).state_dict()), dict(state))


@pytest.mark.parametrize("name", ["dinov2-vit-b", "clip-vit-l"])
def test_weights_of_the_hub_come_through_timm(name, tmp_path, monkeypatch):
    state = random_state(name)
    torch.save(state, tmp_path / "hub.pth")
    family = ENCODERS[name]  # timm reads its hub's file from the disk
    options = {**family.options, "pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth"), "hf_hub_id": None}}
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(family, options=options))
    assert not tiny.differences(dict(load_network(name).state_dict()), dict(state))


# ------------------------------------------------------------------------------------------ what an encoder computes


class ClipTower(nn.Module):
    """OpenAI's image tower, written out with torch's own attention, up to the last block."""

    def __init__(self, state):
        super().__init__()
        self.state = state
        self.blocks = nn.ModuleList(self.block(i) for i in range(DEPTH))

    def block(self, i):
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        prefix = f"transformer.resblocks.{i}.attn."
        attention.load_state_dict({k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)})
        return attention

    def layer_norm(self, x, name):
        return F.layer_norm(x, (WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def forward(self, x):
        x = F.conv2d(x, self.state["conv1.weight"], stride=14).flatten(2).mT
        x = torch.cat([self.state["class_embedding"].expand(len(x), 1, -1), x], dim=1)
        x = self.layer_norm(x + self.state["positional_embedding"], "ln_pre")
        for i, attention in enumerate(self.blocks):
            name = f"transformer.resblocks.{i}"
            h = self.layer_norm(x, f"{name}.ln_1")
            x = x + attention(h, h, h, need_weights=False)[0]
            h = self.linear(self.layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), f"{name}.mlp.c_proj")
        return x[:, 1:]


@torch.no_grad()
def test_clip_equals_its_tower_written_out(tmp_path):
    path, state = authors_file("clip-vit-l", tmp_path)
    halved = {key: tensor.half().float() for key, tensor in clip_names(state).items()}
    encoder = Encoder("clip-vit-l", 256, str(path))
    x = encoder.preprocess(images(256, count=1))
    assert x.shape[-1] == 224
    torch.testing.assert_close(encoder(images(256, count=1)), ClipTower(halved)(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def by_hand(encoder, pixels, final_norm):
    """Class, register and patch tokens of a network of timm, its parts put together here."""
    net = encoder.network
    patches = F.conv2d(
        encoder.preprocess(pixels), net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.patch_embed.patch_size
    )
    patches, n = patches.flatten(2).mT, len(pixels)
    extra = [token.expand(n, -1, -1) for token in (net.cls_token, net.reg_token) if token is not None]
    if net.no_embed_class:
        x = torch.cat([*extra, patches + net.pos_embed], dim=1)
    else:
        x = torch.cat([*extra, patches], dim=1) + net.pos_embed
    for block in net.blocks:
        x = block(net.norm_pre(x) if block is net.blocks[0] else x)
    if final_norm:
        x = F.layer_norm(x, (WIDTH,), net.norm.weight, net.norm.bias, eps=1e-6)
    return x


@pytest.mark.parametrize(
    ("name", "dropped", "final_norm"),
    [
        ("dinov2-vit-b", 1, True),
        ("dinov2-vit-g", 1, True),
        ("dinov2reg-vit-l", 5, True),
        ("dinov1-vit-b", 1, True),
        ("mocov3-vit-s", 1, True),
        ("mae-vit-l", 1, False),
        ("clip-vit-l", 1, False),
        ("jepa-vit-h", 0, True),
    ],
)
def test_features_are_the_patch_tokens_with_or_without_the_final_norm(name, dropped, final_norm, tmp_path):
    encoder = Encoder(name, RESOLUTION, str(authors_file(name, tmp_path)[0]))
    features, tokens = encoder(images()), by_hand(encoder, images(), final_norm)
    assert features.shape == (2, 4, WIDTH) and tokens.shape == (2, 4 + dropped, WIDTH) and not features.requires_grad
    torch.testing.assert_close(features, tokens[:, dropped:])
    assert not any(p.requires_grad for p in encoder.network.parameters()) and not encoder.network.training


def cubic_weights(size, out):
    """Matrix (out, size) of bicubic interpolation with a = −0.75, borders repeated, no antialiasing."""

    def kernel(d, a=-0.75):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * size / out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize(
    ("name", "side", "mean", "std"),
    [
        ("dinov2-vit-b", 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("dinov1-vit-b", 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("mae-vit-l", 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("jepa-vit-h", 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (
            "clip-vit-l",
            28,
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
    ],
)
def test_input_against_hand_computation(name, side, mean, std, tmp_path):
    encoder = Encoder(name, RESOLUTION, str(authors_file(name, tmp_path)[0]))
    pixels = images().numpy().astype(np.float64) / 255
    weights = np.eye(32) if side == 32 else cubic_weights(32, side)
    expected = (weights @ pixels @ weights.T - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(encoder.preprocess(images()).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(("resolution", "side"), [(256, 224), (512, 448)])
def test_patch_14_sees_seven_eighths_of_the_image(resolution, side, tmp_path):
    path = str(authors_file("dinov2-vit-b", tmp_path)[0])
    encoder = Encoder("dinov2-vit-b", resolution, path)
    pixels = images(resolution, count=1)
    assert encoder.preprocess(pixels).shape == (1, 3, side, side)
    assert encoder(pixels).shape == (1, (resolution // 16) ** 2, WIDTH)


@pytest.mark.parametrize(
    ("name", "grid", "prefix"), [("dinov2-vit-b", 37, 1), ("dinov2reg-vit-b", 37, 0), ("dinov1-vit-b", 14, 1)]
)
def test_position_embeddings_are_resampled_to_the_grid(name, grid, prefix, tmp_path):
    path, state = authors_file(name, tmp_path)
    stored = state["pos_embed"]
    assert stored.shape == (1, prefix + grid**2, WIDTH)
    square = stored[:, prefix:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, (16, 16), mode="bicubic", antialias=True).flatten(2).mT
    found = Encoder(name, 256, str(path)).network.pos_embed
    torch.testing.assert_close(found, torch.cat([stored[:, :prefix], resampled], dim=1), rtol=0, atol=1e-5)


def test_mocov3_positions_are_those_of_256_pixels(tmp_path):
    """[sin(w·ω), cos(w·ω), sin(h·ω), cos(h·ω)], w along the slow axis of the tokens, zeros for the class token."""
    found = Encoder("mocov3-vit-b", 256, str(authors_file("mocov3-vit-b", tmp_path)[0])).network.pos_embed[0]
    assert found.shape == (257, WIDTH) and not found[0].any()
    slow, fast, quarter = 5, 11, WIDTH // 4
    omega = [10000 ** (-j / quarter) for j in range(quarter)]
    expected = [f(p * w) for p in (slow, fast) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(found[1 + slow * 16 + fast], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_table_agrees_with_timm(name, monkeypatch):
    import timm

    monkeypatch.undo()
    family, (kind, _, size) = ENCODERS[name], name.split("-")
    with torch.device("meta"):
        network = timm.create_model(family.timm_name, num_classes=0, **family.options)
    heads = {"s": 6, "b": 12, "l": 16, "h": 16, "g": 24}[size] if name != "mocov3-vit-s" else 12
    assert (network.embed_dim, network.patch_embed.patch_size) == (family.width, (family.patch,) * 2)
    assert (network.blocks[0].attn.num_heads, len(network.blocks)) == (
        heads,
        {"s": 12, "b": 12, "l": 24, "h": 32, "g": 40}[size],
    )
    assert network.num_prefix_tokens == {"jepa": 0, "dinov2reg": 5}.get(kind, 1)
    assert network.norm.eps == network.blocks[0].norm1.eps == (1e-5 if kind == "clip" else 1e-6)
    assert network.patch_embed.grid_size[0] == {"dinov2": 37, "dinov2reg": 37, "dinov1": 14, "mae": 14}.get(kind, 16)
    if "." in family.timm_name:
        assert timm.models.get_pretrained_cfg(family.timm_name) is not None
    if kind == "jepa":  # the published weights are ImageNet-1K's
        assert family.timm_name.endswith(".in1k_ijepa")


# --------------------------------------------------------------------------------------------------------- mistakes


def test_forms_of_enc_type_and_enc_ckpt():
    assert parse_enc_type("None") == () and parse_enc_type("clip-vit-L") == ("clip-vit-l",)
    assert parse_enc_type("dinov2-vit-b, mae-vit-l") == ("dinov2-vit-b", "mae-vit-l")
    assert parse_enc_ckpt("a.pth,", ("x", "y")) == ("a.pth", None)
    for text, message in [
        ("dino", "--enc-type 'dino' is unknown; choose from dinov2-vit-s"),
        ("mae-vit-l,mae-vit-L", "twice"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_enc_type(text)
    with pytest.raises(InputError, match="--enc-ckpt names 1 files for 2 encoders"):
        parse_enc_ckpt("a.pth", ("x", "y"))


def test_a_grid_that_cannot_match_is_refused_with_both():
    check_grid("dinov2-vit-b", 256, 16)
    check_grid("mae-vit-l", 512, 32)
    with pytest.raises(InputError, match=r"dinov2-vit-b has a grid of 16x16 .*256x256 images, --model one of 8x8"):
        check_grid("dinov2-vit-b", 256, 8)
    with pytest.raises(InputError, match=r"grid of 2\.5x2\.5 .* 40x40 images, --model one of 2x2"):
        check_grid("mae-vit-l", 40, 2)


def refusal(name, path):
    with pytest.raises(InputError) as caught:
        Encoder(name, RESOLUTION, path if path is None else str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    path, state = authors_file("dinov2-vit-b", tmp_path)
    torch.save({key: tensor for key, tensor in state.items() if ".ls" not in key}, tmp_path / "bare.pth")
    assert "--enc-ckpt" in refusal("dinov2reg-vit-b", path) and 'Missing key(s) in state_dict: "reg_token"' in refusal(
        "dinov2reg-vit-b", path
    )
    assert "size mismatch for pos_embed" in refusal("dinov1-vit-b", tmp_path / "bare.pth")
    assert "holds no weights" in refusal("mocov3-vit-b", path)
    torch.save({key: tensor for key, tensor in state.items() if key != "norm.bias"}, tmp_path / "part.pth")
    assert 'Missing key(s) in state_dict: "norm.bias"' in refusal("dinov2-vit-b", tmp_path / "part.pth")
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "more.pth")
    assert 'Unexpected key(s) in state_dict: "extra"' in refusal("dinov2-vit-b", tmp_path / "more.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no weights" in refusal("dinov2-vit-b", tmp_path / "list.pth")
    torch.save({"encoder": 5}, tmp_path / "number.pth")
    assert "holds no weights" in refusal("jepa-vit-h", tmp_path / "number.pth")
    torch.save({"register_tokens": torch.ones(2)}, tmp_path / "part.pth")
    assert "holds no weights" in refusal("dinov2reg-vit-s", tmp_path / "part.pth")


def test_unreadable_files_are_refused_in_one_line(tmp_path):
    assert "nowhere.pth does not exist" in refusal("dinov2-vit-b", tmp_path / "nowhere.pth")
    assert f"{tmp_path}/config.json cannot be read" in refusal("dinov2-vit-b", tmp_path)
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"broken{suffix}").write_bytes(b"not a weights file")
        assert "unreadable or truncated" in refusal("dinov2-vit-b", tmp_path / f"broken{suffix}")
    path, _ = authors_file("clip-vit-l", tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "unreadable or truncated" in refusal("clip-vit-l", path)


def test_a_hub_that_cannot_be_reached_names_the_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    message = refusal("dinov2-vit-b", None)
    assert "cannot load the weights vit_base_patch14_dinov2.lvd142m" in message and "--enc-ckpt FILE" in message
    assert "are not on the hub; give the authors' --enc-ckpt FILE" in refusal("mocov3-vit-b", None)
