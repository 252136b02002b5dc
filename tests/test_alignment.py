"""SSL alignment in training: losses, stored features, several encoders, SiT, resume, and what is refused."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import programs
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

import train
from common.errors import InputError
from common.flags import parse_flags
from dataset import open_dataset
from latents.manifest import MANIFEST, NAMES
from latents.names import pack_names
from models import create_model, encoders, load_model
from models.encoders import Encoder
from models.paths import PATHS
from preprocessing import dataset_tools
from preprocessing.options import PackFlags
from preprocessing.pack import pack
from preprocessing.sources import ImageSource
from training import alignment
from training.checkpoint import checkpoint_path
from training.config import TrainConfig
from training.draws import draw_step
from training.loader import SeekableSampler

COUNT, SIDE, LATENT = 12, 32, 4  # the model and the encoders have 2 × 2 tokens
DINO, MAE = "dinov2-vit-b", "mae-vit-l"
SPEC = dataclasses.replace(tiny.SPEC, factor=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tiny.shrink_encoder(monkeypatch, DINO, width=16, depth=1)
    tiny.shrink_encoder(monkeypatch, MAE, width=24, depth=1)


def change_manifest(folder, **changes):
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def data(tmp_path):
    """Random moments and images, tied by names and the fingerprint of the images."""
    folder = tiny.data_folder(tmp_path / "data", COUNT, SPEC, shape=(8, LATENT, LATENT))
    (folder / "images").mkdir()
    names = [f"img{i:02d}.png" for i in range(COUNT)]
    rng = np.random.default_rng(3)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / name)
    (folder / "vae-sd" / NAMES).write_bytes(pack_names(names))
    change_manifest(folder / "vae-sd", images=ImageSource(folder / "images").fingerprint())
    return folder


@pytest.fixture
def dino(tmp_path):
    return tiny.encoder_file(DINO, tmp_path)


def run(data, folder, checkpoint=None, **changes):
    """An aligned run; returns its folder."""
    values = {"ssl_align": True, **({"enc_ckpt": checkpoint} if checkpoint else {}), **changes}
    return tiny.run_train(data, folder, **values)


def store(data, checkpoint, name=DINO, *flags):
    """Write the features with the command."""
    suffix = "-mirror" if "--mirror" in flags else ""
    places = ["--source", str(data / "images"), "--dest", str(data / f"features-{name}{suffix}")]
    dataset_tools.main(
        ["features", *places, "--enc-type", name, "--enc-ckpt", str(checkpoint), "--batch-size", "5", *flags]
    )
    return data / f"features-{name}{suffix}"


def losses(run_dir, key="loss"):
    return [line[key] for line in tiny.log_lines(run_dir)]


def no_encoder(*_):
    raise AssertionError("an encoder was built")


# ------------------------------------------------------------------------------------------------------- the loss


def test_first_step_against_a_direct_computation(data, dino, tmp_path):
    line = tiny.log_lines(run(data, tmp_path, dino, max_train_steps=1))[0]
    config = parse_flags(TrainConfig, tiny.train_flags(data, tmp_path, ssl_align=True)).resolve()
    torch.manual_seed(0)
    model = create_model(
        "DeepFlow-Ti/2", depth=2, df_idxs="1", num_classes=3, input_size=LATENT, ssl_align=True, z_dims=[16]
    )
    draws = draw_step(0, config, 2, (4, LATENT, LATENT))
    moments, labels, images = open_dataset(data, images=True).gather(SeekableSampler(COUNT, 4, 0).batch(0))
    x = PATHS["linear"].interpolate(SPEC.sample(moments, draws.posterior), draws.noise, draws.times[0])
    with torch.no_grad():
        (projection,) = model(x, list(draws.times), torch.where(draws.drop, 3, labels)).projections
        features = Encoder(DINO, SIDE, str(dino))(images)
    cosine = (F.normalize(projection, dim=-1) * F.normalize(features, dim=-1)).sum(-1)
    assert projection.shape == features.shape == (4, 4, 16)
    assert line["loss_proj"] == line["loss_proj1"] == pytest.approx(-cosine.mean().item(), abs=1e-6)
    assert line["loss"] == pytest.approx(
        0.2 * line["loss_v1"] + line["loss_v2"] + line["loss_a1"] + 0.5 * line["loss_proj"], abs=1e-5
    )


def test_projectors_learn_and_travel_in_the_checkpoint(data, dino, tmp_path):
    run_dir = run(data, tmp_path, dino, max_train_steps=40, batch_size=12, learning_rate=1e-3)
    assert losses(run_dir, "loss_proj")[-1] < losses(run_dir, "loss_proj")[0] - 0.2
    content = tiny.load(checkpoint_path(run_dir, 40))
    assert content["config"]["model_options"]["ssl_align"] and content["config"]["model_options"]["z_dims"] == (16,)
    assert not any("encoder" in name for name in content["model"])
    model, _ = load_model(checkpoint_path(run_dir, 40))
    assert model.projectors[0][4].weight.shape == (16, 256)
    plain = tiny.run_train(data, tmp_path / "plain", max_train_steps=1)
    assert "loss_proj" not in tiny.log_lines(plain)[0]


def test_none_is_no_alignment(data, tmp_path):
    shutil.rmtree(data / "images")
    off = tiny.run_train(data, tmp_path / "off", enc_type="None")
    assert losses(off) == losses(tiny.run_train(data, tmp_path / "plain"))
    refused(data, tmp_path / "exps", "--ssl-align has nothing to align with --enc-type None", enc_type="None")


def test_accumulation_gives_every_micro_batch_its_images(data, dino, tmp_path):
    whole = run(data, tmp_path / "whole", dino)
    parts = run(data, tmp_path / "parts", dino, gradient_accumulation_steps=2)
    for key in ("loss", "loss_proj"):
        assert losses(parts, key) == pytest.approx(losses(whole, key), abs=2e-6)


def test_features_are_computed_under_the_autocast_and_compared_in_float32(data, dino, tmp_path, monkeypatch):
    seen, load_network = [], encoders.load_network

    def hooked(*args):
        network = load_network(*args)
        network.blocks[0].attn.qkv.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        return network

    monkeypatch.setattr(encoders, "load_network", hooked)
    run_dir = run(data, tmp_path, dino, mixed_precision="bf16", max_train_steps=1)
    assert seen == [torch.bfloat16] and not tiny.log_lines(run_dir)[0]["bad_steps"]
    for dtype in (torch.bfloat16, torch.float16):
        assert train.alignment_loss([torch.ones(1, 2, 3, dtype=dtype)], [torch.ones(1, 2, 3)]).dtype == torch.float32


def test_compile_compiles_the_encoder_by_block(data, dino, tmp_path, monkeypatch):
    eager, compiled = run(data, tmp_path / "eager", dino, max_train_steps=1), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_: compiled.append(part))
    run_dir = run(data, tmp_path, dino, max_train_steps=1, compile=True)
    (block,) = (part for part in compiled if type(part).__module__.startswith("timm."))
    assert not any(p.requires_grad for p in block.parameters())
    assert losses(run_dir) == losses(eager)


@pytest.mark.parametrize(("peak", "warns"), [(None, False), (1.0, False), (1e15, True)])
def test_slow_images_are_announced_with_numbers_and_remedy(data, dino, tmp_path, monkeypatch, capsys, peak, warns):
    monkeypatch.setattr(alignment, "peak_flops", lambda device, precision: peak)
    run(data, tmp_path, dino, max_train_steps=1, num_workers=3)
    pattern = r"warning: 3 threads read [\d,]+ images/s, the GPU can train on about [\d,]+; .*dataset_tools.py features"
    assert bool(re.search(pattern, capsys.readouterr().err)) == warns


def test_images_are_read_by_as_many_threads_as_there_are_cores(data, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(48), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [open_dataset(data, images=images).workers for images in (True, False)] == [12, 4]
    assert open_dataset(data, images=True, workers=0).workers == 1


def test_several_encoders(data, dino, tmp_path):
    both = f"{dino},{tiny.encoder_file(MAE, tmp_path)}"
    run_dir = run(data, tmp_path, both, enc_type=f"{DINO},{MAE}", trans_depth=3, df_idxs="1 2")
    line = tiny.log_lines(run_dir)[0]
    parts = [line[f"loss_proj{block}_{name}"] for block in (1, 2) for name in (DINO, MAE)]
    assert line["loss_proj"] == pytest.approx(sum(parts) / 4, abs=1e-6) and len(set(parts)) == 4
    model, options = load_model(checkpoint_path(run_dir, 4))
    assert [p[4].out_features for p in model.projectors] == [16, 24, 16, 24] and options["z_dims"] == (16, 24)


def test_sit_is_aligned_after_a_block(data, dino, tmp_path):
    sit = {"model": "SiT-Ti/2", "df_idxs": "[]", "trans_depth": 3, "max_train_steps": 1}
    folders = {depth: run(data, tmp_path / str(depth), dino, encoder_depth=depth, **sit) for depth in (1, 3)}
    states = {depth: tiny.load(checkpoint_path(folder, 1)) for depth, folder in folders.items()}
    assert states[1]["config"]["model_options"]["encoder_depth"] == 1
    assert losses(folders[1], "loss_v1") == losses(folders[3], "loss_v1")
    model, _ = load_model(checkpoint_path(folders[1], 1))
    assert (model.encoder_depth, len(model.projectors)) == (1, 1)
    with pytest.raises(InputError, match=r"--encoder-depth was 1, is 2; start afresh under another --exp-name$"):
        run(data, tmp_path / "1", dino, encoder_depth=2, **{**sit, "max_train_steps": 2}, resume=1)


@pytest.mark.parametrize(("name", "depth"), [("SiT-B/2", 4), ("SiT-L/2", 8), ("SiT-XL/2", 8), ("SiT-S/2", 8)])
def test_default_depth_of_the_baselines(name, depth):
    with torch.device("meta"):
        assert create_model(name, ssl_align=True).encoder_depth == depth


def test_the_projection_is_of_the_tokens_after_that_block():
    model = tiny.fill_(create_model("SiT-Ti/2", input_size=4, ssl_align=True, encoder_depth=2, z_dims=(6, 8)))
    after = []
    model.blocks[1].register_forward_hook(lambda *args: after.append(args[-1][0]))  # tokens, text
    with torch.no_grad():
        out = model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1]))
        for projection, project in zip(out.projections, model.projectors, strict=True):
            assert torch.equal(projection, project(after[0]))


def test_projections_are_block_by_block_and_encoder_by_encoder():
    sizes = {"depth": 3, "df_idxs": (1, 2), "input_size": 4, "z_dims": (6, 8)}
    model = tiny.fill_(create_model("DeepFlow-Ti/2", ssl_align=True, **sizes), std=0.1)
    refined = []
    for vera in model.df_blocks:
        vera.register_forward_hook(lambda *args: refined.append(args[-1][1]))
    with torch.no_grad():
        out = model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1]))
        for i, (projection, project) in enumerate(zip(out.projections, model.projectors, strict=True)):
            assert projection.shape == (2, 4, (6, 8)[i % 2]) and torch.equal(projection, project(refined[i // 2]))


# ------------------------------------------------------------------------------------------------ stored features


def test_stored_features_train_as_the_encoder_does(data, dino, tmp_path, monkeypatch):
    """Neither images nor weights are there any more."""
    computed = run(data, tmp_path / "computed", dino)
    place = store(data, dino)
    manifest = json.loads((place / MANIFEST).read_text())
    assert manifest["encoder"]["name"] == DINO and manifest["encoder"]["weights"].startswith("sha256:")
    assert (manifest["shape"], manifest["dtype"], manifest["flipped"]) == ([4, 16], "<f2", False)
    with_flag = run(data, tmp_path / "with-flag", dino)
    shutil.rmtree(data / "images")
    dino.unlink()
    monkeypatch.setattr(alignment, "Encoder", no_encoder)
    stored = run(data, tmp_path / "stored")
    assert losses(stored) == losses(with_flag)
    for key in ("loss", "loss_proj", "loss_v2"):
        assert losses(stored, key) == pytest.approx(losses(computed, key), abs=1e-4)
    assert losses(stored, "loss_proj") != losses(computed, "loss_proj")  # rounded to fp16


def test_packed_moments_keep_their_tie_to_the_features(data, dino, tmp_path, monkeypatch):
    place = store(data, dino)
    pack(PackFlags(data / "vae-sd", tmp_path / "packed/vae-sd", stored_dtype="fp32"))
    shutil.copytree(place, tmp_path / "packed" / place.name)
    monkeypatch.setattr(alignment, "Encoder", no_encoder)
    assert losses(run(tmp_path / "packed", tmp_path / "a")) == losses(run(data, tmp_path / "b"))
    change_manifest(tmp_path / "packed" / place.name, images="0" * 64)
    with pytest.raises(InputError, match="features of other images"):
        run(tmp_path / "packed", tmp_path / "c")


def test_one_of_two_encoders_stored_then_both(data, dino, tmp_path):
    mae = tiny.encoder_file(MAE, tmp_path)
    flags = {"enc_type": f"{DINO},{MAE}", "max_train_steps": 2}
    computed = run(data, tmp_path / "a", f"{dino},{mae}", **flags)
    store(data, mae, MAE)
    mixed = run(data, tmp_path / "b", f"{dino},{mae}", **flags)
    assert losses(mixed, f"loss_proj1_{DINO}")[0] == losses(computed, f"loss_proj1_{DINO}")[0]
    store(data, dino)
    for run_dir in (mixed, run(data, tmp_path / "c", **flags)):
        for key in (f"loss_proj1_{MAE}", f"loss_proj1_{DINO}"):
            assert losses(run_dir, key) == pytest.approx(losses(computed, key), abs=1e-4)


def test_mirrored_images_have_their_own_features(data, dino, tmp_path):
    shutil.copytree(data / "vae-sd", data / "vae-sd-mirror")
    computed = run(data, tmp_path / "a", dino, mirror=True)
    assert losses(computed) != losses(run(data, tmp_path / "b", dino))
    store(data, dino)
    with pytest.raises(InputError, match=r"--mirror: .*features-dinov2-vit-b-mirror is missing"):
        run(data, tmp_path / "c", dino, mirror=True)
    twin = store(data, dino, DINO, "--mirror")
    assert losses(run(data, tmp_path / "d", dino, mirror=True)) == pytest.approx(losses(computed), abs=1e-4)
    change_manifest(twin, flipped=False)
    with pytest.raises(InputError, match=r"False, 12.*, not .*True, 12"):
        run(data, tmp_path / "e", dino, mirror=True)


def refused(data, folder, message, **changes):
    with pytest.raises(InputError, match=message) as caught:
        run(data, folder, **changes)
    assert "\n" not in str(caught.value) and not (folder / "run").exists()


def test_features_that_do_not_belong_are_refused(data, dino, tmp_path):
    place, exps = store(data, dino), tmp_path / "exps"
    other = tiny.encoder_file(DINO, tmp_path, seed=5)
    refused(data, exps, r"features-dinov2-vit-b was made with the weights sha256:\w+, --enc-ckpt", checkpoint=other)
    change_manifest(place, encoder={"name": MAE})
    refused(data, exps, "its encoder, .*mae-vit-l.*, not .*dinov2-vit-b")
    change_manifest(place, encoder={"name": DINO}, flipped=True)
    refused(data, exps, "True, 12.*, not .*False, 12")
    change_manifest(place, flipped=False)
    change_manifest(data / "vae-sd", images="0" * 64)
    refused(data, exps, r"features-dinov2-vit-b holds features of other images than .*vae-sd was made from")
    change_manifest(data / "vae-sd", images=None)
    run(data, tmp_path / "unknown")  # a set that others made does not say it: names and count have to do
    names = (data / "vae-sd" / NAMES).read_bytes()
    (data / "vae-sd" / NAMES).write_bytes(names.replace(b"img00", b"img99"))
    refused(data, exps, "features of other images")


def test_features_of_a_part_or_unfinished_or_of_another_size_are_refused(data, dino, tmp_path):
    exps = tmp_path / "exps"
    place = store(data, dino, DINO, "--max-images", "5")
    refused(data, exps, "number of images are .* 5.*, not .* 12")
    (place / MANIFEST).rename(tmp_path / "manifest")
    (place / ".partial").mkdir()
    refused(data, exps, "is not finished; run the same preprocessing command again")
    shutil.rmtree(place)
    for path in (data / "images").iterdir():
        with Image.open(path) as image:
            image.resize((64, 64)).save(path)
    store(data, dino)
    change_manifest(data / "vae-sd", images=None)
    refused(data, exps, r"have the shape \(16, 16\), the model needs \(4, 16\)")


def test_features_of_several_encoders_are_several_sets(data, tmp_path):
    places = ["--source", str(data / "images"), "--dest", str(tmp_path / "x")]
    for text in (f"{DINO},{MAE}", "None"):
        with pytest.raises(InputError, match="a set holds the features of one encoder"):
            dataset_tools.main(["features", *places, "--enc-type", text])


def test_a_grid_that_differs_from_the_models_is_refused(tmp_path, dino):
    data = tiny.data_folder(tmp_path / "wide", spec=tiny.SPEC)
    (data / "images").mkdir()
    message = r"--enc-type dinov2-vit-b has a grid of 1x1 patch tokens for 16x16 images, --model one of 4x4"
    refused(data, tmp_path / "exps", message, checkpoint=dino)
    refused(data, tmp_path / "exps", "--encoder-depth is for models of one branch", checkpoint=dino, encoder_depth=1)


# ------------------------------------------------------------------------------------- resume, sampling, dry run


@pytest.mark.parametrize("stored", [False, True], ids=["computed", "stored"])
def test_an_aligned_run_resumes_to_the_bit(data, dino, tmp_path, stored):
    if stored:
        store(data, dino)
    flags = {"gradient_accumulation_steps": 2}
    whole = run(data, tmp_path / "whole", dino, **flags)
    parts = run(data, tmp_path / "parts", dino, max_train_steps=2, **flags)
    run(data, tmp_path / "parts", dino, resume="auto", **flags)
    one, other = (tiny.load(checkpoint_path(folder, 4)) for folder in (whole, parts))
    assert any(name.startswith("projectors.") for name in one["model"])
    for entry in ("model", "ema", "opt", "steps", "train_state"):
        assert not tiny.differences(one[entry], other[entry]), entry


@pytest.mark.parametrize("model", [{}, {"name": "SiT-Ti/2"}], ids=["DeepFlow", "SiT"])
def test_sampling_from_an_aligned_model(model, tmp_path):
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    ckpt = tiny.checkpoint(tmp_path / "a.pt", vae, ssl_align=True, z_dims=(6, 8), **model)
    content = tiny.load(ckpt)
    for entry in ("model", "ema"):
        content[entry] = {k: v for k, v in content[entry].items() if not k.startswith("projectors.")}
    content["config"]["model_options"]["ssl_align"] = False
    torch.save(content, tmp_path / "b.pt")
    _, aligned, _ = tiny.run_generate(ckpt, tmp_path / "samples-a")
    _, plain, _ = tiny.run_generate(tmp_path / "b.pt", tmp_path / "samples-b")
    assert np.array_equal(aligned, plain) and aligned.std() > 0


def test_dry_run_counts_the_projectors_and_needs_no_data_and_no_weights(tmp_path, capsys):
    flags = {"model": "SiT-B/2", "df_idxs": "[]", "trans_depth": 12, "dry_run": True}
    for options in ({}, {"ssl_align": True, "enc_type": "clip-vit-L"}):
        tiny.run_train(tmp_path / "nowhere", tmp_path, **flags, **options)
    text = capsys.readouterr().out
    projector = 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 1024 + 1024
    assert " 130,500,112 parameters" in text and f" {130_500_112 + projector:,} parameters" in text
    assert "alignment, weight 0.5: clip-vit-l, computed while training (weights of the hub)" in text


@pytest.mark.slow
def test_two_processes_make_the_same_aligned_step(data, tmp_path, monkeypatch):
    """From stored features of the true width, so that the processes need no small encoder."""
    name = "dinov2-vit-s"
    tiny.shrink_encoder(monkeypatch, name, width=384, depth=1)
    store(data, tiny.encoder_file(name, tmp_path), name)
    flags = {"ssl_align": True, "enc_type": name, "max_train_steps": 3}
    one = tiny.run_train(data, tmp_path / "one", **flags)
    done = programs.run_ranks(2, tiny.ROOT / "train.py", *tiny.train_flags(data, tmp_path / "two", **flags))
    assert done.returncode == 0, done.stderr
    for key in ("loss", "loss_proj"):
        assert losses(tmp_path / "two/run", key) == pytest.approx(losses(one, key), abs=1e-5)
